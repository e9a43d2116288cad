"""Heads with a low-rank product: z = h W^T + u B^T, against the same head with the full weight W + B A."""

from __future__ import annotations

from dataclasses import replace
from unittest import mock

import pytest
import torch
import truth
from backends import PRECISIONS
from batches import OBJECTIVES, fixed, loss_of, smallest_budget

import kdkernels as kd
from kdkernels.compute import gemm
from kdkernels.sources.adapted import AdaptedHead, AdaptedProducer

F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
RANK = 3
WITHOUT_BIAS = ("hidden", "weight", "inner", "outer")


def adapted(batch, frozen: bool = False):
    """The batch with a low-rank product on the student, and the leaves: hidden, weight, A, B, bias."""
    head, generator = batch.student, torch.Generator().manual_seed(7)

    def leaf(*shape):
        return torch.randn(*shape, generator=generator).to(BF16).to(head.dtype).requires_grad_()

    a, b = leaf(RANK, head.width), leaf(head.weight.shape[0], RANK)
    weight = head.weight.detach() if frozen else head.weight
    parts = [head.hidden, weight, a, b, head.bias]
    fields = {name: getattr(head, name) for name in ("softcap", "scale", "vocab_size")}
    student = AdaptedHead(head.hidden, weight, head.bias, **fields, inner=head.hidden @ a.t(), outer=b)
    return replace(batch, student=student), [t for t in parts if t is not None and t.requires_grad]


def dense(batch, frozen: bool = False):
    """The same with the full weight."""
    low, leaves = adapted(batch, frozen)
    head = low.student
    a = next(t for t in leaves if t.shape == (RANK, head.width))
    weight = head.weight + head.outer @ a
    fields = {name: getattr(head, name) for name in ("softcap", "scale", "vocab_size")}
    return replace(batch, student=kd.Head(head.hidden, weight, head.bias, **fields)), leaves


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("make", OBJECTIVES)
def test_exact_in_fp64(make, frozen, monkeypatch):
    monkeypatch.setenv("KDKERNELS_BACKEND", "eager")
    batch = fixed(F64, bias=True, softcap=6.0, scale=0.5, padding_s=5)
    (low, leaves), (full, others) = adapted(batch, frozen), dense(batch, frozen)
    got, expected = loss_of(make, low), loss_of(make, full)
    assert truth.relative(got.detach(), expected.detach()) < 1e-12
    for mine, its in zip(torch.autograd.grad(got, leaves), torch.autograd.grad(expected, others), strict=True):
        assert its.norm() > 0 and truth.relative(mine, its) < 1e-10


@pytest.mark.parametrize("precision", [p for p in PRECISIONS if p[1] != F64], ids=lambda p: f"{p[0]}-{str(p[1])[6:]}")
@pytest.mark.parametrize("chunks", [False, True])
@pytest.mark.parametrize("make", OBJECTIVES)
def test_every_backend_and_dtype(make, chunks, precision, monkeypatch):
    """Error as eager PyTorch's with the full weight in that dtype; in chunks too, whose dB is summed in fp32."""
    monkeypatch.setenv("KDKERNELS_BACKEND", precision[0])
    exact = fixed(BF16, lengths=(5, 1, 9, 0, 3), bias=True).to(F64)
    narrow, leaves = adapted(exact.to(precision[1]))
    limit = (
        {"memory_budget": smallest_budget(lambda n: loss_of(make, narrow, memory_budget=n)) + 3000} if chunks else {}
    )
    with mock.patch.object(AdaptedProducer, "add", autospec=True, side_effect=AdaptedProducer.add) as added:
        got = torch.autograd.grad(loss_of(make, narrow, **limit), leaves)
    assert (added.call_count > 2) == chunks
    monkeypatch.setenv("KDKERNELS_BACKEND", "eager")
    (full, others), (same, yardsticks) = dense(exact), dense(exact.to(precision[1]))
    true = torch.autograd.grad(loss_of(make, full), others)
    eager = torch.autograd.grad(loss_of(make, same), yardsticks)
    for mine, its, reference in zip(got, eager, true, strict=True):
        assert mine.dtype == precision[1]
        truth.assert_accurate(mine, its, reference, "gradient", slack=4)


def test_wide_logits(backend):
    """Operands in bf16: fp32 logits have no rounding of their own."""
    batch, _ = adapted(fixed(BF16))
    wide = replace(batch.student, **{name: getattr(batch.student, name).double() for name in WITHOUT_BIAS})
    z = truth.dense_logits(wide, wide.vocabulary) + wide.inner @ wide.outer.t()
    expected = truth.entropy(z).detach()
    assert truth.relative(kd.entropy(batch.student, logits_dtype=F32).detach(), expected) < 1e-6


@pytest.mark.parametrize(("frozen", "made"), [(True, [(60, RANK)]), (False, [(60, 8), (60, RANK)])])
def test_a_frozen_weight_has_no_gradient_product(frozen, made):
    batch, leaves = adapted(fixed(F32), frozen)
    with mock.patch.object(gemm, "WeightGradient", side_effect=gemm.WeightGradient) as products:
        torch.autograd.grad(loss_of(kd.GKD, batch), leaves)
    assert [tuple(call.args[1].shape) for call in products.call_args_list] == made


def test_as_a_teacher(backend):
    batch = fixed(F32)
    (low, _), (full, _) = adapted(batch), dense(batch)
    got, expected = (
        loss_of(kd.GKD, replace(batch, teacher=replace(each.student, hidden=each.student.hidden)))
        for each in (low, full)
    )
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=0)


HIDDEN, WEIGHT = torch.zeros(2, 3, 4), torch.zeros(9, 4)
GOOD = {"hidden": HIDDEN, "weight": WEIGHT, "inner": torch.zeros(2, 3, 2), "outer": torch.zeros(9, 2)}


@pytest.mark.parametrize(
    ("arguments", "error", "told"),
    [
        ({"inner": None}, TypeError, "inner: expected a floating-point tensor, got NoneType"),
        ({"inner": torch.zeros(2, 2)}, ValueError, r"inner: expected shape \[2, 3, 'R'\], got \[2, 2\]"),
        ({"inner": torch.zeros(2, 3, 0)}, ValueError, r"inner: expected shape \[2, 3, 'R'\], got \[2, 3, 0\]"),
        ({"outer": torch.zeros(9, 3)}, ValueError, r"outer: expected shape \[9, 2\], got \[9, 3\]"),
        ({"outer": torch.zeros(9, 2, dtype=F64)}, TypeError, r"outer: expected dtype torch.float32.*float64"),
        ({"inner": torch.zeros(2, 3, 2, device="meta")}, ValueError, "inner: expected device cpu.*meta"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else None,
)
def test_bad_input(arguments, error, told):
    AdaptedHead(**GOOD)
    with pytest.raises(error, match=told):
        AdaptedHead(**GOOD | arguments)
