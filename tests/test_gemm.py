"""Products on tensor cores, which sum 16-bit operands in fp32: here a CPU plays the GPU's part."""

import pytest
import torch
import truth

from kdkernels import gemm

C, V, H = 6, 40, 8
F32 = torch.float32


@pytest.fixture(params=[True, False], ids=["out", "no out"])
def products(request, monkeypatch):
    """torch.mm and addmm as GPUs have them, with or without ``out=`` of another dtype; lists the operands' dtypes."""
    seen = []

    def mm(a, b, *, out_dtype=None, out=None):
        assert out is None or out_dtype is None or request.param, "not in this torch"
        seen.append((a.dtype, b.dtype, out_dtype or a.dtype))
        result = (a.float() @ b.float()).to(out_dtype or a.dtype)
        return result if out is None else out.copy_(result)

    def addmm(c, a, b, *, out_dtype, out):
        assert request.param and c.dtype == out_dtype == out.dtype
        return out.copy_(c + mm(a, b, out_dtype=out_dtype))

    monkeypatch.setattr(torch, "mm", mm)
    monkeypatch.setattr(torch, "addmm", addmm)
    monkeypatch.setattr(gemm, "_sums_in_fp32", lambda device: True)
    monkeypatch.setattr(gemm, "_INTO", request.param)
    monkeypatch.setattr(gemm, "_PRODUCT", 64)  # several steps
    return seen


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("biased", [True, False])
def test_fp32_logits_come_from_narrow_operands(products, dtype, biased):
    hidden, weight, bias = (torch.randn(shape).to(dtype) for shape in ((C, H), (V, H), (V,)))
    out = torch.empty(C, V)
    gemm.project(hidden, weight, bias if biased else None, out)
    assert products and set(products) == {(dtype, dtype, F32)}
    exact = hidden.double() @ weight.double().t() + (bias.double() if biased else 0)
    assert truth.relative(out, exact) < 1e-6


def test_the_weight_gradient_of_chunks_is_summed_from_narrow_operands(products):
    dtype = torch.bfloat16
    weight = torch.randn(V + 3, H).to(dtype)
    chunks = [(torch.randn(C, V).to(dtype), torch.randn(C, H).to(dtype)) for _ in range(3)]
    gradient = gemm.WeightGradient(weight, V, len(chunks))
    for dz, hidden in chunks:
        gradient.add(dz, hidden)
    assert products and set(products) == {(dtype, dtype, F32)}
    exact = sum(dz.double().t() @ hidden.double() for dz, hidden in chunks)
    assert truth.relative(gradient.accumulator, exact) < 1e-6
    assert torch.equal(gradient.result()[:V], gradient.accumulator.to(dtype)) and (gradient.result()[V:] == 0).all()


def test_the_workspace_of_wider_logits():
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert gemm.workspace(H, torch.bfloat16, torch.bfloat16, cpu) == 0
    assert gemm.workspace(H, torch.bfloat16, F32, cpu) == 4096 * H * 4
    assert gemm.workspace(H, torch.bfloat16, F32, cuda) == (0 if gemm._INTO else (1 << 23) * 4)
