"""Logits that exist already, as student and as teacher: a head's numbers, and a gradient of their own."""

from dataclasses import replace

import pytest
import torch
import truth
from batches import OBJECTIVES, fixed, loss_of, smallest_budget
from drawn import DRAWN
from hypothesis import given
from hypothesis import strategies as st

import kdkernels as kd

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
FUNCTIONS = {
    "cross_entropy": lambda s, t, y, **more: kd.cross_entropy(s, y, **more),
    "entropy": lambda s, t, y, **more: kd.entropy(s, **more),
    "plackett_luce": lambda s, t, y, **more: kd.plackett_luce(s, t, k=3, **more),
    **{
        name: lambda s, t, y, name=name, **more: kd.divergence(s, t, truth.DIVERGENCES[name][0], 0.7, **more)
        for name in truth.DIVERGENCES
    },
}


def dense(name: str, z_s: torch.Tensor, z_t: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    if name == "cross_entropy":
        return truth.cross_entropy(z_s, target)
    if name == "entropy":
        return truth.entropy(z_s)
    if name == "plackett_luce":
        chosen = z_s.detach().topk(3).indices
        order = z_t.gather(-1, chosen).argsort(-1, descending=True)
        return truth.plackett_luce(z_s.gather(-1, chosen.gather(-1, order)))
    return truth.divergence(z_s, z_t, name, 0.7)


def distinct(shape, vocabulary) -> torch.Tensor:
    """Logits [*shape, vocabulary] that differ within a row in every dtype: no ties in what is ranked."""
    return torch.rand(*shape, vocabulary).argsort(-1).float() / 8 - vocabulary / 16


@DRAWN
@given(
    name=st.sampled_from(list(FUNCTIONS)),
    seed=st.integers(0, 10**6),
    shape=st.sampled_from([(5,), (2, 3), (3, 1, 2), ()]),
    vocabulary=st.integers(3, 100),
    padding=st.sampled_from([0, 5]),
    teacher_dtype=st.sampled_from([F16, BF16, F32]),
    layout=st.sampled_from(["contiguous", "transposed", "strided"]),
)
def test_every_function(dtype, name, seed, shape, vocabulary, padding, teacher_dtype, layout):
    torch.manual_seed(seed)
    z_s, z_t = (distinct(shape, vocabulary + padding) for _ in range(2))
    target = torch.randint(0, vocabulary, shape)
    z_s, z_t = z_s.to(dtype), z_t.to(teacher_dtype)
    if layout == "transposed":
        z_s, z_t = (z.transpose(0, -1).contiguous().transpose(0, -1) for z in (z_s, z_t))
    elif layout == "strided":
        z_s, z_t = (torch.stack([z, z], -1)[..., 0] for z in (z_s, z_t))
    z_s.requires_grad_()
    before = z_s.detach().clone()
    student, teacher = kd.Logits(z_s, vocabulary), kd.Logits(z_t, vocabulary)
    value = FUNCTIONS[name](student, teacher, target)
    assert value.shape == shape
    incoming = torch.randn(shape, dtype=value.dtype)
    (got,) = torch.autograd.grad(value, z_s, incoming)
    assert torch.equal(z_s, before) and got.dtype == dtype and (got[..., vocabulary:] == 0).all()

    def expected(dtype):
        leaf = before[..., :vocabulary].to(dtype).requires_grad_()
        out = dense(
            name,
            leaf.reshape(-1, vocabulary),
            z_t[..., :vocabulary].reshape(-1, vocabulary).to(dtype),
            target.flatten(),
        )
        return out.detach(), torch.autograd.grad(out, leaf, incoming.to(out.dtype).flatten())[0]

    (yardstick, d_yardstick), (exact, d_exact) = expected(dtype), expected(F64)
    flat, got = value.detach().flatten(), got[..., :vocabulary]
    if exact.norm() < 1e-12:  # one entry, or two of one order
        assert (flat.abs() < 1e-6).all()
        return
    if dtype == F64:
        assert truth.relative(flat, exact) < 1e-12 and truth.relative(got, d_exact) < 1e-11
    else:
        truth.assert_accurate(flat, yardstick, exact, "value", dtype, slack=4)
        truth.assert_accurate(got, d_yardstick, d_exact, "gradient", dtype, slack=4)


def as_logits(batch: truth.Batch) -> truth.Batch:
    """The same batch with the logits of its heads in their place."""
    student = kd.Logits(truth.dense_logits(batch.student, 60).detach().requires_grad_())
    return replace(batch, student=student, teacher=kd.Logits(truth.dense_logits(batch.teacher, 60).detach()))


@pytest.mark.parametrize("chunks", ["one", "several"])
@pytest.mark.parametrize("make", OBJECTIVES)
def test_objectives(backend, make, chunks):
    """The loss of the heads, and a gradient that their chain rule turns into that of the hidden states."""
    batch = fixed(F32, weights=True)
    z = truth.dense_logits(batch.student, 60)
    expected = loss_of(make, batch)
    (d_hidden,) = torch.autograd.grad(expected, batch.student.hidden)
    logits = as_logits(batch)
    budget = None
    if chunks == "several":
        budget = smallest_budget(lambda n: loss_of(make, logits, memory_budget=n)) + 5 * 2 * 60 * 4
    loss = loss_of(make, logits, memory_budget=budget)
    (d_logits,) = torch.autograd.grad(loss, logits.student.logits)
    assert (d_logits[~batch.mask] == 0).all() and d_logits[batch.mask].norm() > 0
    torch.testing.assert_close(loss, expected)
    assert truth.relative(torch.autograd.grad(z, batch.student.hidden, d_logits)[0], d_hidden) < 1e-5


def test_one_side_of_each(backend):
    batch = fixed(F32)
    both = as_logits(batch)
    expected = kd.divergence(batch.student, batch.teacher, kd.JSD(0.9))
    for student, teacher in ((batch.student, both.teacher), (both.student, batch.teacher)):
        torch.testing.assert_close(kd.divergence(student, teacher, kd.JSD(0.9)), expected)


def test_statistics(backend):
    batch = as_logits(fixed(F32))
    got = kd.statistics(batch.student, batch.teacher, topk=4, collision=7, target=batch.target)
    for side, source in ((got, batch.student), (got.teacher, batch.teacher)):
        log_q = source.logits.detach().double().log_softmax(-1)
        collision = log_q.exp().square().sort(descending=True).values[..., :7].sum(-1)
        torch.testing.assert_close(side.collision.double(), collision, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(side.entropy.double(), truth.entropy(log_q), rtol=1e-5, atol=1e-5)
    assert torch.equal(got.topk_indices, batch.student.logits.topk(4).indices)


def test_autocast_leaves_logits_alone(backend):
    batch = as_logits(fixed(F32))
    expected = kd.divergence(batch.student, batch.teacher, kd.ForwardKL())
    with torch.autocast("cpu", dtype=BF16):
        assert torch.equal(kd.divergence(batch.student, batch.teacher, kd.ForwardKL()), expected)


def test_changing_logits_before_backward_is_an_error(backend):
    logits = torch.randn(3, 9, requires_grad=True)
    copy = logits * 1
    value = kd.entropy(kd.Logits(copy)).sum()
    copy.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()


Z = torch.zeros(2, 10)
BAD = {
    "a list": (lambda: kd.Logits([1.0]), TypeError, ["logits", "floating-point", "list"]),
    "integers": (lambda: kd.Logits(Z.long()), TypeError, ["logits", "int64"]),
    "a scalar": (lambda: kd.Logits(Z.sum()), ValueError, ["logits", "[..., V]", "[]"]),
    "no entries": (lambda: kd.Logits(Z[:, :0]), ValueError, ["logits", "[2, 0]"]),
    "vocab_size above": (lambda: kd.Logits(Z, 11), ValueError, ["vocab_size", "10", "11"]),
    "vocab_size of nothing": (lambda: kd.Logits(Z, 0), ValueError, ["vocab_size", "0"]),
    "vocab_size of true": (lambda: kd.Logits(Z, True), TypeError, ["vocab_size", "int", "True"]),
    "vocab_size of a half": (lambda: kd.Logits(Z, 5.0), TypeError, ["vocab_size", "int", "5.0"]),
    "a wider teacher": (
        lambda: kd.divergence(kd.Logits(Z), kd.Logits(Z.double()), kd.ForwardKL()),
        TypeError, ["teacher", "float32", "float64"],
    ),
    "a smaller teacher": (
        lambda: kd.divergence(kd.Logits(Z), kd.Logits(Z[:, :9]), kd.ForwardKL()), ValueError, ["teacher", "10", "9"],
    ),
    "positions": (
        lambda: kd.divergence(kd.Logits(Z), kd.Logits(Z[:1]), kd.ForwardKL()),
        ValueError, ["teacher", "[2, 'V']", "[1, 10]"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_errors_name_argument_expected_and_actual(name):
    call, error, told = BAD[name]
    with pytest.raises(error) as raised:
        call()
    missing = [part for part in told if part not in str(raised.value)]
    assert not missing, f"{missing} not in: {raised.value}"
    assert str(raised.value).startswith(told[0])
