"""An objective called as other libraries' fused linear losses are: against full logits, and against Liger's number."""

import pytest
import torch
import truth
from batches import fixed
from test_reduction import CASES, LENGTHS, OBJECTIVES, assert_equal, dense

import kdkernels as kd

F64 = torch.float64


def arguments(batch: truth.Batch, objective) -> tuple:
    """The six positional ones and the biases; positions outside the mask are ignored."""
    student, teacher = batch.student, batch.teacher
    labels = batch.target.masked_fill(~batch.mask, -100)
    sides = [teacher.hidden, teacher.weight, teacher.bias] if objective.needs_teacher else [None] * 3
    return student.hidden, student.weight, *sides[:2], labels, student.bias, sides[2]


@pytest.mark.parametrize(("name", "reduction"), CASES)
def test_responses_in_rows(name, reduction):
    """The last response of a row may reach its end: labels are shifted already."""
    batch, objective = fixed(F64, LENGTHS, longest=7, bias=True), OBJECTIVES[name][0](reduction=reduction)
    assert batch.mask[2, -1]
    authors = {"from_teacher": batch.from_teacher} if objective.by_author else {}
    loss = kd.FusedLinearDistillationLoss(objective)(*arguments(batch, objective), **authors)
    assert loss.shape == ()
    assert_equal(loss, batch, dense(name, reduction, batch), batch)


@pytest.mark.parametrize("reduction", ["tokens", "sum"])
@pytest.mark.parametrize("name", ["GKD", "SFT", "Plain"])
def test_positions_in_one_line(name, reduction):
    batch, objective = fixed(F64, LENGTHS, bias=True), OBJECTIVES[name][0](reduction=reduction)
    x, w, x_t, w_t, labels, *biases = arguments(batch, objective)
    flat = [None if each is None else each.flatten(0, 1) for each in (x, x_t, labels)]
    flat[2] = flat[2].int()
    loss = kd.FusedLinearDistillationLoss(objective)(flat[0], w, flat[1], w_t, flat[2], *biases, denominator=36)
    assert_equal(loss, batch, dense(name, "sum", batch) / 36, batch)


def test_weights_and_a_label_that_is_ignored():
    batch = fixed(F64, LENGTHS, weights=True)
    loss = kd.FusedLinearDistillationLoss(kd.GKD(), ignore_index=0)
    x, w, x_t, w_t, labels, *_ = arguments(batch, loss.objective)
    batch.target = labels.masked_fill(labels == -100, 0)
    batch.mask = batch.target != 0
    expected = kd.GKD()(batch.student, batch.teacher, kd.Layout.from_segments(_runs(batch.mask)), weights=batch.weights)
    got = loss(x, w, x_t, w_t, batch.target, weights=batch.weights)
    assert_equal(got, batch, expected.loss, batch)


def _runs(mask):
    return mask * (mask & ~torch.nn.functional.pad(mask, (1, 0))[:, :-1]).cumsum(1)


def test_padded_vocabularies():
    """The student's head is padded, the teacher's more."""
    batch = fixed(F64, LENGTHS, padding_s=4, padding_t=9)
    objective = kd.GKD(reduction="tokens")
    with pytest.raises(ValueError, match="vocab"):
        kd.FusedLinearDistillationLoss(objective, vocab_size=65)(*arguments(batch, objective))
    loss = kd.FusedLinearDistillationLoss(objective, vocab_size=60)(*arguments(batch, objective))
    assert_equal(loss, batch, dense("GKD", "tokens", batch), batch)


def test_no_label_that_counts():
    batch = fixed(F64, LENGTHS)
    x, w, x_t, w_t, labels, *_ = arguments(batch, kd.GKD())
    loss = kd.FusedLinearDistillationLoss(kd.GKD(reduction="tokens"))(x, w, x_t, w_t, labels.fill_(-100))
    assert loss == 0 and all((g == 0).all() for g in truth.gradients(loss, batch.student))


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_number_of_liger(beta, temperature):
    """Values and gradients; the same arguments by the same names."""
    liger = pytest.importorskip("liger_kernel.chunked_loss")
    batch, objective = fixed(F64, LENGTHS, bias=True), kd.GKD(beta, temperature, reduction="tokens")
    theirs = liger.LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0, weight_soft_loss=1.0, beta=beta, temperature=temperature, compiled=False
    )
    names = ("student_input", "student_weight", "teacher_input", "teacher_weight", "true_labels")
    named = dict(zip((*names, "student_bias", "teacher_bias"), arguments(batch, objective), strict=True))
    flat = {
        name: each.flatten(0, 1) if name.endswith("input") or name == "true_labels" else each
        for name, each in named.items()
    }
    for given in (named, flat):
        assert_equal(kd.FusedLinearDistillationLoss(objective)(**given), batch, theirs(**flat), batch, 1e-6)


WRONG = {
    "an objective's class": (lambda x, y: kd.FusedLinearDistillationLoss(kd.GKD), TypeError, "objective: expected one"),
    "a mean over responses": (
        lambda x, y: call(kd.GKD(), x.flatten(0, 1), y.flatten()), ValueError,
        r"student_input: a mean over responses .* expected \[B, L, H\], or GKD\(reduction='tokens'\), got \[N, H\]",
    ),
    "a selection": (
        lambda x, y: call(kd.TSDKD(k=2, reduction="tokens"), x.flatten(0, 1), y.flatten()), ValueError,
        r"student_input: TSDKD selects within responses; expected \[B, L, H\], got \[N, H\]",
    ),
    "authors": (
        lambda x, y: call(kd.DistiLLM2(reduction="tokens"), x.flatten(0, 1), y.flatten()), ValueError,
        r"student_input: DistiLLM2 needs to know who wrote a sequence; expected \[B, L, H\], got \[N, H\]",
    ),
    "four dimensions": (lambda x, y: call(kd.GKD(), x[None], y[None]), ValueError, r"student_input: .*\[1, 2, 3, 4\]"),
    "one dimension": (lambda x, y: call(kd.GKD(), x[0, 0], y[0, 0]), ValueError, r"student_input: .* got \[4\]"),
    "labels of another shape": (
        lambda x, y: call(kd.GKD(), x, y[:, 1:]), ValueError, r"true_labels: .* \[2, 3\], got \[2, 2\]"
    ),
    "labels in one line": (
        lambda x, y: call(kd.GKD(), x, y.flatten()), ValueError, r"true_labels: .* \[2, 3\], got \[6\]"
    ),
    "no labels": (lambda x, y: call(kd.GKD(), x, None), ValueError, r"true_labels: .*, got NoneType"),
    "labels of floats": (lambda x, y: call(kd.GKD(), x, y.float()), TypeError, "true_labels: .* got torch.float32"),
    "labels without a sign": (
        lambda x, y: call(kd.GKD(), x, y.to(torch.uint8)), TypeError, "true_labels: .* got torch.uint8"
    ),
    "a vocabulary of floats": (
        lambda x, y: kd.FusedLinearDistillationLoss(kd.GKD(), vocab_size=7.0), TypeError, "vocab_size: .* got 7.0"
    ),
    "no vocabulary": (
        lambda x, y: kd.FusedLinearDistillationLoss(kd.GKD(), vocab_size=0), ValueError, "vocab_size: .* got 0"
    ),
    "what to ignore": (
        lambda x, y: kd.FusedLinearDistillationLoss(kd.GKD(), ignore_index=1.5), TypeError, "ignore_index: .* got 1.5"
    ),
    "no teacher": (
        lambda x, y: kd.FusedLinearDistillationLoss(kd.GKD())(x, x[0], None, None, y), TypeError, "teacher: expected"
    ),
    "half a teacher": (
        lambda x, y: kd.FusedLinearDistillationLoss(kd.GKD())(x, x[0], x, None, y), TypeError, "weight: expected"
    ),
    "a superfluous teacher": (lambda x, y: call(kd.SFT(), x, y), TypeError, "teacher: SFT has none"),
}  # fmt: skip


def call(objective, x, y):
    weight = torch.randn(7, x.shape[-1])
    return kd.FusedLinearDistillationLoss(objective)(x, weight, x, weight, y)


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_named(name):
    make, error, message = WRONG[name]
    with pytest.raises(error, match=f"^{message}"):
        make(torch.randn(2, 3, 4), torch.randint(0, 7, (2, 3)))
