"""VCRD: given weights, the likelihood ratio from the same pass, and two reductions."""

from dataclasses import replace

import pytest
import torch
import truth
from batches import fixed, run
from drawn import DRAWN, FEW, SHAPES, compare
from hypothesis import given, settings
from hypothesis import strategies as st
from test_chunks import budget

import kdkernels as kd
from kdkernels import reference
from kdkernels.objectives import validity_weights

F32, F64 = torch.float32, torch.float64
OPTIONS = st.fixed_dictionaries(
    {
        "alpha": st.sampled_from([0.1, 0.5]),
        "lambda_teacher": st.sampled_from([1.0, 2.0]),
        "lambda_student": st.sampled_from([1.0, 1.5]),
        "reduction": st.sampled_from(["prompts", "responses"]),
    }
)


def of_truth(options: dict) -> dict:
    return {
        "means" if key == "reduction" else key: v == "responses" if key == "reduction" else v
        for key, v in options.items()
    }


def count(options: dict):
    return (lambda b: len(b.responses)) if options["reduction"] == "responses" else (lambda b: b.prompts)


def proposals(objective: kd.VCRD, batch: truth.Batch) -> tuple[kd.objectives.Output, torch.Tensor]:
    """The objective's output and the student's argmax [N] it saw, response by response of the batch."""
    seen, coefficients = [], objective.coefficients

    def recording(tokens):
        seen.append(tokens.argmax)
        return coefficients(tokens)

    objective.coefficients = recording
    out = run(objective, batch)
    order = sorted(range(len(batch.responses)), key=lambda i: not batch.written[i])  # the teacher's come first
    parts = torch.cat(seen).split([len(batch.responses[i]) for i in order]) if seen else []
    by_response = dict(zip(order, parts, strict=True))
    return out, torch.cat([by_response[i] for i in range(len(order))]) if seen else torch.zeros(0, dtype=torch.int64)


# ---- the worked example ----------------------------------------------------------------------------------------------

Z_S, Z_T = [2.0, 1.0, 0.0, -1.0], [0.0, 3.0, 1.0, -1.0]
SKL, SRKL = 0.762350, 0.909405


def head(*z) -> kd.Head:
    return kd.Head(torch.tensor(z)[:, None].requires_grad_(), torch.eye(4))


@pytest.mark.parametrize(
    ("z_s", "raw", "w"), [(Z_S, 0.058676, 0.5), ([1.0, 2.0, 0.0, -1.0], 1.178536, 1.085604)], ids=["clipped", "inside"]
)
def test_example_weights(backend, z_s, raw, w):
    """The student proposes token 0, then token 1."""
    z_t = torch.tensor([Z_T], dtype=F64)
    p, proposal = z_t.log_softmax(-1), int(torch.tensor(z_s).argmax())
    collision = reference.collision(z_t, 128)
    assert abs(p[0, proposal].exp() / (collision + 1e-8) - raw) < 1e-6
    assert abs(reference.likelihood_ratio(p[:, proposal], collision) - w) < 1e-6
    out = kd.VCRD(weighting="likelihood_ratio")(
        head(z_s), head(Z_T), torch.tensor([[True]]), from_teacher=torch.tensor([False])
    )
    torch.testing.assert_close(out.metrics["weight"], torch.tensor(w), rtol=0, atol=1e-6)


def test_example_loss(backend):
    """One prompt: 2 SKL on the teacher's response + 3 SRKL on the student's, at a likelihood ratio of .5."""
    mask, written = torch.tensor([[True], [True]]), torch.tensor([False, True])
    student = head(Z_S, Z_S)
    out = kd.VCRD(lambda_teacher=2.0, lambda_student=3.0, weighting="likelihood_ratio")(
        student, head(Z_T, Z_T), mask, from_teacher=written
    )
    assert int(out.count) == 1
    for name, value in (("skl", SKL), ("srkl", 1.5 * SRKL), ("loss", SKL + 1.5 * SRKL)):
        torch.testing.assert_close(out.metrics[name], torch.tensor(value), rtol=0, atol=2e-6)
    out.loss.backward()
    z_s, z_t = torch.tensor([Z_S], dtype=F64), torch.tensor([Z_T], dtype=F64)
    for row, factor, divergence in ((0, 1.5, kd.SkewReverseKL(0.1)), (1, 1.0, kd.SkewKL(0.1))):
        expected = factor * reference.divergence_gradient(z_s, z_t, divergence)
        torch.testing.assert_close(student.hidden.grad[row].double(), expected, rtol=0, atol=1e-6)


def test_collision_of_more_entries_than_128():
    z = torch.randn(3, 200, dtype=F64)
    expected = z.softmax(-1).sort(-1, descending=True).values[:, :128].square().sum(-1)
    torch.testing.assert_close(reference.collision(z, 128), expected)
    torch.testing.assert_close(reference.collision(z[:, :50], 128), z[:, :50].softmax(-1).square().sum(-1))


# ---- against dense autograd ------------------------------------------------------------------------------------------


@FEW
@given(shape=SHAPES, options=OPTIONS)
def test_likelihood_ratio(dtype, shape, options):
    def measure(small, batch):
        out, proposal = proposals(kd.VCRD(weighting="likelihood_ratio", **options), small)
        z_s = truth.token_logits(batch)[0].detach()
        if batch.responses:
            tolerance = 4 * torch.finfo(dtype).eps * max(1.0, float(z_s.abs().max()))
            short = z_s.max(-1).values - z_s.gather(-1, proposal[:, None])[:, 0]
            assert (short <= tolerance).all(), "the student's argmax"
        return out, proposal

    compare(dtype, shape, measure, lambda b, p: truth.vcrd(b, p, **of_truth(options)), count(options))


@FEW
@given(shape=SHAPES, options=OPTIONS)
def test_given_weights(dtype, shape, options):
    shape = replace(shape, weights=True)
    objective = kd.VCRD(**options)
    compare(
        dtype,
        shape,
        lambda small, _: [run(objective, small)],
        lambda b: truth.vcrd(b, **of_truth(options)),
        count(options),
    )


@settings(DRAWN, max_examples=20)
@given(shape=SHAPES, given_weights=st.booleans())
def test_it_is_the_reference(shape, given_weights):
    batch = replace(shape, weights=given_weights).batch(F64)
    if not batch.responses:
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KDKERNELS_BACKEND", "eager")
        loss = run(kd.VCRD(0.2, 2.0, 1.5, "given" if given_weights else "likelihood_ratio"), batch).loss
    z_s, z_t = truth.token_logits(batch)
    parts, w = truth.slices(batch), truth.token_weights(batch, z_s)
    weights = [w[r] for r in parts] if given_weights else None
    expected = reference.vcrd([z_s[r] for r in parts], [z_t[r] for r in parts], batch.written, weights, 0.2, 2.0, 1.5)
    assert abs(loss - expected) <= 1e-12 * abs(expected)
    for got, exact in zip(truth.gradients(loss, batch.student), truth.gradients(expected, batch.student), strict=True):
        assert truth.relative(got, exact) < 1e-10


# ---- who wrote what --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weighting", ["likelihood_ratio", "uniform"])
def test_rows_in_any_order(backend, weighting):
    """Responses of one author need not be neighbours: loss and every row's gradient go with the row."""
    batch = fixed()
    order = torch.tensor([4, 2, 0, 3, 1])
    other = replace(
        batch, student=replace(batch.student, hidden=batch.student.hidden.detach()[order].requires_grad_()),
        teacher=replace(batch.teacher, hidden=batch.teacher.hidden[order]), mask=batch.mask[order],
        from_teacher=batch.from_teacher[order],
    )  # fmt: skip
    first, second = (run(kd.VCRD(weighting=weighting), each) for each in (batch, other))
    torch.testing.assert_close(first.loss, second.loss)
    d_first, d_second = (truth.gradients(o.loss, b.student)[0] for o, b in ((first, batch), (second, other)))
    assert truth.relative(d_second, d_first[order]) < 1e-6
    flipped = replace(batch, from_teacher=~batch.from_teacher)
    assert abs(run(kd.VCRD(weighting=weighting), flipped).loss - first.loss) > 0.001 * first.loss


@pytest.mark.parametrize("tokens", [1, 2, 7])
def test_the_change_of_author_inside_a_chunk(backend, tokens):
    """One row per author, chunks and teacher sub-chunks of all sizes around the border."""
    batch = fixed(F32, (6, 9, 4), longest=9)
    batch.from_teacher = torch.tensor([False, True, True])
    make = lambda: kd.VCRD(weighting="uniform")  # noqa: E731
    expected = run(make(), batch)
    got = run(make(), batch, memory_budget=budget(make, batch, tokens))
    for name in ("skl", "srkl"):
        torch.testing.assert_close(got.metrics[name], expected.metrics[name])
    pairs = zip(truth.gradients(got.loss, batch.student), truth.gradients(expected.loss, batch.student), strict=True)
    assert all(truth.relative(g, e) < 1e-6 for g, e in pairs)


def test_prompts_are_the_responses_of_the_busier_author():
    objective, mask = kd.VCRD(), torch.ones(5, 2, dtype=torch.bool)
    layout = kd.Layout.from_mask(mask)
    written = torch.tensor([True, True, True, False, False])
    assert objective.count(layout, written) == objective.count(layout, ~written) == 3
    mask[0] = False  # an empty response is none
    assert objective.count(kd.Layout.from_mask(mask), written) == 2
    assert kd.VCRD(reduction="responses").count(layout, written) == 5


def test_packed_rows(backend):
    """Two responses in a row have the row's author."""
    batch = fixed(lengths=(4, 6), longest=6)
    batch.from_teacher = torch.tensor([False, True])
    ids = batch.mask * torch.tensor([1, 1, 1, 1, 2, 2, 2, 2])
    packed = replace(batch, mask=kd.Layout.from_segments(ids))
    first, second = (run(kd.VCRD(weighting="likelihood_ratio"), each) for each in (batch, packed))
    assert int(first.count) == 1 and int(second.count) == 2
    torch.testing.assert_close(first.loss, 2 * second.loss)


def test_weights_and_likelihood_ratio_multiply(backend):
    batch = fixed(weights=True)
    out = run(kd.VCRD(weighting="likelihood_ratio"), batch)
    z_s, z_t = truth.token_logits(batch.to(F64))
    w = truth.vcrd_weight(z_t, z_s.argmax(-1)) * truth.token_weights(batch, z_s)
    torch.testing.assert_close(out.metrics["weight"].double(), w.double().mean(), rtol=1e-5, atol=0)
    assert out.metrics.keys() == {
        "loss", "skl", "srkl", "weight", "student_entropy", "teacher_entropy", "argmax_agreement", "nonfinite_tokens"
    }  # fmt: skip


# ---- a judge's scores ------------------------------------------------------------------------------------------------


def test_validity_weights():
    r_s, r_t = torch.tensor([0.6, 0.2, 0.5, 0.0]), torch.tensor([0.3, 0.8, 0.5, 0.0])
    expected = {
        "ratio": [2.0, 0.25, 1.0, 0.0],
        "clamped_ratio": [1.0, 0.25, 1.0, 0.0],
        "difference": [0.3, -0.6, 0.0, 0.0],
        "student": [0.6, 0.2, 0.5, 0.0],
        "uniform": [1.0, 1.0, 1.0, 1.0],
    }
    for divergence, w in expected.items():
        torch.testing.assert_close(validity_weights(r_s, r_t, divergence), torch.tensor(w), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(validity_weights(r_s, r_t), torch.tensor(expected["ratio"]))
    assert not validity_weights(r_s.requires_grad_(), r_t).requires_grad


def test_uniform_weights_are_given_ones(backend):
    batch = fixed()
    ones = replace(batch, weights=torch.ones(batch.mask.shape))
    assert torch.equal(run(kd.VCRD(weighting="uniform"), batch).loss, run(kd.VCRD(), ones).loss)
