"""What the engine does not accept: each error names the argument, what was expected and what came."""

import math

import pytest
import torch
from batches import fixed, run

import kdkernels as kd
from kdkernels.engine import operators
from kdkernels.objectives import base, validity_weights

MASK = torch.ones(2, 5, dtype=torch.bool)
INF = math.inf
TARGET = torch.zeros(2, 5, dtype=torch.int64)
VCRD = kd.VCRD(weighting="uniform")


def head(shape=(2, 5), hidden=4, vocabulary=20, dtype=torch.float32, device="cpu", **more) -> kd.Head:
    return kd.Head(
        torch.randn(*shape, hidden).to(device, dtype), torch.randn(vocabulary, hidden).to(device, dtype), **more
    )  # fmt: skip


def tsd(student=None, teacher=None, mask=MASK, objective=None, **more):
    return (objective or kd.TSDKD(k=3))(
        head() if student is None else student, head() if teacher is None else teacher, mask, **more
    )


def sft(mask=MASK, **more):
    return kd.SFT()(head(), None, mask, **{"target": TARGET, **more})


BAD_CALLS = {
    # heads
    "student is a tensor": (lambda: tsd(torch.zeros(2, 5, 4)), TypeError, ["student", "kd.Head", "Tensor"]),
    "teacher missing": (lambda: kd.GKD()(head(), None, MASK), TypeError, ["teacher", "kd.Head", "NoneType"]),
    "teacher of SFT": (lambda: kd.SFT()(head(), head(), MASK, target=TARGET), TypeError, ["teacher", "SFT", "Head"]),
    "teacher's dtype": (lambda: tsd(teacher=head(dtype=torch.float64)), TypeError, ["teacher", "float32", "float64"]),
    "teacher's device": (lambda: tsd(teacher=head(device="meta")), ValueError, ["teacher", "cpu", "meta"]),
    "teacher's shape": (lambda: tsd(teacher=head((2, 6))), ValueError, ["teacher", "[2, 5, 'H']", "[2, 6, 4]"]),
    "teacher's vocabulary": (
        lambda: tsd(teacher=head(vocabulary=19)), ValueError, ["teacher", "20", "19", "vocab_size"],
    ),
    "teacher's real vocabulary": (
        lambda: tsd(head(vocab_size=18), head(vocabulary=30, vocab_size=17)), ValueError, ["teacher", "18", "17"],
    ),
    # masks
    "mask of floats": (lambda: tsd(mask=torch.ones(2, 5)), TypeError, ["mask", "bool", "float32"]),
    "mask of integers": (lambda: tsd(mask=TARGET), TypeError, ["mask", "bool", "int64"]),
    "mask is a list": (lambda: tsd(mask=[[True] * 5] * 2), TypeError, ["mask", "bool", "list"]),
    "mask's rank": (lambda: tsd(mask=MASK[0]), ValueError, ["mask", "[B, L]", "[5]"]),
    "mask's shape": (lambda: tsd(mask=MASK[:, :4]), ValueError, ["mask", "[2, 5]", "[2, 4]"]),
    "layout's shape": (lambda: tsd(mask=kd.Layout.from_mask(MASK[:1])), ValueError, ["mask", "[2, 5]", "[1, 5]"]),
    "hidden states without a batch": (lambda: tsd(head((10,)), head((10,))), ValueError, ["mask", "[10]", "[2, 5]"]),
    "teacher_mask's shape": (lambda: tsd(teacher_mask=MASK[:, :4]), ValueError, ["teacher_mask", "[2, 5]", "[2, 4]"]),
    "teacher_mask's tokens": (lambda: tsd(teacher_mask=MASK.tril(3)), ValueError, ["teacher_mask", "[5, 5]", "[4, 5]"]),
    "teacher_mask of SFT": (lambda: sft(teacher_mask=MASK), TypeError, ["teacher_mask", "SFT", "None"]),
    # per-token inputs
    "target missing": (lambda: sft(target=None), TypeError, ["target", "SFT", "None"]),
    "target's dtype": (lambda: sft(target=TARGET.to(torch.uint32)), TypeError, ["target", "int64 or int32", "uint32"]),
    "a bool target": (lambda: sft(target=MASK), TypeError, ["target", "int64 or int32", "bool"]),
    "target's shape": (lambda: sft(target=TARGET[:, :4]), ValueError, ["target", "[2, 5]", "[2, 4]"]),
    "target's device": (lambda: sft(target=TARGET.to("meta")), ValueError, ["target", "cpu", "meta"]),
    "target out of range": (lambda: sft(target=TARGET + 20), ValueError, ["target", "[0, 20)", "20"]),
    "target negative": (lambda: sft(target=TARGET - 100), ValueError, ["target", "[0, 20)", "-100"]),
    "weights' shape": (lambda: tsd(weights=torch.ones(5, 2)), ValueError, ["weights", "[2, 5]", "[5, 2]"]),
    "weights that are trained": (
        lambda: tsd(weights=torch.ones(2, 5, requires_grad=True)), ValueError, ["weights", "gradient", "detach"],
    ),
    "weights of integers": (lambda: tsd(weights=TARGET), TypeError, ["weights", "float", "int64"]),
    "weights are a list": (lambda: tsd(weights=[1.0]), TypeError, ["weights", "float", "list"]),
    "weights' device": (lambda: tsd(weights=torch.ones(2, 5, device="meta")), ValueError, ["weights", "cpu", "meta"]),
    "from_teacher": (lambda: tsd(from_teacher=MASK[:, 0]), TypeError, ["from_teacher", "TSDKD", "None"]),
    "from_teacher missing": (
        lambda: tsd(objective=kd.DistiLLM2()), TypeError, ["from_teacher", "DistiLLM2", "NoneType"],
    ),
    "from_teacher of integers": (
        lambda: tsd(objective=VCRD, from_teacher=TARGET[:, 0]), TypeError, ["from_teacher", "VCRD", "bool", "int64"],
    ),
    "from_teacher's shape": (
        lambda: tsd(objective=VCRD, from_teacher=MASK), ValueError, ["from_teacher", "[2]", "[2, 5]"],
    ),
    "weights missing": (
        lambda: tsd(objective=kd.VCRD(), from_teacher=MASK[:, 0]), TypeError, ["weights", "VCRD", "None"],
    ),
    "a stored teacher for the likelihood ratio": (
        lambda: tsd(
            teacher=kd.TopK(torch.arange(2).expand(2, 5, 2), torch.full((2, 5, 2), -1.0)),
            objective=kd.VCRD(weighting="likelihood_ratio"), from_teacher=MASK[:, 0],
        ), TypeError, ["teacher", "TopK", "all entries"],
    ),
    # what is wrong is wrong without a token, too
    "k above the vocabulary, no token": (
        lambda: tsd(objective=kd.TSDKD(k=21), mask=~MASK), ValueError, ["k", "20", "21"],
    ),
    "teacher's vocabulary, no token": (
        lambda: tsd(teacher=head(vocabulary=19), mask=~MASK), ValueError, ["teacher", "20", "19", "vocab_size"],
    ),
    "memory_budget too small, no token": (
        lambda: tsd(memory_budget=100, mask=~MASK), ValueError, ["memory_budget", "bytes", "100"],
    ),
    "from_teacher missing, no token": (
        lambda: tsd(objective=VCRD, mask=~MASK), TypeError, ["from_teacher", "VCRD", "NoneType"],
    ),
    # options
    "k above the vocabulary": (lambda: tsd(objective=kd.TSDKD(k=21)), ValueError, ["k", "20", "21"]),
    "k above the real vocabulary": (
        lambda: tsd(head(vocab_size=9), objective=kd.TSDKD(k=10)), ValueError, ["k", "9", "10"],
    ),
    "k of nothing": (lambda: kd.TSDKD(k=0), ValueError, ["k", "1", "0"]),
    "k of a half": (lambda: kd.TSDKD(k=2.5), TypeError, ["k", "int", "2.5"]),
    "beta": (lambda: kd.TSDKD(beta=1.1), ValueError, ["beta", "[0, 1]", "1.1"]),
    "beta of GKD": (lambda: kd.GKD(beta=-0.1), ValueError, ["beta", "[0, 1]", "-0.1"]),
    "alpha": (lambda: kd.SkewKL(2.0), ValueError, ["alpha", "[0, 1]", "2.0"]),
    "nan": (lambda: kd.JSD(float("nan")), ValueError, ["beta", "nan"]),
    "tau": (lambda: kd.TSDKD(tau=0.0), ValueError, ["tau", "positive", "0.0"]),
    "opener": (lambda: kd.TSDKD(opener=1.5), ValueError, ["opener", "[0, 1]", "1.5"]),
    "entropy_ratio": (lambda: kd.TSDKD(entropy_ratio=-1), ValueError, ["entropy_ratio", "[0, 1]", "-1"]),
    "weighting": (lambda: kd.VCRD(weighting="ratio"), ValueError, ["weighting", "likelihood_ratio", "'ratio'"]),
    "reduction": (lambda: kd.VCRD(reduction="mean"), ValueError, ["reduction", "prompts", "'mean'"]),
    "prompts of one author": (lambda: kd.GKD(reduction="prompts"), ValueError, ["reduction", "tokens", "'prompts'"]),
    "alpha of VCRD": (lambda: kd.VCRD(alpha=1.5), ValueError, ["alpha", "[0, 1]", "1.5"]),
    "opener by name": (lambda: kd.TSDKD(opener="adaptive"), TypeError, ["opener", "number", "adaptive"]),
    "scores of integers": (lambda: validity_weights(TARGET, TARGET), TypeError, ["student", "float", "int64"]),
    "scores' shape": (
        lambda: validity_weights(torch.ones(2, 5), torch.ones(5)), ValueError, ["teacher", "[2, 5]", "[5]"],
    ),
    "kind of weight": (
        lambda: validity_weights(torch.ones(2), torch.ones(2), "log"), ValueError, ["rule", "clamped_ratio", "'log'"],
    ),
    "temperature": (lambda: kd.GKD(temperature=0), ValueError, ["temperature", "0.001", "got 0"]),
    "temperature too large": (lambda: kd.TSDKD(temperature=1e4), ValueError, ["temperature", "1000", "10000.0"]),
    "indirect_weight": (lambda: kd.TSDKD(indirect_weight="1"), TypeError, ["indirect_weight", "number", "'1'"]),
    "direct_weight": (lambda: kd.TSDKD(direct_weight=math.nan), ValueError, ["direct_weight", "finite", "nan"]),
    "entropy_weight": (lambda: kd.TSDKD(entropy_weight=True), TypeError, ["entropy_weight", "True"]),
    "lambda of infinity": (lambda: kd.VCRD(lambda_teacher=INF), ValueError, ["lambda_teacher", "finite", "inf"]),
    "detach as text": (lambda: kd.SkewReverseKL(0.1, "no"), TypeError, ["detach", "True or False", "'no'"]),
    "detach_mixture as text": (lambda: kd.DistiLLM2(detach_mixture="no"), TypeError, ["detach_mixture", "'no'"]),
    "alpha_teacher": (lambda: kd.DistiLLM2(alpha_teacher=2), ValueError, ["alpha_teacher", "[0, 1]", "2"]),
    "a layout's position twice": (
        lambda: kd.Layout(torch.tensor([1, 1]), (2,), (1, 3)), ValueError, ["index", "distinct", "[1, 1]"],
    ),
    "a layout's position outside": (
        lambda: kd.Layout(torch.tensor([0, 3]), (2,), (1, 3)), ValueError, ["index", "[0, 3)", "[0, 3]"],
    ),
    "a layout of floats": (
        lambda: kd.Layout(torch.zeros(2), (2,), (1, 3)), TypeError, ["index", "int64", "float32"],
    ),
    "labels that are a mask": (
        lambda: kd.Layout.from_labels(MASK), TypeError, ["labels", "integer", "torch.bool"],
    ),
    "segments that are a mask": (
        lambda: kd.Layout.from_segments(MASK), TypeError, ["ids", "integer", "torch.bool"],
    ),
    "ignore_index of labels": (
        lambda: kd.Layout.from_labels(TARGET, "x"), TypeError, ["ignore_index", "int", "'x'"],
    ),
    "memory_budget too small": (lambda: tsd(memory_budget=100), ValueError, ["memory_budget", "bytes", "100"]),
    "memory_budget negative": (lambda: sft(memory_budget=-1), ValueError, ["memory_budget", "-1"]),
    "memory_budget as text": (lambda: sft(memory_budget="1G"), TypeError, ["memory_budget", "int", "1G"]),
    "logits_dtype of integers": (lambda: sft(logits_dtype=torch.int64), ValueError, ["logits_dtype", "int64"]),
    "logits_dtype narrower than the operands": (
        lambda: sft(logits_dtype=torch.bfloat16), ValueError, ["logits_dtype", "float32", "bfloat16"],
    ),
    "weights that want a gradient": (
        lambda: tsd(weights=torch.ones(2, 5, requires_grad=True)), ValueError, ["weights", "gradient"],
    ),
    "temperature of infinity": (lambda: kd.GKD(temperature=INF), ValueError, ["temperature", "finite", "inf"]),
    "temperature of nan": (lambda: kd.GKD(temperature=math.nan), ValueError, ["temperature", "nan"]),
    "temperature as text": (lambda: kd.GKD(temperature="1"), TypeError, ["temperature", "number", "'1'"]),
    "temperature of true": (lambda: kd.GKD(temperature=True), TypeError, ["temperature", "number", "True"]),
    "tau of infinity": (lambda: kd.TSDKD(tau=INF), ValueError, ["tau", "finite", "inf"]),
    "opener of true": (lambda: kd.TSDKD(opener=True), TypeError, ["opener", "number", "True"]),
    "k of true": (lambda: kd.TSDKD(k=True), TypeError, ["k", "int", "True"]),
    "beta as text": (lambda: kd.GKD(beta="x"), TypeError, ["beta", "number", "'x'"]),
    "beta of nothing": (lambda: kd.JSD(None), TypeError, ["beta", "number", "None"]),
    "alpha of a tensor": (lambda: kd.SkewKL(torch.ones(())), TypeError, ["alpha", "number", "tensor"]),
    "memory_budget of true": (lambda: sft(memory_budget=True), TypeError, ["memory_budget", "int", "True"]),
    "memory_budget of a float": (lambda: sft(memory_budget=1e9), TypeError, ["memory_budget", "int", "1000000000.0"]),
    "logits_dtype as text": (lambda: sft(logits_dtype="fp32"), TypeError, ["logits_dtype", "torch.dtype", "fp32"]),
    "an unknown teacher": (lambda: tsd(teacher=torch.ones(2, 5, 20)), TypeError, ["teacher", "kd.Logits", "Tensor"]),
    "a layout that does not add up": (
        lambda: kd.Layout(torch.arange(5), (2, 2), (2, 5)), ValueError, ["lengths", "5", "[2, 2]"],
    ),
    "a layout with an empty response": (
        lambda: kd.Layout(torch.arange(4), (4, 0), (2, 5)), ValueError, ["lengths", "positive", "[4, 0]"],
    ),
    # rows
    "rows in a list": (lambda: kd.entropy(head(), rows=[1]), TypeError, ["rows", "int64", "list"]),
    "rows of int16": (lambda: kd.entropy(head(), rows=TARGET[0].short()), TypeError, ["rows", "int64", "int16"]),
    "rows of two dimensions": (lambda: kd.entropy(head(), rows=TARGET), ValueError, ["rows", "[10]", "[2, 5]"]),
    "a mask of rows": (lambda: kd.entropy(head(), rows=MASK.t()), ValueError, ["rows", "[2, 5]", "[5, 2]"]),
    "a layout of rows": (
        lambda: kd.entropy(head(), rows=kd.Layout.from_mask(MASK[:1])), ValueError, ["rows", "[2, 5]", "[1, 5]"],
    ),
    "rows beyond the last": (
        lambda: kd.entropy(head(), rows=torch.tensor([3, 10])), ValueError, ["rows", "[0, 10)", "3 to 10"],
    ),
    "negative rows": (lambda: kd.entropy(head(), rows=torch.tensor([-1])), ValueError, ["rows", "[0, 10)", "-1"]),
    "rows twice": (lambda: kd.entropy(head(), rows=torch.tensor([3, 3])), ValueError, ["rows", "distinct", "2", "1"]),
    "rows elsewhere": (
        lambda: kd.entropy(head(), rows=torch.arange(3, device="meta")), ValueError, ["rows", "cpu", "meta"],
    ),
    # per-token functions
    "infinite temperature of a divergence": (
        lambda: kd.divergence(head(), head(), kd.ForwardKL(), temperature=INF), ValueError, ["temperature", "inf"],
    ),
    "a divergence's teacher elsewhere": (
        lambda: kd.divergence(head(), head(device="meta"), kd.ForwardKL()), ValueError, ["teacher", "cpu", "meta"],
    ),
    "a divergence's teacher in fp64": (
        lambda: kd.divergence(head(), head(dtype=torch.float64), kd.ForwardKL()),
        TypeError, ["teacher", "float32", "float64"],
    ),
    "a divergence's budget": (
        lambda: kd.divergence(head(), head(), kd.ForwardKL(), memory_budget=10), ValueError, ["memory_budget", "10"],
    ),
    "a divergence's logits": (
        lambda: kd.divergence(head(), head(), kd.ForwardKL(), logits_dtype=torch.bfloat16),
        ValueError, ["logits_dtype", "float32", "bfloat16"],
    ),
    "cross-entropy's device": (
        lambda: kd.cross_entropy(head(), TARGET.to("meta")), ValueError, ["target", "cpu", "meta"],
    ),
    "ignore_index": (lambda: kd.cross_entropy(head(), TARGET, True), TypeError, ["ignore_index", "int", "True"]),
    "plackett_luce's k of true": (lambda: kd.plackett_luce(head(), head(), k=True), TypeError, ["k", "int", "True"]),
    "plackett_luce's k of nothing": (lambda: kd.plackett_luce(head(), head(), k=0), ValueError, ["k", "1", "0"]),
    "statistics' topk of true": (lambda: kd.statistics(head(), topk=True), TypeError, ["topk", "int", "True"]),
    "statistics' collision": (
        lambda: kd.statistics(head(vocabulary=300), collision=129), ValueError, ["collision", "128", "129"],
    ),
    "collision of all": (lambda: kd.statistics(head(), collision=21), ValueError, ["collision", "20", "21"]),
    "divergence without its number": (
        lambda: kd.divergence(head(), head(), kd.JSD), TypeError, ["divergence", "kd.JSD(0.9)"],
    ),
    "divergence by name": (lambda: kd.divergence(head(), head(), "jsd"), TypeError, ["divergence", "jsd"]),
    "temperature of a divergence": (
        lambda: kd.divergence(head(), head(), kd.ForwardKL(), temperature=-1.0), ValueError, ["temperature", "-1.0"],
    ),
    "teacher of a divergence": (
        lambda: kd.divergence(head(), head((5, 2)), kd.JSD(0.5)), ValueError, ["teacher", "[2, 5, 'H']", "[5, 2, 4]"],
    ),
    "entropy of logits": (lambda: kd.entropy(torch.zeros(2, 5)), TypeError, ["student", "kd.Head", "Tensor"]),
    "cross-entropy's target": (lambda: kd.cross_entropy(head(), None), TypeError, ["target", "int64", "NoneType"]),
    "cross-entropy's shape": (lambda: kd.cross_entropy(head(), TARGET.t()), ValueError, ["target", "[2, 5]", "[5, 2]"]),
    "cross-entropy's range": (
        lambda: kd.cross_entropy(head(vocab_size=9), TARGET + 9), ValueError, ["target", "[0, 9)", "9"],
    ),
    "plackett_luce's k": (lambda: kd.plackett_luce(head(), head(), k=40), ValueError, ["k", "20", "40"]),
    "statistics' topk": (lambda: kd.statistics(head(), topk=21), ValueError, ["topk", "20", "21"]),
    "statistics' negative topk": (lambda: kd.statistics(head(), topk=-1), ValueError, ["topk", "-1"]),
    "statistics' target": (lambda: kd.statistics(head(), target=TARGET + 20), ValueError, ["target", "[0, 20)", "20"]),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_CALLS)
def test_errors_name_argument_expected_and_actual(backend, name):
    call, error, told = BAD_CALLS[name]
    with pytest.raises(error) as raised:
        call()
    missing = [part for part in told if part not in str(raised.value)]
    assert not missing, f"{missing} not in: {raised.value}"
    assert str(raised.value).startswith(told[0]), f"does not begin with the argument's name: {raised.value}"


def test_targets_outside_the_mask_are_free(backend):
    """Prompt and padding hold whatever the data set puts there."""
    batch = fixed()
    expected = run(kd.SFT(), batch, target=batch.target).loss
    batch.target[~batch.mask] = -100
    assert torch.equal(run(kd.SFT(), batch, target=batch.target).loss, expected)


def test_a_teacher_padded_less_than_the_student(backend):
    """The real vocabulary decides, not the rows: 20 entries padded to 32, a teacher of 24 rows."""
    out = tsd(head(vocabulary=32, vocab_size=20), head(vocabulary=24))
    assert out.loss.isfinite()


def test_ids_of_a_gpu_are_masked_and_reported(backend, monkeypatch):
    """Asking a GPU whether ids are entries would be a sync: what is none gives NaN, reads nothing and is counted."""
    monkeypatch.setattr(operators, "check_range", lambda *_, **__: None)
    monkeypatch.setattr(base, "check_range", lambda *_, **__: None)
    batch = fixed()
    batch.target[0, 3], batch.target[2, 4] = 60, -5
    value = kd.cross_entropy(batch.student, batch.target)
    assert value[0, 3].isnan() and value[2, 4].isnan() and value.isnan().sum() == 2
    out = run(kd.SFT(), batch, target=batch.target)
    assert out.loss.isnan() and out.metrics["nonfinite_tokens"] == 2
