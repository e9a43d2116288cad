"""DistiLLM-2: SKL on the teacher's responses, SRKL on the student's, and the variant with a detached mixture."""

from dataclasses import replace

import pytest
import torch
import truth
from batches import fixed, run
from drawn import DRAWN, FEW, SHAPES, compare
from hypothesis import given, settings
from hypothesis import strategies as st

import kdkernels as kd
from kdkernels import reference

F64 = torch.float64
ALPHAS = st.sampled_from([0.0, 0.1, 0.5])


@FEW
@given(shape=SHAPES, alpha_teacher=ALPHAS, alpha_student=ALPHAS, detach=st.booleans())
def test_against_dense_autograd(dtype, shape, alpha_teacher, alpha_student, detach):
    options = (alpha_teacher, alpha_student, detach)
    objective = kd.DistiLLM2(*options)
    compare(dtype, shape, lambda small, _: [run(objective, small)], lambda b: truth.distillm2(b, *options))


@settings(DRAWN, max_examples=20)
@given(shape=SHAPES, detach=st.booleans())
def test_it_is_the_reference(shape, detach):
    batch = replace(shape, weights=False).batch(F64)
    if not batch.responses:
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KDKERNELS_BACKEND", "eager")
        loss = run(kd.DistiLLM2(0.2, 0.3, detach), batch).loss
    z_s, z_t = truth.token_logits(batch)
    parts = truth.slices(batch)
    expected = reference.distillm2([z_s[r] for r in parts], [z_t[r] for r in parts], batch.written, 0.2, 0.3, detach)
    assert abs(loss - expected) <= 1e-12 * abs(expected)
    for got, exact in zip(truth.gradients(loss, batch.student), truth.gradients(expected, batch.student), strict=True):
        assert truth.relative(got, exact) < 1e-10


def test_a_detached_mixture_changes_the_gradient_only(backend):
    batch = fixed()
    batch.from_teacher = torch.zeros(5, dtype=torch.bool)
    plain, detached = (run(kd.DistiLLM2(detach_mixture=each), batch).loss for each in (False, True))
    assert torch.equal(plain, detached)
    d_plain, d_detached = (truth.gradients(loss, batch.student)[0] for loss in (plain, detached))
    assert truth.relative(d_detached, d_plain) > 0.01


def test_the_gradient_of_a_detached_mixture():
    """q (log(q/m) - KL(q || m)): what autograd says of a mixture behind a stop-gradient."""
    torch.manual_seed(0)
    z_s, z_t = (2 * torch.randn(3, 7, dtype=F64) for _ in range(2))
    z_s.requires_grad_()
    divergence = kd.SkewReverseKL(0.1, detach=True)
    q, p = z_s.softmax(-1), z_t.softmax(-1)
    log_ratio = (q / (0.9 * p + 0.1 * q)).log().detach()
    expected = (q * (log_ratio - (q * log_ratio).sum(-1, keepdim=True))).detach()
    (by_autograd,) = torch.autograd.grad(reference.divergence(z_s, z_t, divergence).sum(), z_s)
    torch.testing.assert_close(by_autograd, expected)
    torch.testing.assert_close(reference.divergence_gradient(z_s.detach(), z_t, divergence), expected)
    assert divergence.skew == 0 and kd.SkewReverseKL(0.1).skew != 0


def test_a_detached_mixture_of_single_tokens(backend):
    """kd.divergence knows it too."""
    batch = fixed()
    divergence = kd.SkewReverseKL(0.1, detach=True)
    d_hidden, d_weight = truth.gradients(kd.divergence(batch.student, batch.teacher, divergence).sum(), batch.student)
    exact = batch.to(F64)
    z_s, z_t = (truth.dense_logits(head, 60).flatten(0, 1) for head in (exact.student, exact.teacher))
    expected = truth.gradients(reference.divergence(z_s, z_t, divergence).sum(), exact.student)
    assert truth.relative(d_hidden, expected[0]) < 1e-6 and truth.relative(d_weight, expected[1]) < 1e-6


def test_a_teacher_known_at_all_its_entries_is_the_teacher(backend):
    """kd.TopK with K = V: both authors, whose border cuts the stored entries too."""
    batch = fixed()
    expected = run(kd.DistiLLM2(), batch)
    log_p = truth.dense_logits(batch.teacher, 60).detach().log_softmax(-1)
    stored = kd.TopK(torch.arange(60).expand(log_p.shape).contiguous(), log_p)
    got = kd.DistiLLM2()(batch.student, stored, batch.mask, from_teacher=batch.from_teacher)
    torch.testing.assert_close(got.loss, expected.loss)
    pairs = zip(truth.gradients(got.loss, batch.student), truth.gradients(expected.loss, batch.student), strict=True)
    assert all(truth.relative(g, e) < 1e-5 for g, e in pairs)


@pytest.mark.parametrize("written", [False, True])
def test_one_author_alone(backend, written):
    """Then it is the mean of one divergence, and the other term is 0."""
    batch = fixed()
    batch.from_teacher = torch.full((5,), written)
    out = run(kd.DistiLLM2(), batch)
    divergence, present, absent = (kd.SkewKL(0.1), "skl", "srkl") if written else (kd.SkewReverseKL(0.1), "srkl", "skl")
    values = kd.divergence(batch.student, batch.teacher, divergence).flatten()
    expected = torch.stack([values[r].mean() for r in batch.responses]).mean()
    torch.testing.assert_close(out.loss, expected)
    assert out.metrics[absent] == 0 and out.metrics[present] == out.loss
    pairs = zip(truth.gradients(out.loss, batch.student), truth.gradients(expected, batch.student), strict=True)
    assert all(truth.relative(g, e) < 1e-6 for g, e in pairs)


def test_metrics(backend):
    batch = fixed(weights=True)
    out = run(kd.DistiLLM2(), batch, target=batch.target)
    exact = batch.to(F64)
    values = truth.by_author(exact, 0.1, 0.1)
    w = truth.token_weights(exact, torch.cat(values))
    means = torch.stack([(w[r] * d).mean() for r, d in zip(truth.slices(exact), values, strict=True)]).detach()
    written = torch.tensor(batch.written)
    assert 0 < written.sum() < 4 and int(out.count) == 4
    torch.testing.assert_close(out.metrics["skl"].double(), means[written].sum() / 4, rtol=1e-5, atol=0)
    torch.testing.assert_close(out.metrics["srkl"].double(), means[~written].sum() / 4, rtol=1e-5, atol=0)
    torch.testing.assert_close(out.metrics["skl"] + out.metrics["srkl"], out.loss.detach())
    assert out.metrics.keys() == {
        "loss", "skl", "srkl", "student_entropy", "teacher_entropy", "argmax_agreement", "cross_entropy",
        "nonfinite_tokens",
    }  # fmt: skip
