"""Teachers known at entries that they drew: values and gradients are the whole teacher's in the mean over the draws."""

import math
from dataclasses import replace

import pytest
import torch
import truth
from batches import fixed, run
from drawn import DRAWN
from hypothesis import given
from hypothesis import strategies as st
from test_topk import check, random_student

import kdkernels as kd
from kdkernels import reference
from kdkernels.sources import sampled

F32, F64 = torch.float32, torch.float64
BOUNDED = {
    **{name: one for name, (one, _) in truth.DIVERGENCES.items() if name not in ("reverse", "jsd0", "jsd1")},
    "skl1": kd.SkewKL(1.0),
    "srkl1": kd.SkewReverseKL(1.0),
    "srkl, detached": kd.SkewReverseKL(0.3, detach=True),
}
V, K, DRAWS = 40, 8, 4096


def logits(rows: int, spread: float = 2.0, seed: int = 0) -> torch.Tensor:
    return spread * torch.randn(rows, V, dtype=F64, generator=torch.Generator().manual_seed(seed))


def draws(z_t: torch.Tensor, k: int = K) -> tuple[torch.Tensor, torch.Tensor]:
    """What one token's teacher z_t [V] draws at DRAWS offsets that fill [0, 1) evenly: ids and log p [DRAWS, K]."""
    offsets = (torch.arange(DRAWS, dtype=F64) + 0.5) / DRAWS
    return sampled.draw(kd.Logits(z_t.expand(DRAWS, -1).contiguous()), torch.arange(DRAWS), k, offsets)


def threshold(p: torch.Tensor, k: int) -> float:
    """tau with sum_i min(1, p_i / tau) = k, by bisection."""
    low, high = 0.0, 1.0
    for _ in range(200):
        tau = (low + high) / 2
        low, high = (tau, high) if (p / tau).clamp(max=1).sum() > k else (low, tau)
    return tau


def closed_gradient(z_s, ids, log_p, divergence):
    log_q = z_s.log_softmax(-1)
    slope = reference.sampled_masses(log_p) * reference.sampled_terms(log_q.gather(-1, ids), log_p, divergence)[1]
    return torch.zeros_like(z_s).scatter(-1, ids, slope) - log_q.exp() * slope.sum(-1, keepdim=True)


# ---- the specification ----


@pytest.mark.parametrize("name", BOUNDED)
@pytest.mark.parametrize("spread", [1.0, 8.0, 60.0])
def test_all_entries_are_the_whole_teacher(name, spread):
    z_s, z_t, ids = logits(9, spread), logits(9, spread, seed=1), torch.arange(V).expand(9, V)
    log_p = z_t.log_softmax(-1)
    value = reference.sampled_divergence(z_s, ids, log_p, BOUNDED[name])
    torch.testing.assert_close(value, reference.divergence(z_s, z_t, BOUNDED[name]), rtol=1e-12, atol=1e-12)
    expected = reference.divergence_gradient(z_s, z_t, BOUNDED[name])
    torch.testing.assert_close(closed_gradient(z_s, ids, log_p, BOUNDED[name]), expected, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("name", [name for name in BOUNDED if "detached" not in name])
def test_the_slope_is_the_gradient_of_the_value(name):
    z_s = logits(5, 4.0).requires_grad_()
    ids, log_p = sampled.draw(kd.Logits(logits(5, 4.0, seed=1)), torch.arange(5), K, torch.rand(5, dtype=F64))
    (by_autograd,) = torch.autograd.grad(reference.sampled_divergence(z_s, ids, log_p, BOUNDED[name]).sum(), z_s)
    torch.testing.assert_close(closed_gradient(z_s.detach(), ids, log_p, BOUNDED[name]), by_autograd)


@pytest.mark.parametrize("spread", [0.0, 0.5, 2.0, 6.0])
def test_entries_are_drawn_by_their_probability_and_stand_for_it(spread):
    z_t = logits(1, spread)[0]
    p = z_t.softmax(-1)
    ids, log_p = draws(z_t)
    assert (ids.sort(-1).values.diff(dim=-1) > 0).all()
    torch.testing.assert_close(log_p, p.log().expand(DRAWS, -1).gather(1, ids))
    tau = threshold(p, K)
    often = torch.bincount(ids.flatten(), minlength=V) / DRAWS
    torch.testing.assert_close(often.to(F64), (p / tau).clamp(max=1), rtol=0, atol=2 / DRAWS)
    masses = reference.sampled_masses(log_p)
    torch.testing.assert_close(masses, log_p.exp().clamp(min=tau), rtol=1e-9, atol=0)
    torch.testing.assert_close(masses.sum(1), torch.ones(DRAWS, dtype=F64))


@pytest.mark.parametrize("name", BOUNDED)
@pytest.mark.parametrize("spread", [1.0, 5.0])
def test_the_mean_over_the_draws_is_the_whole_divergence(name, spread):
    """Also where the student has its mass where the teacher has next to none."""
    z_t, z_s = logits(1, spread)[0], logits(1, spread, seed=1)
    ids, log_p = draws(z_t)
    many = z_s.expand(DRAWS, -1)
    value = reference.sampled_divergence(many, ids, log_p, BOUNDED[name])
    exact = reference.divergence(z_s, z_t[None], BOUNDED[name])
    assert value.std() > 1e-3 or "1" in name[-1]  # the draws differ
    torch.testing.assert_close(value.mean(), exact[0], rtol=2e-3, atol=1e-9)
    gradient = closed_gradient(many, ids, log_p, BOUNDED[name]).mean(0)
    expected = reference.divergence_gradient(z_s, z_t[None], BOUNDED[name])[0]
    torch.testing.assert_close(gradient, expected, rtol=0, atol=2e-3 * max(float(expected.abs().max()), 1e-9))


@pytest.mark.parametrize("left", [1e-4, 1e-9, 1e-30, 0.0])
def test_a_certain_teacher_draws_distinct_entries(left):
    """Whatever is left for all entries but the first, down to nothing."""
    p = torch.full((V,), left / (V - 1), dtype=F64)
    p[3] = 1 - left
    ids, log_p = draws(p.log())
    assert (ids.sort(-1).values.diff(dim=-1) > 0).all() and (ids == 3).any(1).all()
    z_s = logits(1).expand(DRAWS, -1)
    value = reference.sampled_divergence(z_s, ids, log_p, kd.JSD(0.5)).mean()
    torch.testing.assert_close(value, reference.divergence(z_s[:1], p.log()[None], kd.JSD(0.5))[0], rtol=1e-4, atol=0)


# ---- the library ----


@DRAWN
@given(
    seed=st.integers(0, 10**6),
    vocabulary=st.integers(2, 150),
    share=st.sampled_from([0.0, 0.05, 0.3, 1.0]),
    name=st.sampled_from(list(BOUNDED)[:6]),
    softcap=st.sampled_from([None, 3.0]),
    scale=st.sampled_from([1.0, 0.5]),
    bias=st.booleans(),
)
def test_sampled_entries_are_the_reference(dtype, seed, vocabulary, share, name, softcap, scale, bias):
    torch.manual_seed(seed)
    student = random_student(dtype, vocabulary=vocabulary, softcap=softcap, scale=scale, bias=bias)
    kept_in = F64 if dtype == F64 else F32
    teacher = kd.Logits(2 * torch.randn(9, vocabulary, dtype=kept_in))
    drawn = kd.TopK.sample(teacher, min(vocabulary, max(1, int(share * vocabulary))))
    assert drawn.sampled and drawn.log_probs.dtype == kept_in
    check(student, drawn, BOUNDED[name])


def test_the_detached_mixture(dtype):
    """Whose gradient is not that of the value: all entries, beside the whole teacher."""
    torch.manual_seed(0)
    student, z_t = random_student(dtype), torch.randn(9, 130, dtype=F64 if dtype == F64 else F32)
    divergence = BOUNDED["srkl, detached"]
    found = [
        torch.autograd.grad(kd.divergence(student, teacher, divergence).sum(), truth.leaves(student))
        for teacher in (kd.TopK.sample(kd.Logits(z_t), 130), kd.Logits(z_t))
    ]
    tolerance = {F64: 1e-10, F32: 1e-4}.get(dtype, 2e-2)
    for got, expected in zip(*found, strict=True):
        assert truth.relative(got.double(), expected.double()) < tolerance


def test_heads_draw_by_their_own_logits(backend):
    """Bias, scale, soft-cap and padding of the vocabulary included; a seed draws the same again."""
    teacher = fixed(F32, bias=True, softcap=3.0, scale=0.5, padding_t=4).teacher
    drawn, again = (kd.TopK.sample(teacher, 7, generator=torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(drawn.indices, again.indices) and drawn.shape == teacher.shape
    z = truth.dense_logits(teacher, teacher.vocabulary)
    torch.testing.assert_close(drawn.log_probs, z.log_softmax(-1).gather(-1, drawn.indices), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("make", [lambda: kd.GKD(beta=0.5), kd.DistiLLM2, lambda: kd.VCRD(weighting="uniform")])
def test_an_objective_of_all_entries_is_that_of_the_teacher(backend, make):
    batch = fixed(F32)
    teacher, found = kd.Logits(truth.dense_logits(batch.teacher, 60).float()), []
    for one in (teacher, kd.TopK.sample(teacher, 60)):
        loss = run(make(), replace(batch, teacher=one)).loss
        found.append([loss.detach(), *torch.autograd.grad(loss, truth.leaves(batch.student))])
    for drawn, whole in zip(*reversed(found), strict=True):
        assert whole.norm() > 0 and truth.relative(drawn, whole) < 1e-4


def test_a_masked_entry_of_the_student_gets_no_gradient(backend):
    """As with the whole teacher, and what the others get does not depend on it."""
    z_s, z_t, found = logits(4).float(), logits(4, seed=1).float(), []
    z_s[:, [3, 30]] = -math.inf
    for teacher in (kd.TopK.sample(kd.Logits(z_t), V), kd.Logits(z_t)):
        z = z_s.clone().requires_grad_()
        found.append(torch.autograd.grad(kd.divergence(kd.Logits(z), teacher, kd.ForwardKL()).sum(), z)[0])
    assert (found[0][:, [3, 30]] == 0).all() and found[1].norm() > 0
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(0,), (2, 0), ()])
def test_leading_dimensions(backend, shape):
    drawn = kd.TopK.sample(kd.Logits(torch.zeros(*shape, V)), K)
    assert drawn.indices.shape == drawn.log_probs.shape == (*shape, K)
    assert kd.divergence(kd.Logits(torch.ones(*shape, V)), drawn, kd.JSD(0.5)).shape == shape


def test_a_teacher_that_is_not_finite_is_not_hidden(backend):
    z_t = logits(3).float()
    z_t[1, 5] = math.nan
    for k in (1, K, V):
        value = kd.divergence(kd.Logits(torch.zeros(3, V)), kd.TopK.sample(kd.Logits(z_t), k), kd.JSD(0.5))
        assert value.isnan().tolist() == [False, True, False]


# ---- what is refused ----

DRAWN_ENTRIES = {"indices": torch.tensor([[0, 1]]), "log_probs": torch.tensor([[-1.0, -2.0]])}
STUDENT = kd.Logits(torch.zeros(1, V))
BAD = {
    "reverse KL": (lambda: kd.divergence(STUDENT, kd.TopK(**DRAWN_ENTRIES, sampled=True), kd.ReverseKL()),
                   "divergence: expected one that is bounded where the teacher has no mass, got the reverse KL"),
    "JSD(1)": (lambda: kd.divergence(STUDENT, kd.TopK(**DRAWN_ENTRIES, sampled=True), kd.JSD(1)),
               "divergence: expected one that is bounded"),
    "SkewReverseKL(0)": (lambda: kd.divergence(STUDENT, kd.TopK(**DRAWN_ENTRIES, sampled=True), kd.SkewReverseKL(0)),
                         "divergence: expected one that is bounded"),
    "larger": (lambda: kd.divergence(STUDENT, kd.TopK.sample(kd.Logits(torch.zeros(1, 2 * V)), V), kd.JSD(0.5)),
               "; draw from a teacher that has the student's vocab_size"),
    "verify": (lambda: kd.TopK(**DRAWN_ENTRIES, sampled=True).verify(kd.Layout.from_labels(torch.tensor([[-100, 1]]))),
               "sampled: expected False: entries that a teacher drew"),
    "temperature": (lambda: kd.divergence(STUDENT, kd.TopK(**DRAWN_ENTRIES, sampled=True), kd.JSD(0.5), 2.0),
                    "temperature: expected 1 with a kd.TopK of sampled entries, got 2"),
    "both": (lambda: kd.TopK(**DRAWN_ENTRIES, sampled=True, renormalize=True), "renormalize: expected False"),
    "no bool": (lambda: kd.TopK(**DRAWN_ENTRIES, sampled=1), "sampled: expected a bool, got 1"),
    "entries": (lambda: kd.TopK.sample(kd.TopK(**DRAWN_ENTRIES), 2), "expected kd.Head or kd.Logits, got TopK"),
    "no source": (lambda: kd.TopK.sample(torch.zeros(1, V), 2), "teacher: expected kd.Head or kd.Logits, got Tensor"),
    "none": (lambda: kd.TopK.sample(STUDENT, 0), f"k: expected an int of 1 to {V}, got 0"),
    "too many": (lambda: kd.TopK.sample(STUDENT, V + 1), f"k: expected an int of 1 to {V}, got {V + 1}"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_errors_name_argument_expected_and_actual(name):
    call, said = BAD[name]
    with pytest.raises((TypeError, ValueError)) as error:
        call()
    assert said in str(error.value)


def test_the_whole_mass_may_be_rounded(backend):
    """fp32 log-probabilities of all entries sum up to 1 + rounding: nothing is negative or NaN."""
    z_t = logits(50, 3.0).float()
    drawn = kd.TopK.sample(kd.Logits(z_t), V)
    more = kd.TopK(drawn.indices, drawn.log_probs + 1e-6, sampled=True)
    value = kd.divergence(kd.Logits(z_t.clone()), more, kd.JSD(0.5))
    assert bool(value.isfinite().all()) and float(value.abs().max()) < 1e-5
    assert math.isfinite(reference.sampled_masses(more.log_probs.double()).sum())
