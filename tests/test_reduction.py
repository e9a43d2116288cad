"""How responses become a loss: every reduction of every objective, and batches that share a denominator."""

from collections import Counter
from dataclasses import replace

import pytest
import torch
import truth
from batches import fixed, run
from torch.utils._python_dispatch import TorchDispatchMode

import kdkernels as kd
from kdkernels import reference
from kdkernels.objectives import DivergenceTerm, Objective, base

F64 = torch.float64
LENGTHS = (5, 1, 9, 0, 3)
PARTS = [[0, 1], [3], [2], [4]]  # rows of micro-batches: the second has no token


class Plain(Objective):
    """Of a user, who thinks of one response: L_r = (1 / L) sum_t KL(p || q)."""

    terms = {"forward": DivergenceTerm(kd.ForwardKL())}

    def coefficients(self, tokens):
        return {"forward": tokens.entropy.new_ones(()) / tokens.length}


# name -> (the objective, L_r of one response's z_s, z_t [L, V], its author and its target [L])
OBJECTIVES = {
    "GKD": (kd.GKD, lambda s, t, by_teacher, y: reference.gkd([s], [t])),
    "TSDKD": (
        lambda **options: kd.TSDKD(k=4, opener=0.5, entropy_ratio=0.4, **options),
        lambda s, t, by_teacher, y: reference.tsd_kd([s], [t], k=4, opener_share=0.5, entropy_ratio=0.4),
    ),
    "DistiLLM2": (kd.DistiLLM2, lambda s, t, by_teacher, y: reference.distillm2([s], [t], [by_teacher])),
    "VCRD": (
        lambda **options: kd.VCRD(weighting="likelihood_ratio", **options),
        lambda s, t, by_teacher, y: reference.vcrd([s], [t], [by_teacher]) / len(s),  # of one prompt
    ),
    "SFT": (kd.SFT, lambda s, t, by_teacher, y: reference.cross_entropy(s, y).mean()),
    "Plain": (Plain, lambda s, t, by_teacher, y: reference.divergence(s, t, kd.ForwardKL()).mean()),
}
CASES = [
    pytest.param(name, reduction, id=f"{name} {reduction}")
    for name in OBJECTIVES
    for reduction in ("responses", "tokens", "sum", *["prompts"] * (name == "VCRD"))
]


def dense(name: str, reduction: str, batch: truth.Batch) -> torch.Tensor:
    """The definition, of full logits."""
    z_s, z_t = truth.token_logits(batch)
    index = torch.tensor([i for r in batch.responses for i in r])
    target, losses = batch.target.flatten()[index], []
    for r, by_teacher in zip(truth.slices(batch), batch.written, strict=True):
        losses.append(OBJECTIVES[name][1](z_s[r], z_t[r], by_teacher, target[r]))
    losses, lengths = torch.stack(losses), torch.tensor(list(map(len, batch.responses)))
    if reduction == "responses":
        return losses.mean()
    return (lengths * losses).sum() / {"tokens": lengths.sum(), "sum": 1, "prompts": batch.prompts}[reduction]


def given(objective, batch: truth.Batch, **more) -> kd.objectives.Output:
    return run(objective, batch, **({"target": batch.target} if objective.needs_target else {}), **more)


def part(batch: truth.Batch, rows: list[int]) -> truth.Batch:
    """Some rows, whose gradients go to the whole batch's tensors."""
    sides = {s: replace(getattr(batch, s), hidden=getattr(batch, s).hidden[rows]) for s in ("student", "teacher")}
    return replace(
        batch, **sides, mask=batch.mask[rows], target=batch.target[rows], from_teacher=batch.from_teacher[rows]
    )


def assert_equal(loss, batch, expected, exact, tolerance=1e-12):
    """A loss of ``batch`` and one of ``exact``, which has the same numbers."""
    assert abs(loss - expected) <= tolerance * abs(expected)
    pairs = zip(truth.gradients(loss, batch.student), truth.gradients(expected, exact.student), strict=True)
    for got, gradient in pairs:
        assert truth.relative(got, gradient) < 100 * tolerance and gradient.norm() > 1e-3


@pytest.mark.parametrize(("name", "reduction"), CASES)
def test_every_reduction_is_its_definition(backend, name, reduction):
    dtype = F64 if backend == "eager" else torch.float32
    batch = fixed(dtype, LENGTHS, bias=True)
    out, exact = given(OBJECTIVES[name][0](reduction=reduction), batch), batch.to(F64)
    assert_equal(out.loss, batch, dense(name, reduction, exact), exact, 1e-12 if dtype == F64 else 1e-6)
    assert int(out.count) == {"responses": 4, "tokens": 18, "sum": 1, "prompts": batch.prompts}[reduction]


def test_the_reductions_differ():
    batch = fixed(F64, LENGTHS)
    for name in OBJECTIVES:
        losses = [dense(name, reduction, batch) for reduction in ("responses", "tokens", "sum", "prompts")]
        ratios = [abs(a / b - 1) for i, a in enumerate(losses) for b in losses[:i]]
        assert min(ratios) > 0.01, name


@pytest.mark.parametrize(("name", "reduction"), CASES)
def test_micro_batches_add_up_to_the_batch(name, reduction):
    """Of uneven responses, one micro-batch without any: the whole batch's loss, gradients and metrics."""
    batch, objective = fixed(F64, LENGTHS, bias=True), OBJECTIVES[name][0](reduction=reduction)
    whole = given(objective, batch)
    number = int(whole.count)
    numbers = (number, float(number), torch.tensor(number), torch.tensor(number, dtype=torch.float32))
    outs = [given(objective, part(batch, rows), denominator=n) for rows, n in zip(PARTS, numbers, strict=True)]
    assert outs[1].loss == 0 and not outs[1].metrics
    assert_equal(sum(out.loss for out in outs), batch, dense(name, reduction, batch), batch)
    for metric in ("loss", *objective.terms):
        parts = sum(out.metrics[metric] for out in outs if out.metrics)
        torch.testing.assert_close(parts, whole.metrics[metric], rtol=1e-12, atol=0)


@pytest.mark.parametrize("reduction", ["tokens", "sum"])
def test_a_denominator_of_ones_own(reduction):
    """It replaces what the loss is divided by, and nothing else: the count stays the batch's."""
    batch = fixed(F64, LENGTHS)
    own, given_ = (run(kd.GKD(reduction=reduction), batch, denominator=n) for n in (None, 36))
    assert_equal(given_.loss, batch, dense("GKD", "sum", batch) / 36, batch)
    assert given_.count == own.count
    torch.testing.assert_close(given_.loss * 36, own.loss * own.count)


def test_an_attribute_is_the_default_of_a_class():
    class Total(Plain):
        reduction = "sum"

    batch = fixed(F64, LENGTHS)
    assert_equal(run(Total(), batch).loss, batch, dense("Plain", "sum", batch), batch)
    changed = Total()
    changed.reduction = "tokens"
    assert_equal(run(changed, batch).loss, batch, dense("Plain", "tokens", batch), batch)


def test_the_coefficients_of_fp16_gradients():
    """A sum's gradients are far from a mean's: both are inside fp16's range."""
    batch = fixed(torch.float16, LENGTHS)
    exact = batch.to(F64)
    for reduction in kd.TSDKD.reductions:
        got = truth.gradients(run(kd.GKD(reduction=reduction), batch).loss, batch.student)
        expected = truth.gradients(dense("GKD", reduction, exact), exact.student)
        assert all(truth.relative(g, e) < 5e-3 for g, e in zip(got, expected, strict=True)), reduction


class Counted(TorchDispatchMode):
    """How often each operator of PyTorch runs."""

    def __init__(self):
        super().__init__()
        self.calls = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.calls[str(function.overloadpacket)] += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["GKD", "TSDKD"])
def test_what_a_token_mean_costs(name):
    """The same products and sweeps in one pass; what a response counts is one multiplication of [n]."""
    batch, calls = fixed(torch.float32, LENGTHS), {}
    for reduction in ("tokens", "responses", "tokens"):  # the first call of all does more
        objective = OBJECTIVES[name][0](reduction=reduction)
        with Counted() as calls[reduction]:
            run(objective, batch).loss.backward()
    more = calls["tokens"].calls - calls["responses"].calls
    assert not calls["responses"].calls - calls["tokens"].calls
    assert more == {"aten.mul": 1, "aten._to_copy": 1, "aten.select": 1}
    assert sum(calls["tokens"].calls.values()) > 20


# ---- what a denominator may be ---------------------------------------------------------------------------------------

WRONG = [
    (0, ValueError, "a positive number, got 0"),
    (-2.0, ValueError, "a positive number, got -2.0"),
    (float("nan"), ValueError, "a finite number, got nan"),
    (float("inf"), ValueError, "a finite number, got inf"),
    (True, TypeError, "a number, got True"),
    ("3", TypeError, "a number, got '3'"),
    ([3], TypeError, r"a number, got \[3\]"),
    (torch.tensor(0), ValueError, "a positive number, got 0"),
    (torch.tensor(float("nan")), ValueError, "a finite number, got nan"),
    (torch.tensor(True), TypeError, "a number, got True"),
    (torch.tensor([3]), ValueError, r"a number, or a tensor \[\] of .*, got torch.int64 \[1\]$"),
    (torch.tensor(3.0, requires_grad=True), ValueError, r"a number, .* got torch.float32 \[\] with gradient$"),
    (torch.tensor(3.0, device="meta"), ValueError, "a number, or .* on cpu .*, got torch.float32 on meta"),
]


@pytest.mark.parametrize(("denominator", "error", "message"), WRONG, ids=[str(each[0]) for each in WRONG])
@pytest.mark.parametrize("lengths", [LENGTHS, (0, 0)], ids=["tokens", "no token"])
def test_a_wrong_denominator(lengths, denominator, error, message):
    batch = fixed(lengths=lengths)
    with pytest.raises(error, match=f"^denominator: expected {message}"):
        run(kd.GKD(), batch, denominator=denominator)


def test_a_denominator_on_another_device_is_not_read():
    """Reading it would be a sync: a tensor without values has none to read."""
    meta = torch.device("meta")
    scale = base._scale(torch.tensor(3, device=meta), 1, meta)
    assert scale.device == meta and scale.shape == () and scale.dtype == F64
    with pytest.raises(ValueError, match=r"^denominator: expected .*, got torch.bool on meta"):
        base._scale(torch.tensor(True, device=meta), 1, meta)
