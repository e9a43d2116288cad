"""The products around the row kernels: every implementation against fp64. Here a CPU plays the GPU's part."""

import os

import pytest
import torch
import truth
from allocations import Allocations, Resident
from instruction_sets import AVX512, BF16, CPU, F16, F32, SETS, matrix, of_this_cpu, products_of

from kdkernels.compute import gemm
from kdkernels.engine import plan
from kdkernels.kernels import backend_for

C, V, H = 6, 40, 8


@pytest.fixture
def tensor_cores(monkeypatch):
    """torch.mm and addmm as GPUs have them, with ``out=`` of another dtype; lists the operands' dtypes."""
    seen = []

    def mm(a, b, *, out_dtype, out):
        assert out_dtype == out.dtype
        seen.append((a.dtype, b.dtype, out_dtype))
        return out.copy_(a.float() @ b.float())

    def addmm(c, a, b, *, out_dtype, out):
        assert c.dtype == out_dtype
        return out.copy_(c + mm(a, b, out_dtype=out_dtype, out=torch.empty_like(out)))

    monkeypatch.setattr(torch, "mm", mm)
    monkeypatch.setattr(torch, "addmm", addmm)
    return gemm.TensorCores(), seen


@pytest.mark.parametrize("operator", ["mm", "addmm"])
def test_torch_writes_another_dtype_into_a_buffer(operator):
    """The overloads that TensorCores calls are in every torch that is supported; only GPUs can run them."""
    assert "dtype_out" in getattr(torch.ops.aten, operator).overloads()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="make gpu-check runs it")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_tensor_cores_on_a_gpu(dtype):
    with torch.device("cuda"):
        hidden, weight, bias = (torch.randn(shape).to(dtype) for shape in ((C, H), (V, H), (V,)))
        out = torch.full((C, V + 5), torch.nan)[:, :V]
        gemm.TensorCores().project(hidden, weight, bias, out)
        assert truth.relative(out, hidden.double() @ weight.double().t() + bias.double()) < 1e-6
        check_the_weight_gradient(gemm.TensorCores(), dtype, 3)
        dz = torch.randn(C, V).to(dtype)
        d_hidden = gemm.TensorCores().multiply(dz, weight)
        assert truth.relative(d_hidden, dz.double() @ weight.double()) < torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("biased", [True, False])
def test_fp32_logits_come_from_narrow_operands(tensor_cores, dtype, biased):
    products, seen = tensor_cores
    hidden, weight, bias = (torch.randn(shape).to(dtype) for shape in ((C, H), (V, H), (V,)))
    out = torch.empty(C, V)
    products.project(hidden, weight, bias if biased else None, out)
    assert seen and set(seen) == {(dtype, dtype, F32)}
    exact = hidden.double() @ weight.double().t() + (bias.double() if biased else 0)
    assert truth.relative(out, exact) < 1e-6


def test_the_weight_gradient_of_chunks_is_summed_from_narrow_operands(tensor_cores):
    products, seen = tensor_cores
    check_the_weight_gradient(products, BF16, 3)
    assert seen and set(seen) == {(BF16, BF16, F32)}


def test_the_first_chunk_is_not_added_to_zeros(tensor_cores, monkeypatch):
    """That would be two more passes over the sums. What lay there (check_the_weight_gradient: NaN) is not read."""
    products, _ = tensor_cores
    monkeypatch.setattr(torch.Tensor, "zero_", lambda *_: pytest.fail("the sums are filled with zeros"))
    check_the_weight_gradient(products, BF16, 3)


def test_the_gradient_of_hidden_states_is_summed_in_fp32(tensor_cores):
    """Parts of a sum over many entries must not be rounded before they are added: cuBLAS may where it writes bf16."""
    products, seen = tensor_cores
    dz, weight = torch.randn(C, V).to(BF16), torch.randn(V, H).to(BF16)
    got, exact = products.multiply(dz, weight), dz.double() @ weight.double()
    assert seen == [(BF16, BF16, F32)] and got.dtype == BF16
    assert truth.relative(got, exact) < torch.finfo(BF16).eps


def test_the_fp16_gradients_are_summed_from_narrow_operands(tensor_cores):
    products, seen = tensor_cores
    check_the_weight_gradient(products, F16, 3)
    check_the_column_sums(products, F16)
    assert seen and set(seen) == {(F16, F16, F32)}


@pytest.mark.parametrize("dtype", [torch.float64, F32, BF16, F16])
def test_the_column_sums(dtype):
    check_the_column_sums(products_of(dtype), dtype)


def check_the_column_sums(products, dtype):
    dz, out = torch.randn(C, V).to(dtype), torch.randn(V, dtype=torch.promote_types(dtype, F32))
    powers = torch.ldexp(torch.ones(C), torch.randint(-6, 6, (C,))) if dtype == F16 else None
    exact = out.double() + (dz.double() if powers is None else powers[:, None] * dz.double()).sum(0)
    products.add_column_sums(dz, powers, out)
    assert truth.relative(out, exact) < 1e-6


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float64, F32, BF16, torch.float16])
def test_the_weight_gradient(dtype, count):
    check_the_weight_gradient(products_of(dtype), dtype, count)
    check_the_weight_gradient(gemm.Torch(), dtype, count)
    if dtype.itemsize == 2:
        check_the_weight_gradient(gemm.Widened(), dtype, count)


def check_the_weight_gradient(products, dtype, count):
    weight = torch.randn(V + 3, H).to(dtype)
    chunks = [(torch.randn(C, V).to(dtype), torch.randn(C, H).to(dtype)) for _ in range(count)]
    gradient = gemm.WeightGradient(products, weight, V, len(chunks))
    gradient.gradient[:V] = torch.nan  # it comes uninitialised
    if gradient.accumulator is not None:
        gradient.accumulator.fill_(torch.nan)
    powers = [torch.ldexp(torch.ones(C), torch.randint(-6, 6, (C,))) for _ in chunks]  # of fp16 alone
    powers = powers if dtype == torch.float16 else [None] * count
    for (dz, hidden), power in zip(chunks, powers, strict=True):
        gradient.add(dz, hidden, power)
    wide = [
        (dz.double() if p is None else p[:, None] * dz.double(), h) for (dz, h), p in zip(chunks, powers, strict=True)
    ]
    exact = sum(dz.t() @ hidden.double() for dz, hidden in wide)
    # one rounding; torch's products round each chunk
    assert truth.relative(gradient.gradient[:V].double() * gradient.factor, exact) < 2 * torch.finfo(dtype).eps
    assert (gradient.gradient[V:] == 0).all()


def test_workspaces():
    native, torchs, tensor_cores, widened = gemm.Native(), gemm.Torch(), gemm.TensorCores(), gemm.Widened()
    assert torchs.workspace(H, F32, F32, True) == torchs.workspace(H, BF16, BF16, False) == (0, 0)
    assert torchs.workspace(H, BF16, BF16, True) == (512 * H * 4, 0)
    assert widened.workspace(H, BF16, BF16, True) == (2 * 1024 * H * 4, (H + 1024) * 4)
    assert torchs.workspace(H, BF16, F32, True) == widened.workspace(H, BF16, F32, True)
    assert tensor_cores.workspace(H, BF16, F32, True) == (0, 4 * H)
    assert tensor_cores.workspace(H, BF16, F32, False) == (0, 0)
    frozen, trained = (native.workspace(896, BF16, BF16, trained) for trained in (False, True))
    threads = torch.get_num_threads()
    assert frozen == (threads << 15, threads * 256 + 4 * 896)
    assert native.workspace(896, F32, F32, False) == (threads << 15, threads * 256)
    assert trained[0] > frozen[0] and trained[1] == threads * 256 + min(threads, 7) * 1024 + 4 * (896 + 63)


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("wide", [False, True], ids=["own logits", "fp32 logits"])
@pytest.mark.parametrize("who", [*SETS, "widened", "chosen"])
def test_products_take_what_they_say(dtype, wide, who, monkeypatch):
    """torch's own widen both operands and the product where a CPU has no 16-bit units: 40 MB for dW alone."""
    if who in SETS:
        monkeypatch.setenv("KDKERNELS_CPU_ISA", who)
    elif who == "widened" and dtype == F32:
        pytest.skip("nothing to widen")
    products = {"widened": gemm.Widened(), "chosen": products_of(dtype)}.get(who, gemm.Native())
    tokens, entries, width = 16, 20000, 512
    hidden, weight, bias = (torch.randn(shape).to(dtype) for shape in ((tokens, width), (entries, width), (entries,)))
    dz, logits = torch.randn(tokens, entries).to(dtype), F32 if wide else dtype
    out, sums = torch.zeros(tokens, entries, dtype=logits), torch.zeros(entries, width)
    d_weight = torch.zeros_like(weight)
    calls = {
        "logits": lambda: products.project(hidden, weight, bias, out),
        "dX": lambda: products.multiply(dz, weight),
        "dW": lambda: products.add(dz.t(), hidden, d_weight, True),
    }
    if dtype != F32:
        calls["sums of dW"] = lambda: products.accumulate(dz.t(), hidden, sums, d_weight, False, True)
    fixed, row = products.workspace(width, dtype, logits, True)
    for name, call in calls.items():
        call()  # libraries are up
        with Allocations() as allocated:
            result = call()
        said = fixed + tokens * row + (0 if result is None else result.nbytes)
        assert allocated.peak <= said + (1 << 16), (type(products).__name__, name)
        if Resident.measurable:
            with Resident() as resident:
                call()
            assert resident.peak <= said + (8 << 20), (type(products).__name__, name)


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
@pytest.mark.parametrize("logits", [None, F32], ids=str)
@pytest.mark.parametrize("biased", [True, False])
def test_widened_products(dtype, logits, biased, monkeypatch):
    """Some entries at a time, the last time fewer: as exact as one rounding allows; nothing around them is read."""
    monkeypatch.setattr(gemm, "_WIDENED_ENTRIES", 16)
    products, eps = gemm.Widened(), torch.finfo(logits or dtype).eps
    hidden, weight, bias = matrix(C, H, dtype, 1), matrix(V, H, dtype, 2, transposed=biased), torch.randn(V).to(dtype)
    out = torch.full((C, V + 3), 7.0, dtype=logits or dtype)[:, :V]
    products.project(hidden, weight, bias if biased else None, out)
    exact = hidden.double() @ weight.double().t() + (bias.double() if biased else 0)
    assert truth.relative(out, exact) < max(1e-6 if logits == F32 else 0, eps)
    assert (out._base[:, V:] == 7.0).all()
    dz = matrix(C, V, dtype, 5)
    assert truth.relative(products.multiply(dz, weight), dz.double() @ weight.double()) < torch.finfo(dtype).eps


@pytest.mark.parametrize(
    ("traits", "of_fp32", "of_bf16", "of_fp16"),
    [
        ("avx512_bf16", "native", "native", "native"),
        ("avx512_bf16 intel", "torch", "native", "native"),
        ("avx512_bf16 intel amx_bf16", "torch", "torch", "native"),
        ("avx512_bf16 intel amx_bf16 amx_fp16", "torch", "torch", "torch"),
        ("avx512", "native", "native", "native"),
        ("avx512 intel", "torch", "native", "native"),
        ("avx2", "native", "native", "native"),
        ("avx2 intel", "torch", "native", "native"),
        ("portable", "torch", "torch in fp32", "torch in fp32"),
        ("portable arm", "torch", "native", "native"),
        ("", "torch", "torch", "torch"),
    ],
)
def test_who_multiplies(traits, of_fp32, of_bf16, of_fp16, monkeypatch):
    def chosen() -> list[str]:
        told = [gemm.who_multiplies(frozenset(traits.split()), dtype) for dtype in (F32, BF16, F16, torch.float64)]
        assert all(why for _, why in told)
        return [who.name for who, _ in told]

    monkeypatch.setattr(gemm, "_has_units", lambda operand: True)
    assert chosen() == [of_fp32, of_bf16, of_fp16, "torch"]
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)  # torch's 16-bit products are slow then
    instead = "torch in fp32" if traits in ("portable", "") else "native"
    assert chosen() == [of_fp32, instead, instead, "torch"]


def test_who_multiplies_elsewhere():
    backend = backend_for(CPU, F32)
    cuda = [type(backend.products(torch.device("cuda"), dtype)) for dtype in (F32, BF16, F16)]
    assert cuda == [gemm.Torch, gemm.TensorCores, gemm.TensorCores]


def test_a_wide_model_on_many_threads_leaves_room_for_logits(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 192)
    fixed, _ = gemm.Native().workspace(8192, BF16, BF16, True)
    assert fixed < plan.DEFAULT_BUDGET / 2


def test_torch_has_units_where_it_should():
    """And none in `make test-avx2`."""
    if os.environ.get("ONEDNN_MAX_CPU_ISA") == "AVX2":
        assert not gemm._has_units(BF16) and not gemm._has_units(F16)
    elif of_this_cpu()[1] >= AVX512 - {"avx512f"}:
        assert gemm._has_units(BF16)


def test_this_cpu_is_known_for_what_it_is(monkeypatch):
    cpu, flags = of_this_cpu()
    if not SETS or not flags or os.environ.get("KDKERNELS_BACKEND"):
        pytest.skip("nothing to compare")
    best = "avx512_bf16" if SETS[0] == "avx512" else SETS[0].removesuffix("_nobf16")
    forced = os.environ.get("KDKERNELS_CPU_ISA")
    assert forced or backend_for(CPU, F32).traits() >= {best}
    for name in SETS:
        monkeypatch.setenv("KDKERNELS_CPU_ISA", name)
        traits = set(torch.ops.kdkernels.cpu_traits().split())
        assert len(traits & {"avx512_bf16", "avx512", "avx2", "portable"}) == 1
        assert ("avx512_bf16" in traits) == (name == "avx512") and ("avx2" in traits) == (name == "avx2")
        assert ("intel" in traits) == ("GenuineIntel" in cpu)
        assert ("amx_bf16" in traits) == ("amx_bf16" in flags) and ("amx_fp16" in traits) == ("amx_fp16" in flags)
