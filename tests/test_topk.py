"""Teachers known at K entries, against reference.topk_divergence in fp64; the bucket; what is refused."""

import math
from dataclasses import replace

import pytest
import torch
import truth
from batches import fixed, run, smallest_budget
from drawn import DRAWN
from hypothesis import given
from hypothesis import strategies as st

import kdkernels as kd
from kdkernels import reference

F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16
DIVERGENCES = {name: divergence for name, (divergence, _) in truth.DIVERGENCES.items() if name not in ("jsd0", "jsd1")}


def stored(z_t: torch.Tensor, k: int, renormalize: bool = False, dtype=F64, padded=0) -> kd.TopK:
    """k entries of a teacher with logits z_t [..., V], in random order; ``padded`` of them say probability 0."""
    ids = z_t.topk(k).indices[..., torch.randperm(k)]
    log_p = z_t.log_softmax(-1).gather(-1, ids)
    log_p[..., k - padded :] = -math.inf
    return kd.TopK(ids, log_p.to(dtype), renormalize)


def reference_divergence(head: kd.Head, teacher: kd.TopK, divergence, temperature: float) -> torch.Tensor:
    z = truth.dense_logits(head, head.vocabulary).flatten(0, -2)
    ids, log_p = teacher.indices.flatten(0, -2), teacher.log_probs.flatten(0, -2).to(z.dtype)
    if teacher.sampled:
        return reference.sampled_divergence(z, ids, log_p, divergence)
    return reference.topk_divergence(z, ids, log_p, divergence, temperature, teacher.renormalize)


def check(student: kd.Head, teacher: kd.TopK, divergence, temperature=1.0, same: kd.TopK | None = None, **more):
    """Value and gradients of a random weighting within the error rule. ``student`` holds what its dtype can hold.

    same: the teacher that the reference gets, where it is another one of the same numbers.
    """
    dtype = student.dtype
    value = kd.divergence(student, teacher, divergence, temperature, **more)
    incoming = torch.randn(value.shape)
    got = [value.detach().flatten(), *torch.autograd.grad(value, truth.leaves(student), incoming.to(value.dtype))]

    def expected(dtype):
        head = truth.to(student, dtype)
        value = reference_divergence(head, same or teacher, divergence, temperature)
        incoming_here = incoming.flatten().to(value.dtype)
        return [value.detach(), *torch.autograd.grad(value, truth.leaves(head), incoming_here)]

    for g, yardstick, exact in zip(got, expected(dtype), expected(F64), strict=True):
        if dtype == F64:
            assert truth.relative(g, exact) < 1e-11
        else:
            truth.assert_accurate(g, yardstick, exact, "value or gradient", dtype, slack=4 if g.numel() < 64 else 1)


def random_student(dtype, rows=9, vocabulary=130, hidden=10, softcap=None, scale=1.0, spread=2.0, bias=True) -> kd.Head:
    numbers = torch.randn(rows, hidden), spread * torch.randn(vocabulary, hidden) / hidden**0.5, torch.randn(vocabulary)
    hidden, weight, bias_of = (t.to(dtype).requires_grad_() for t in numbers)
    return kd.Head(hidden, weight, bias_of if bias else None, softcap=softcap, scale=scale)


@DRAWN
@given(
    seed=st.integers(0, 10**6),
    vocabulary=st.integers(2, 150),
    share=st.sampled_from([0.0, 0.05, 0.3, 0.9, 1.0]),
    divergence=st.sampled_from(list(DIVERGENCES.values())),
    renormalized=st.sampled_from([None, 1.0, 0.7]),
    softcap=st.sampled_from([None, 3.0]),
    scale=st.sampled_from([1.0, 0.5]),
    bias=st.booleans(),
)
def test_topk_is_the_reference(dtype, seed, vocabulary, share, divergence, renormalized, softcap, scale, bias):
    torch.manual_seed(seed)
    student = random_student(dtype, vocabulary=vocabulary, softcap=softcap, scale=scale, bias=bias)
    k = min(vocabulary, max(2, int(share * vocabulary)))
    z_t = 2 * torch.randn(9, vocabulary, dtype=F64)
    teacher = stored(z_t, k, renormalized is not None, F64 if dtype == F64 else F32)
    check(student, teacher, divergence, renormalized or 1.0)


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("mass", [20.0, 60.0, 2000.0])
def test_a_tiny_bucket_keeps_its_digits(dtype, name, mass):
    """The student's other entries have e^-mass of its probability: 1 - sum q would be 0 or noise."""
    torch.manual_seed(0)
    student = random_student(dtype)
    with torch.no_grad():
        student.bias[:10] += mass
    z_t = torch.randn(9, 130, dtype=F64)
    z_t[:, :10] += 5
    check(student, stored(z_t, 10, dtype=F32), DIVERGENCES[name])
    z_t[:, :10] += 100  # both: the teacher's bucket is what reference.missing_mass leaves it
    check(student, stored(z_t, 10, dtype=F32), DIVERGENCES[name])


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("renormalize", [False, True], ids=["bucket", "renormalized"])
def test_padding_is_not_listed(dtype, name, renormalize):
    """Entries of -inf lie in the bucket: the same numbers as without them, finite for a reverse KL too."""
    torch.manual_seed(0)
    student, z_t = random_student(dtype), torch.randn(9, 130, dtype=F64)
    padded = stored(z_t, 12, renormalize, padded=4)
    short = kd.TopK(padded.indices[:, :8], padded.log_probs[:, :8], renormalize)
    check(student, padded, DIVERGENCES[name], same=short)
    exact = truth.to(student, F64)
    values = [reference_divergence(exact, each, DIVERGENCES[name], 1.0).detach() for each in (padded, short)]
    torch.testing.assert_close(*values)


@pytest.mark.parametrize("name", ["forward", "reverse", "jsd.5"])
def test_padding_up_to_the_whole_vocabulary(name):
    """A bucket of nothing but padding, and at tokens that list all entries none at all."""
    torch.manual_seed(0)
    student, teacher = random_student(F64, vocabulary=12), stored(torch.randn(9, 12, dtype=F64), 12, padded=4)
    check(student, teacher, DIVERGENCES[name], same=kd.TopK(teacher.indices[:, :8], teacher.log_probs[:, :8]))
    z_t = torch.randn(9, 12, dtype=F64)
    whole = stored(z_t, 12)
    mixed = kd.TopK(*(torch.where(torch.arange(9)[:, None] < 5, *pair) for pair in (
        (teacher.indices, whole.indices), (teacher.log_probs, whole.log_probs)
    )))  # fmt: skip
    value = kd.divergence(student, mixed, DIVERGENCES[name])
    expected = torch.cat([
        kd.divergence(student, teacher, DIVERGENCES[name])[:5],
        kd.divergence(student, kd.Logits(z_t), DIVERGENCES[name])[5:],
    ])  # fmt: skip
    torch.testing.assert_close(value, expected)
    (gradient,) = torch.autograd.grad(value.sum(), student.hidden)
    (by_token,) = torch.autograd.grad(expected.sum(), student.hidden)
    torch.testing.assert_close(gradient, by_token)
    assert (gradient.norm(dim=-1) > 1e-3).all()


@pytest.mark.parametrize("kept_in", [F32, BF16])
def test_entries_that_servers_do_not_know_are_padding(kept_in):
    torch.manual_seed(0)
    student, padded = random_student(F64), stored(torch.randn(9, 130, dtype=F64), 12, dtype=kept_in, padded=4)
    unknown = kd.TopK(padded.indices, padded.log_probs.masked_fill(padded.log_probs.isneginf(), -9999.0))
    values = [kd.divergence(student, each, kd.ReverseKL()) for each in (padded, unknown)]
    assert torch.equal(*values) and values[0].isfinite().all()


def test_ids_of_int32_are_kept_and_change_nothing(dtype):
    """Beside 16 bits an entry takes 6 bytes; only those of a chunk become int64."""
    torch.manual_seed(0)
    student, teacher = random_student(dtype), stored(torch.randn(9, 130, dtype=F64), 12, dtype=F32)
    small = kd.TopK(teacher.indices.int(), teacher.log_probs)
    check(student, small, kd.JSD(0.5), same=teacher)
    index = torch.tensor([7, 2], dtype=torch.int32)
    value = kd.divergence(student, small, kd.JSD(0.5), rows=index)
    assert (
        torch.equal(value, kd.divergence(student, teacher, kd.JSD(0.5), rows=index.long())) and (value > 0).sum() == 2
    )
    assert small.indices.dtype == torch.int32 and small.detach().indices.dtype == torch.int32


@pytest.mark.parametrize("masked", [slice(None), slice(2, 5)], ids=["all rows", "some rows"])
def test_a_masked_bucket(backend, masked):
    """A student with none but the list's entries: its bucket is empty, its gradient is finite."""
    torch.manual_seed(0)
    logits = torch.randn(9, 130)
    logits[masked, 20:] = -math.inf
    logits.requires_grad_()
    teacher = stored(torch.randn(9, 130).index_fill(1, torch.arange(20, 130), -50.0), 20)
    value = kd.divergence(kd.Logits(logits), teacher, kd.ReverseKL())
    (got,) = torch.autograd.grad(value.sum(), logits)
    exact = logits.detach().double()
    ids, log_p = teacher.indices, teacher.log_probs.double()
    torch.testing.assert_close(
        value.double(), reference.topk_divergence(exact, ids, log_p, kd.ReverseKL()), rtol=1e-5, atol=1e-6
    )
    listed = exact[masked, :20]  # what is left of the masked rows
    certain = torch.cat([listed, torch.full((len(listed), 1), -math.inf)], -1).log_softmax(-1)
    listed = reference.divergence_gradient(
        certain,
        torch.cat([log_p[masked], reference.missing_mass(log_p[masked])], -1).gather(
            -1, torch.cat([ids[masked].argsort(-1), torch.full((len(listed), 1), 20)], -1)
        ),
        kd.ReverseKL(),
    )
    assert truth.relative(got[masked, :20], listed[:, :20]) < 1e-5
    assert (got[masked, 20:] == 0).all() and got.isfinite().all() and (got.norm(dim=-1) > 0).all()


def test_small_budgets_change_nothing(backend):
    torch.manual_seed(0)
    student, teacher = random_student(F32, rows=24), stored(torch.randn(24, 130), 7)

    def outcome(budget):
        value = kd.divergence(student, teacher, kd.JSD(0.9), memory_budget=budget)
        return [value.detach(), *torch.autograd.grad(value.sum(), truth.leaves(student))]

    for whole, pieces in zip(outcome(None), outcome(smallest_budget(outcome) + 7_000), strict=True):
        assert truth.relative(pieces, whole) < 1e-6


def test_fp32_logits_of_bf16_operands(backend):
    """The gradient in bf16 lies over fp32 logits, columns moved and all."""
    torch.manual_seed(0)
    student, teacher = random_student(BF16), stored(torch.randn(9, 130, dtype=F64), 7)
    check(student, teacher, kd.JSD(0.5), logits_dtype=F32)


def test_logits_as_the_student(backend):
    torch.manual_seed(0)
    logits, teacher = torch.randn(3, 4, 40, dtype=F32, requires_grad=True), stored(torch.randn(3, 4, 40), 5)
    value = kd.divergence(kd.Logits(logits), teacher, kd.ForwardKL())
    (got,) = torch.autograd.grad(value.sum(), logits)
    exact = logits.detach().double().requires_grad_()
    ids, log_p = teacher.indices.flatten(0, 1), teacher.log_probs.flatten(0, 1).double()
    expected = reference.topk_divergence(exact.flatten(0, 1), ids, log_p, kd.ForwardKL())
    torch.testing.assert_close(value.flatten().double(), expected, rtol=1e-5, atol=1e-6)
    assert truth.relative(got, torch.autograd.grad(expected.sum(), exact)[0]) < 1e-6


@pytest.mark.parametrize("renormalize", [False, True])
def test_an_objective(backend, renormalize):
    """GKD from stored entries of every position: prompts and padding may hold anything."""
    batch = fixed(F32)
    z_t = truth.dense_logits(truth.to(batch.teacher, F64), 60)
    teacher = stored(z_t, 8, renormalize, F32)
    outside = ~batch.mask
    teacher.indices[outside], teacher.log_probs[outside] = -7, 3.0
    out = kd.GKD(0.5)(batch.student, teacher, batch.mask, target=batch.target)
    got = truth.gradients(out.loss, batch.student)
    exact = truth.to(batch.student, F64)
    entries = kd.TopK(teacher.indices.masked_fill(outside[..., None], 0), teacher.log_probs, renormalize)
    d = reference_divergence(exact, entries, kd.JSD(0.5), 1.0).view(batch.mask.shape)
    expected = torch.stack([row[m].mean() for row, m in zip(d, batch.mask, strict=True) if m.any()]).mean()
    assert truth.relative(out.loss.detach()[None], expected.detach()[None]) < 1e-5
    for g, e in zip(got, truth.gradients(expected, exact), strict=True):
        assert truth.relative(g, e) < 1e-5
    assert out.metrics["nonfinite_tokens"] == 0 and "teacher_entropy" not in out.metrics


@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("make", [kd.DistiLLM2, lambda: kd.VCRD(weighting="uniform", reduction="responses")])
def test_two_divergences(backend, make, renormalize):
    """Teacher-written and student-written responses, in one chunk: each by its own divergence."""
    batch = fixed(F32)
    teacher = stored(truth.dense_logits(truth.to(batch.teacher, F64), 60), 8, renormalize, F32)
    by_teacher = torch.tensor([False, True, True, True, False])
    out = make()(batch.student, teacher, batch.mask, from_teacher=by_teacher)
    exact = truth.to(batch.student, F64)
    skl, srkl = (
        reference_divergence(exact, teacher, divergence, 1.0).view(batch.mask.shape)
        for divergence in (kd.SkewKL(0.1), kd.SkewReverseKL(0.1))
    )
    d = torch.where(by_teacher[:, None], skl, srkl)
    expected = torch.stack([row[m].mean() for row, m in zip(d, batch.mask, strict=True) if m.any()]).mean()
    assert truth.relative(out.loss.detach()[None], expected.detach()[None]) < 1e-5
    for g, e in zip(truth.gradients(out.loss, batch.student), truth.gradients(expected, exact), strict=True):
        assert truth.relative(g, e) < 1e-5


# ---- what is refused -------------------------------------------------------------------------------------------------

IDS, LOG_P = torch.tensor([[1, 2, 3]] * 2), torch.full((2, 3), -2.0)
STUDENT = kd.Logits(torch.zeros(2, 10))


def edited(tensor: torch.Tensor, value) -> torch.Tensor:
    tensor = tensor.clone()
    tensor[1, 1] = value
    return tensor


def kl(teacher, temperature=1.0, student=STUDENT):
    return kd.divergence(student, teacher, kd.ForwardKL(), temperature)


BAD = {
    "ids of uint8": (lambda: kd.TopK(IDS.to(torch.uint8), LOG_P), TypeError, ["indices", "int64 or int32", "uint8"]),
    "bool ids": (lambda: kd.TopK(IDS > 1, LOG_P), TypeError, ["indices", "int64 or int32", "bool"]),
    "ids in a list": (lambda: kd.TopK([1], LOG_P), TypeError, ["indices", "int64", "list"]),
    "integer log-probs": (lambda: kd.TopK(IDS, IDS), TypeError, ["log_probs", "int64"]),
    "shapes": (lambda: kd.TopK(IDS[:, :2], LOG_P), ValueError, ["indices", "[2, 3]", "[2, 2]"]),
    "no entries": (lambda: kd.TopK(IDS[:, :0], LOG_P[:, :0]), ValueError, ["log_probs", "[..., K]", "[2, 0]"]),
    "devices": (lambda: kd.TopK(IDS.to("meta"), LOG_P), ValueError, ["indices", "cpu", "meta"]),
    "renormalize": (lambda: kd.TopK(IDS, LOG_P, 1), TypeError, ["renormalize", "bool", "1"]),
    "as the student": (lambda: kd.entropy(kd.TopK(IDS, LOG_P)), TypeError, ["student", "kd.Head", "TopK"]),
    "positions": (lambda: kl(kd.TopK(IDS[:1], LOG_P[:1])), ValueError, ["teacher", "[2, 'K']", "[1, 3]"]),
    "id beyond the vocabulary": (lambda: kl(kd.TopK(edited(IDS, 10), LOG_P)), ValueError, ["indices", "[0, 10)", "10"]),
    "negative id": (lambda: kl(kd.TopK(edited(IDS, -1), LOG_P)), ValueError, ["indices", "[0, 10)", "-1"]),
    "an id twice": (lambda: kl(kd.TopK(edited(IDS, 1), LOG_P)), ValueError, ["indices", "distinct", "[1, 1, 3]"]),
    "more than all": (lambda: kl(kd.TopK(IDS, edited(LOG_P, 0.1))), ValueError, ["log_probs", "at most 1", "1.37"]),
    "K above the vocabulary": (
        lambda: kl(kd.TopK(IDS, LOG_P), student=kd.Logits(torch.zeros(2, 10), vocab_size=2)),
        ValueError, ["indices", "2", "3"],
    ),
    "a bucket's temperature": (lambda: kl(kd.TopK(IDS, LOG_P), 0.7), ValueError, ["temperature", "0.7", "renormalize"]),
    "plackett_luce": (
        lambda: kd.plackett_luce(STUDENT, kd.TopK(IDS, LOG_P), 2), TypeError, ["teacher", "TopK", "all entries"],
    ),
    "statistics": (lambda: kd.statistics(STUDENT, kd.TopK(IDS, LOG_P)), TypeError, ["teacher", "TopK", "all entries"]),
    "TSD-KD": (
        lambda: kd.TSDKD(k=2)(
            kd.Logits(torch.zeros(1, 2, 10)), kd.TopK(IDS[None], LOG_P[None]), torch.ones(1, 2, dtype=torch.bool)
        ), TypeError, ["teacher", "TopK", "all entries"],
    ),
    "VCRD without a judge": (
        lambda: kd.VCRD(weighting="likelihood_ratio")(
            kd.Logits(torch.zeros(1, 2, 10)), kd.TopK(IDS[None], LOG_P[None]), torch.ones(1, 2, dtype=torch.bool),
            from_teacher=torch.tensor([True]),
        ), TypeError, ["teacher", "TopK", "all entries"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_errors_name_argument_expected_and_actual(name):
    call, error, told = BAD[name]
    with pytest.raises(error) as raised:
        call()
    missing = [part for part in told if part not in str(raised.value)]
    assert not missing, f"{missing} not in: {raised.value}"
    assert str(raised.value).startswith(told[0]), f"does not begin with the argument's name: {raised.value}"


def test_rounded_lists_may_sum_to_a_little_more(backend):
    teacher = kd.TopK(IDS, torch.full((2, 3), math.log((1 + 5e-4) / 3)))
    expected = kl(kd.TopK(IDS, torch.full((2, 3), math.log(1 / 3))))
    torch.testing.assert_close(kl(teacher), expected, rtol=1e-5, atol=1e-6)
    coarse = kd.TopK(IDS, torch.full((2, 3), math.log(1.01 / 3), dtype=BF16))
    torch.testing.assert_close(kl(coarse), expected, rtol=1e-2, atol=1e-3)


def test_a_list_that_is_nan_spoils_its_own_token(backend):
    batch = fixed(F32)
    teacher = stored(truth.dense_logits(batch.teacher, 60), 8)
    clean = run(kd.GKD(0.5), replace(batch, teacher=teacher)).loss
    at = tuple(batch.mask.nonzero()[3])
    teacher.log_probs[at] = math.nan
    value = kd.divergence(batch.student, teacher, kd.JSD(0.5))
    assert value[at].isnan() and value.isnan().sum() == 1
    out = run(kd.GKD(0.5), replace(batch, teacher=teacher))
    assert clean.isfinite() and out.loss.isnan() and out.metrics["nonfinite_tokens"] == 1
