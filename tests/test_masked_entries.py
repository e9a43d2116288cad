"""Entries that a model masks, by -inf or its dtype's lowest number: everything is as if they were not there."""

import math
from dataclasses import replace

import pytest
import torch
import truth
from batches import fixed, run

import kdkernels as kd

F64 = torch.float64
REAL = [3, 7, 8, 21, 30, 44]  # of 60 entries
MASKS = ["-inf", "finfo.min"]


def masked(batch: truth.Batch, mask: str, sides=("student", "teacher")) -> truth.Batch:
    """The batch with a bias that leaves the real entries alone."""

    def side(name):
        head = getattr(batch, name)
        if name not in sides:
            return head
        lowest = -math.inf if mask == "-inf" else torch.finfo(head.dtype).min
        bias = torch.full((60,), lowest, dtype=head.dtype)
        bias[REAL] = head.bias.detach()[REAL]
        return replace(head, bias=bias.requires_grad_(head.bias.requires_grad))

    target = torch.tensor(REAL)[batch.target % len(REAL)]
    return replace(batch, student=side("student"), teacher=side("teacher"), target=target)


def real(batch: truth.Batch, dtype: torch.dtype) -> truth.Batch:
    """The same batch of the real entries alone."""

    def side(head):
        head = truth.to(head, dtype)
        weight, bias = (t.detach()[REAL].requires_grad_(t.requires_grad) for t in (head.weight, head.bias))
        return replace(head, weight=weight, bias=bias)

    return replace(batch, student=side(batch.student), teacher=side(batch.teacher), target=batch.target % len(REAL))


def tsd_kd(batch):
    return sum(truth.tsd_kd(batch, truth.select(batch.to(F64), len(REAL), 0.5, 0.3)).values())


def likelihood_ratio(batch):
    with torch.no_grad():
        proposal = truth.token_logits(batch.to(F64))[0].argmax(-1)
    return truth.vcrd(batch, proposal)


OBJECTIVES = {
    "TSDKD": (lambda: kd.TSDKD(k=10, opener=0.5, entropy_ratio=0.3), tsd_kd),
    "GKD": (kd.GKD, truth.gkd),
    "GKD at a temperature": (lambda: kd.GKD(0.0, 0.7), lambda b: truth.gkd(b, 0.0, 0.7)),
    "SFT": (kd.SFT, truth.sft),
    "DistiLLM2": (kd.DistiLLM2, truth.distillm2),
    "VCRD": (lambda: kd.VCRD(weighting="likelihood_ratio"), likelihood_ratio),
}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_objectives_see_the_entries_that_exist(dtype, name, mask):
    """Both models mask all but six entries; TSD-KD asks for ten."""
    make, formula = OBJECTIVES[name]
    plain = fixed(dtype, bias=True)
    batch, exact, narrow = masked(plain, mask), real(plain, F64), real(plain, dtype)
    out = run(make(), batch, **({"target": batch.target} if name == "SFT" else {}))
    got = truth.gradients(out.loss, batch.student)
    expected, yardstick = formula(exact), formula(narrow)
    assert out.metrics["nonfinite_tokens"] == 0
    assert truth.relative(out.loss.detach(), expected.detach()) < (1e-12 if dtype == F64 else 0.02)
    hidden = truth.leaves(batch.student)[0]
    assert got[0].isfinite().all() and got[0].shape == hidden.shape
    others = [entry for entry in range(60) if entry not in REAL]
    assert (got[1][others] == 0).all() and (got[2][others] == 0).all(), "nothing moves a masked entry"
    got[1], got[2] = got[1][REAL], got[2][REAL]
    eager = truth.gradients(yardstick, narrow.student)
    for g, e, x in zip(got, eager, truth.gradients(expected, exact.student), strict=True):
        if dtype == F64:
            assert truth.relative(g, x) < 1e-12
        else:
            truth.assert_accurate(g, e, x, name, slack=2)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("sides", [("student",), ("teacher",), ("student", "teacher")], ids="-".join)
def test_plackett_luce(dtype, mask, sides):
    """The teacher's masked entries come last, by the student's rank; the student's are no candidates."""
    batch = masked(fixed(dtype, bias=True), mask, sides)
    wide = batch.to(F64)
    z_s, z_t = truth.token_logits(wide)
    lowest = torch.finfo(dtype).min / 2
    z_t = z_t.masked_fill(z_t <= lowest, -math.inf).tolist()
    rows = []
    for s, t in zip(z_s, z_t, strict=True):
        proposed = sorted(range(60), key=lambda v: -s[v])[:10]
        proposed = [v for v in proposed if s[v] > lowest]
        rows.append(truth.plackett_luce(s[sorted(proposed, key=lambda v: -t[v])][None]))
    expected = torch.cat(rows)
    layout = kd.Layout.from_mask(batch.mask)
    value = kd.plackett_luce(batch.student, batch.teacher, 10, rows=layout).flatten()[layout.index]
    assert len(rows[0]) and truth.relative(value.detach(), expected.detach()) < (1e-12 if dtype == F64 else 0.03)
    got = truth.gradients(value.sum(), batch.student)
    exact = truth.gradients(expected.sum(), wide.student)
    for g, x in zip(got, exact, strict=True):
        assert truth.relative(g, x) < {F64: 1e-12, torch.float32: 1e-5}.get(dtype, 0.03) and g.norm() > 0


def test_the_largest_of_fewer_entries(backend):
    """statistics: what does not exist has probability 0."""
    batch = masked(fixed(bias=True), "-inf")
    found = kd.statistics(batch.student, topk=10, collision=10, rows=kd.Layout.from_mask(batch.mask))
    exact = truth.dense_logits(real(fixed(bias=True), F64).student, 6).detach().log_softmax(-1)
    log_p, ids = found.topk_log_probs[batch.mask], found.topk_indices[batch.mask]
    assert (log_p[:, 6:] == -math.inf).all()
    assert (log_p[:, :6] - exact.sort(-1, descending=True).values[batch.mask]).abs().max() < 1e-5
    assert all(set(row[:6]) == set(REAL) and len(set(row)) == 10 for row in ids.tolist())
    assert truth.relative(found.entropy[batch.mask], truth.entropy(exact)[batch.mask]) < 1e-6
    assert truth.relative(found.collision[batch.mask], (2 * exact).exp().sum(-1)[batch.mask]) < 1e-6


def test_a_teacher_of_no_entry_has_no_order(backend):
    batch = fixed(bias=True)
    hidden = batch.teacher.hidden.detach().clone()
    hidden[0, 3] = math.nan
    nothing = replace(batch.teacher, bias=torch.full((60,), -math.inf))
    spoiled = kd.plackett_luce(batch.student, replace(batch.teacher, hidden=hidden), 4)
    clean = kd.plackett_luce(batch.student, batch.teacher, 4)
    assert spoiled.isnan().sum() == 1 and spoiled[0, 3].isnan()
    assert torch.equal(spoiled[1:], clean[1:])
    assert kd.plackett_luce(batch.student, nothing, 4).isnan().all()


# ---- what the metric counts ------------------------------------------------------------------------------------------


def spoil_weight(value):
    def spoil(batch):
        weights = torch.ones(batch.mask.shape)
        weights[0, 3], weights[2, 5] = value, value
        return replace(batch, weights=weights)

    return spoil


def spoil_hidden(side):
    def spoil(batch):
        with torch.no_grad():
            for place in ((0, 3), (2, 5)):
                getattr(batch, side).hidden[place] = math.nan
        return batch

    return spoil


def mask_target(batch):
    """The student gives the targets of two tokens no probability: an infinite likelihood."""
    batch.target[batch.mask] = 1
    batch.target[0, 3] = batch.target[2, 5] = 0
    bias = batch.student.bias.detach().clone()
    bias[0] = -math.inf
    return replace(batch, student=replace(batch.student, bias=bias.requires_grad_()))


SPOILT = {
    "a NaN weight": (spoil_weight(math.nan), ("TSDKD", "GKD", "SFT", "DistiLLM2", "VCRD")),
    "an infinite weight": (spoil_weight(math.inf), ("TSDKD", "GKD", "SFT", "DistiLLM2", "VCRD")),
    "the student": (spoil_hidden("student"), ("TSDKD", "GKD", "SFT", "DistiLLM2", "VCRD")),
    "the teacher": (spoil_hidden("teacher"), ("TSDKD", "GKD", "DistiLLM2", "VCRD")),
    "the target": (mask_target, ("SFT",)),
}


@pytest.mark.parametrize(("cause", "name"), [(cause, name) for cause, (_, names) in SPOILT.items() for name in names])
def test_what_makes_a_term_not_finite_is_counted(backend, cause, name):
    make = OBJECTIVES[name][0]
    batch = SPOILT[cause][0](fixed(bias=True))
    out = run(make(), batch, **({"target": batch.target} if name == "SFT" else {}))
    assert out.metrics["nonfinite_tokens"] == 2 and not out.loss.isfinite()
    assert sum(1 for term in make().terms if not out.metrics[term].isfinite()) >= 1


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_a_bad_token_under_an_adaptive_opener(backend, side):
    """Its response counts for nothing in the window; every other response's gradient is what it is without it."""

    def outcome(spoilt: bool):
        batch = fixed(bias=True)
        if spoilt:
            with torch.no_grad():
                getattr(batch, side).hidden[2, 4] = math.nan
        opener = kd.objectives.AdaptiveOpener(edges=(-0.5, 0.0), window=1)
        out = run(kd.TSDKD(k=4, opener=opener), batch)
        return out, truth.gradients(out.loss, batch.student)[0], opener.gaps

    (_, expected, gaps), (out, got, spoilt_gaps) = outcome(False), outcome(True)
    others = [0, 1, 3, 4]
    assert torch.equal(got[others], expected[others]) and expected[others].norm() > 0
    assert out.metrics["nonfinite_tokens"] == 1 and torch.equal(gaps, spoilt_gaps) and gaps.isfinite().all()
