"""A teacher keeps its own dtype: it multiplies apart from the student, and its logits are at least as wide."""

from dataclasses import replace

import pytest
import torch
from backends import BF16, F16, F32, F64, PRECISIONS
from batches import OBJECTIVES, fixed, loss_of, run
from truth import assert_accurate, divergence, gkd, gradients, leaves, relative, to, token_logits

import kdkernels as kd

LENGTHS = dict(lengths=(5, 0, 7), longest=8, bias=True, softcap=4.0)
# On CPUs; each backend with the students that it computes with.
PAIRS = [
    (backend, student, teacher) for backend, student in PRECISIONS for teacher in (F32, BF16, F16) if teacher != student
]


def mixed(student: torch.dtype, teacher: torch.dtype):
    """The same numbers on both sides, which both dtypes hold, in fp64 and in these dtypes."""
    exact = fixed(BF16, **LENGTHS).to(F64)  # of a size of about 1: fp16 holds bf16's numbers
    return exact, replace(exact.to(student), teacher=to(exact.teacher, teacher))


@pytest.fixture(params=PAIRS, ids=lambda p: "-".join([p[0], *(str(dtype)[6:] for dtype in p[1:])]))
def pair(request, monkeypatch):
    monkeypatch.setenv("KDKERNELS_BACKEND", request.param[0])
    return request.param[1:]


def test_values_and_gradients(pair):
    exact, batch = mixed(*pair)
    same = exact.to(pair[0])  # what the student's dtype costs alone
    truth, yardstick = gkd(exact), gkd(same)
    loss = run(kd.GKD(), batch).loss
    assert_accurate(loss.detach(), yardstick.detach(), truth.detach(), "loss", pair[0], slack=2)
    expected = zip(gradients(yardstick, same.student), gradients(truth, exact.student), strict=True)
    for got, leaf, (eager, true) in zip(gradients(loss, batch.student), leaves(batch.student), expected, strict=True):
        assert got.dtype == leaf.dtype
        assert_accurate(got, eager, true, "gradient", slack=2)


def test_per_token_functions(pair):
    exact, batch = mixed(*pair)
    expected = divergence(*token_logits(exact), "reverse").detach()
    got = kd.divergence(batch.student, batch.teacher, kd.ReverseKL())[exact.mask].detach()
    assert relative(got, expected) < 8 * torch.finfo(pair[0]).eps


@pytest.mark.parametrize("make", OBJECTIVES)
def test_a_narrow_teacher_costs_no_digit(make, backend):
    """fp32 student: as beside the same teacher in fp32, up to the order in which its products are summed."""
    for dtype in (BF16, F16):
        _, batch = mixed(F32, dtype)
        wide = replace(batch, teacher=to(batch.teacher, F32))
        losses = loss_of(make, batch), loss_of(make, wide)
        torch.testing.assert_close(*losses, rtol=1e-5, atol=0)
        for pair in zip(*(gradients(loss, batch.student) for loss in losses), strict=True):
            assert relative(*pair) < 1e-5


def test_autocast_gives_both_one_dtype():
    exact, batch = mixed(F32, F16)
    with torch.autocast("cpu", dtype=BF16):
        got = run(kd.GKD(), batch).loss
        same = run(kd.GKD(), replace(batch, teacher=to(batch.teacher, F32))).loss
    assert torch.equal(got, same)
    assert relative(got.detach(), gkd(exact).detach()) < 0.05


def test_only_fp64_is_refused():
    exact, batch = mixed(F32, BF16)
    wide = replace(batch, teacher=exact.teacher)
    for call in (
        lambda: run(kd.GKD(), wide),
        lambda: kd.divergence(batch.student, exact.teacher, kd.ForwardKL()),
    ):
        with pytest.raises(TypeError, match=r"teacher: .*student of torch.float32, got torch.float64; pass .*fp32"):
            call()
    narrow = run(kd.GKD(), replace(exact, teacher=batch.teacher)).loss  # an fp64 student takes any
    assert relative(narrow.detach(), gkd(exact).detach()) < 1e-12
