"""TSD-KD, GKD and SFT against dense autograd on random ragged batches, in fp64, fp32 and bf16."""

from dataclasses import replace

import pytest
import torch
import truth
from batches import OBJECTIVES, fixed, loss_of, run
from drawn import DRAWN, SHAPES, compare
from hypothesis import given
from hypothesis import strategies as st
from selections import Recorder, assert_within_rounding

import kdkernels as kd
from kdkernels import reference

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16

OPTIONS = st.fixed_dictionaries(
    {
        "beta": st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]),
        "tau": st.sampled_from([0.5, 1.0]),
        "k": st.integers(2, 12),
        "opener": st.sampled_from([0.0, 0.1, 0.5, 1.0]),
        "entropy_ratio": st.sampled_from([0.0, 0.1, 0.4, 1.0]),
        "indirect_weight": st.sampled_from([0.0, 0.1]),
        "direct_weight": st.sampled_from([1.0, 3.0]),
        "entropy_weight": st.sampled_from([0.3, 1.0]),
        "temperature": st.sampled_from([1.0, 0.7]),
    }
)


def of_terms(options: dict) -> dict:
    """The options of truth.tsd_kd: what is left once everything is selected."""
    return {key: v for key, v in options.items() if key not in ("k", "opener", "entropy_ratio")}


# ---- against dense autograd ------------------------------------------------------------------------------------------


@DRAWN
@given(shape=SHAPES, options=OPTIONS)
def test_tsd_kd(dtype, shape, options):
    def measure(small, batch):
        objective = kd.TSDKD(**options)
        with pytest.MonkeyPatch.context() as patch:
            recorder = Recorder(patch, objective)
            out = run(objective, small)
        if not batch.responses:
            return out, None
        selection = recorder.selection()
        z_s, z_t = truth.token_logits(batch)
        tolerance = 4 * torch.finfo(dtype).eps * max(1.0, float(z_s.detach().abs().max()), float(z_t.abs().max()))
        assert_within_rounding(batch, selection, options["opener"], options["entropy_ratio"], tolerance)
        return out, selection

    compare(dtype, shape, measure, lambda b, chosen: sum(truth.tsd_kd(b, chosen, **of_terms(options)).values()))


@DRAWN
@given(shape=SHAPES, beta=st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]), temperature=st.sampled_from([1.0, 0.7]))
def test_gkd(dtype, shape, beta, temperature):
    objective = kd.GKD(beta, temperature)
    compare(dtype, shape, lambda small, _: [run(objective, small)], lambda b: truth.gkd(b, beta, temperature))


@DRAWN
@given(shape=SHAPES)
def test_sft(dtype, shape):
    def measure(small, batch):
        return [run(kd.SFT(), small, target=small.target)]

    compare(dtype, shape, measure, truth.sft, count=lambda batch: sum(map(len, batch.responses)))


@DRAWN
@given(shape=SHAPES, options=OPTIONS)
def test_tsd_kd_is_the_reference(shape, options):
    """In fp64 nothing is fed: selection included, the engine computes what reference.py says."""
    batch = replace(shape, weights=False).batch(F64)
    if not batch.responses:
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KDKERNELS_BACKEND", "eager")
        loss = run(kd.TSDKD(**options), batch).loss
    z_s, z_t = truth.token_logits(batch)
    parts = truth.slices(batch)
    options = {"opener_share" if key == "opener" else key: v for key, v in options.items()}
    expected = reference.tsd_kd([z_s[r] for r in parts], [z_t[r] for r in parts], **options)
    assert abs(loss - expected) <= 1e-12 * abs(expected)
    for got, exact in zip(truth.gradients(loss, batch.student), truth.gradients(expected, batch.student), strict=True):
        assert truth.relative(got, exact) < 1e-10


# ---- metrics ---------------------------------------------------------------------------------------------------------


def test_metrics_of_tsd_kd(backend):
    batch = fixed(weights=True)
    objective = kd.TSDKD(k=4, opener=0.4, tau=0.5, entropy_ratio=0.3)
    with pytest.MonkeyPatch.context() as patch:
        recorder = Recorder(patch, objective)
        out = run(objective, batch, target=batch.target)
    exact = batch.to(F64)
    terms = truth.tsd_kd(exact, recorder.selection(), tau=0.5)
    assert int(out.count) == 4
    z_s, z_t = (z.detach() for z in truth.token_logits(exact))
    h_s, h_t = truth.entropy(z_s), truth.entropy(z_t)
    target = batch.target.flatten()[torch.tensor([i for r in batch.responses for i in r])]
    expected = {
        **terms,
        "loss": sum(terms.values()),
        "gate": torch.sigmoid((h_s - h_t) / 0.5).mean(),
        "student_entropy": h_s.mean(),
        "teacher_entropy": h_t.mean(),
        "opener_share": recorder.selection().opener.double().mean(),
        "argmax_agreement": (z_s.argmax(-1) == z_t.argmax(-1)).double().mean(),
        "cross_entropy": truth.cross_entropy(z_s, target).mean(),
        "nonfinite_tokens": torch.tensor(0),
    }
    assert out.metrics.keys() == expected.keys()
    for key, value in expected.items():
        got = out.metrics[key]
        assert got.shape == () and not got.requires_grad, key
        torch.testing.assert_close(got.double(), value.detach().double(), rtol=1e-5, atol=1e-6, msg=key)
    parts = sum(out.metrics[key] for key in ("direct", "indirect", "entropy_minimisation"))
    torch.testing.assert_close(parts, out.metrics["loss"])
    torch.testing.assert_close(out.metrics["loss"], out.loss.detach())


def test_metrics_of_gkd_and_sft(backend):
    batch = fixed()
    gkd, sft = run(kd.GKD(), batch), run(kd.SFT(), batch, target=batch.target)
    torch.testing.assert_close(gkd.metrics["direct"], gkd.loss.detach())
    torch.testing.assert_close(sft.metrics["cross_entropy"], sft.loss.detach())
    assert gkd.metrics.keys() == {
        "loss", "direct", "student_entropy", "teacher_entropy", "argmax_agreement", "nonfinite_tokens"
    }  # fmt: skip
    assert sft.metrics.keys() == {"loss", "cross_entropy", "student_entropy", "nonfinite_tokens"}
    assert int(gkd.count) == 4 and int(sft.count) == 18


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("make", OBJECTIVES)
def test_metrics_have_no_graph(make, dtype):
    batch = fixed(dtype)
    out = run(make(), batch, target=batch.target)
    assert out.loss.requires_grad and out.metrics
    assert [name for name, metric in out.metrics.items() if metric.requires_grad] == []


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("make", OBJECTIVES)
def test_a_loss_that_is_scaled_in_place_leaves_the_metrics(make, dtype):
    """As transformers' Trainer scales what a loss function returns."""
    batch = fixed(dtype)
    out = run(make(), batch, target=batch.target)
    before = {name: metric.clone() for name, metric in out.metrics.items()}
    out.loss.mul_(4)
    assert before["loss"] > 0 and all(torch.equal(out.metrics[name], each) for name, each in before.items())


# ---- what is read and what is not ------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", OBJECTIVES)
def test_positions_outside_the_mask_do_not_exist(backend, make):
    batch = fixed(bias=True, padding_s=5, padding_t=7)
    expected = truth.gradients(loss_of(make, batch), batch.student)
    with torch.no_grad():
        batch.student.hidden[~batch.mask] = float("nan")
        batch.teacher.hidden[~batch.mask] = float("nan")
        batch.target[~batch.mask] = -100
        for head in (batch.student, batch.teacher):  # padded entries
            head.weight[head.vocabulary :] = float("nan")
            head.bias[head.vocabulary :] = float("nan")
    got = truth.gradients(loss_of(make, batch), batch.student)
    for g, e in zip(got, expected, strict=True):
        assert torch.equal(g, e)
    d_hidden, d_weight, d_bias = got
    assert (d_hidden[~batch.mask] == 0).all() and (d_hidden[batch.mask].abs().sum(-1) > 0).any()
    assert (d_weight[60:] == 0).all() and (d_bias[60:] == 0).all() and d_weight.norm() > 0


@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize("make", [each for each in OBJECTIVES if each.id != "SFT"])
def test_a_bad_token_spoils_only_its_own_response(backend, make, side):
    batch = fixed()
    expected = truth.gradients(loss_of(make, batch), batch.student)[0]
    with torch.no_grad():
        getattr(batch, side).hidden[2, 4] = float("nan")
    out = run(make(), batch)
    got = truth.gradients(out.loss, batch.student)[0]
    others = [0, 1, 3, 4]
    assert torch.equal(got[others], expected[others]) and expected[others].norm() > 0
    assert not got[2, 4].isfinite().all() and not out.loss.isfinite()
    assert int(out.metrics["nonfinite_tokens"]) == 1


@pytest.mark.parametrize("make", OBJECTIVES)
@pytest.mark.parametrize("rows", [0, 3])
def test_a_batch_without_tokens(backend, make, rows):
    batch = fixed(lengths=(0,) * rows, bias=True, longest=4)
    objective = make()
    out = run(objective, batch, **({"target": batch.target} if objective.needs_target else {}))
    assert out.loss == 0 and int(out.count) == 0
    out.loss.backward()
    for leaf in truth.leaves(batch.student):
        assert leaf.grad is not None and leaf.grad.shape == leaf.shape and (leaf.grad == 0).all()


def test_the_teacher_gets_no_gradient(backend):
    batch = fixed()
    batch.teacher.hidden.requires_grad_()
    batch.teacher.weight.requires_grad_()
    run(kd.TSDKD(k=4), batch).loss.backward()
    assert batch.teacher.hidden.grad is None and batch.teacher.weight.grad is None
    assert batch.student.weight.grad.norm() > 0


@pytest.mark.parametrize("make", OBJECTIVES)
def test_the_default_dtype_and_device_do_not_matter(backend, make):
    batch = fixed(weights=True)
    expected = truth.gradients(loss_of(make, batch), batch.student)
    try:
        torch.set_default_dtype(BF16)
        with torch.device("meta"):
            loss = loss_of(make, batch)
        got = truth.gradients(loss, batch.student)
    finally:
        torch.set_default_dtype(F32)
    assert all(torch.equal(g, e) for g, e in zip(got, expected, strict=True))


@pytest.mark.parametrize("make", OBJECTIVES)
def test_tensors_of_any_layout_in_memory(backend, make):
    """Strided hidden states and a computed, transposed weight: the numbers of their contiguous copies."""
    batch = fixed()
    expected = truth.gradients(loss_of(make, batch), batch.student)
    hidden = torch.stack([batch.student.hidden, batch.student.hidden], dim=-1).detach()[..., 0].requires_grad_()
    base = batch.student.weight.detach().t().contiguous().requires_grad_()
    assert not hidden.is_contiguous() and not base.t().is_contiguous()
    batch.student = replace(batch.student, hidden=hidden, weight=base.t())
    d_hidden, d_base = torch.autograd.grad(loss_of(make, batch), (hidden, base))
    assert truth.relative(d_hidden, expected[0]) < 1e-6
    assert truth.relative(d_base.t(), expected[1]) < 1e-6


def test_float16_operands_with_float32_logits():
    """The logits' dtype and the gradient's may differ."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(2, 5, 8).half().requires_grad_(), torch.randn(11, 8).half().requires_grad_()
    target, mask = torch.randint(0, 11, (2, 5)), torch.ones(2, 5, dtype=torch.bool)
    kd.SFT()(kd.Head(hidden, weight), None, mask, target=target, logits_dtype=torch.float32).loss.backward()
    wide = [t.detach().double().requires_grad_() for t in (hidden, weight)]
    torch.nn.functional.cross_entropy((wide[0] @ wide[1].t()).flatten(0, 1), target.flatten()).backward()
    for ours, truth_ in zip((hidden, weight), wide, strict=True):
        assert (ours.grad.double() - truth_.grad).norm() < 2e-3 * truth_.grad.norm()


def test_teacher_mask_pairs_sequences():
    """Responses of equal length in other rows are other responses."""
    student, teacher = (kd.Head(torch.randn(2, 5, 4), torch.randn(7, 4)) for _ in range(2))
    first, second = torch.zeros(2, 2, 5, dtype=torch.bool)
    first[0, :3] = second[1, :3] = True
    with pytest.raises(ValueError, match="teacher_mask"):
        kd.GKD()(student, teacher, first, teacher_mask=second)


@pytest.mark.parametrize(
    "objective",
    [kd.GKD(beta=0.5), kd.TSDKD(k=3), kd.SFT(), kd.VCRD(weighting="likelihood_ratio"), kd.DistiLLM2()],
    ids=lambda one: type(one).__name__,
)
def test_the_metrics_of_two_batches_become_those_of_both_as_they_declare(objective):
    """Batches of different counts and tokens: no two ways to reduce give the same."""
    generator = torch.Generator().manual_seed(5)
    hidden = [torch.randn(5, 7, 8, generator=generator) for _ in range(2)]
    weights = [torch.randn(30, 8, generator=generator) for _ in range(2)]
    mask = torch.arange(7) < torch.tensor([2, 6, 1, 7, 3])[:, None]
    target, author = torch.randint(0, 30, (5, 7), generator=generator), torch.tensor([1, 0, 0, 1, 0]).bool()

    def outputs(rows):
        student, teacher = (kd.Head(each[rows], weight) for each, weight in zip(hidden, weights, strict=True))
        layout, by = kd.Layout.from_mask(mask[rows]), author[rows] if objective.by_author else None
        out = objective(
            student, teacher if objective.needs_teacher else None, layout, target=target[rows], from_teacher=by
        )
        return out, {"count": objective.count(layout, by), "tokens": len(layout)}

    (whole, sizes), *parts = (outputs(rows) for rows in (slice(0, 5), slice(0, 2), slice(2, 5)))
    assert len(whole.metrics) > 3
    for name, value in whole.metrics.items():
        way = objective.metric_reduction(name)
        factors = [1 if way == "sum" else size[way] / sizes[way] for _, size in parts]
        reduced = sum(out.metrics[name] * factor for (out, _), factor in zip(parts, factors, strict=True))
        torch.testing.assert_close(reduced.to(value.dtype), value, rtol=1e-5, atol=1e-6)
