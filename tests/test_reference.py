"""The specification itself: the worked example, gradcheck in fp64, closed-form gradients, and the corners."""

import math

import pytest
import torch
import truth
from batches import random_batch

import kdkernels as kd
from kdkernels import reference

F64 = torch.float64
Z_S = torch.tensor([[2.0, 1.0, 0.0, -1.0]], dtype=F64)
Z_T = torch.tensor([[0.0, 3.0, 1.0, -1.0]], dtype=F64)
INF = float("inf")
DIVERGENCES = [pytest.param(divergence, id=name) for name, (divergence, _) in truth.DIVERGENCES.items()]


def close(got, expected, tolerance=1e-12):
    torch.testing.assert_close(
        torch.as_tensor(got, dtype=F64), torch.as_tensor(expected, dtype=F64), rtol=0, atol=tolerance
    )


# ---- the worked example ----------------------------------------------------------------------------------------------


def test_example_entropies_and_gate():
    h_s, h_t = reference.entropy(Z_S), reference.entropy(Z_T)
    close(h_s, [0.947537], 1e-6)
    close(h_t, [0.595087], 1e-6)
    close(reference.gate(h_s, h_t, tau=1.0), [0.587212], 1e-6)


@pytest.mark.parametrize(
    ("divergence", "expected"),
    [
        (kd.ForwardKL(), 0.946628),
        (kd.ReverseKL(), 1.471911),
        (kd.JSD(0.1), 0.084775),
        (kd.JSD(0.5), 0.249246),
        (kd.JSD(0.9), 0.113819),
        (kd.SkewKL(0.1), 0.762350),
        (kd.SkewReverseKL(0.1), 0.909405),
        (kd.JSD(0.0), 0.946628),
        (kd.JSD(1.0), 1.471911),
    ],
)
def test_example_divergences(divergence, expected):
    close(reference.divergence(Z_S, Z_T, divergence), [expected], 1e-6)


@pytest.mark.parametrize(("k", "expected"), [(3, 3.534534), (2, 1.313262)])
def test_example_plackett_luce(k, expected):
    chosen = reference.candidates(Z_S, k)
    assert chosen.tolist() == [list(range(k))]
    order = reference.teacher_order(Z_T.gather(-1, chosen), Z_T.max(-1).values)
    assert order.tolist() == [[1, 2, 0][:k] if k == 3 else [1, 0]]
    close(reference.plackett_luce(Z_S.gather(-1, chosen.gather(-1, order))), [expected], 1e-6)


def test_example_plackett_luce_gradient():
    _, in_order = reference.plackett_luce_with_gradient(Z_S[:, [1, 2, 0]])
    close(in_order, [[-0.755272, -0.790767, 1.546038]], 1e-6)


@pytest.mark.parametrize(("share", "m"), [(0.6, 2), (0.1, 1)])
def test_example_opener(share, m):
    h = torch.tensor([2, 0.5, 0.1, 1, 0.2, 0.2], dtype=F64)
    assert reference.opener(h, share).tolist() == [True] * m + [False] * (6 - m)


# ---- gradients -------------------------------------------------------------------------------------------------------


def logits(rows=3, vocabulary=7, seed=0):
    torch.manual_seed(seed)
    return 2 * torch.randn(rows, vocabulary, dtype=F64), 2 * torch.randn(rows, vocabulary, dtype=F64)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_divergence_gradcheck(divergence, temperature):
    z_s, z_t = logits()
    assert torch.autograd.gradcheck(
        lambda z: reference.divergence(z, z_t, divergence, temperature), z_s.requires_grad_(), atol=1e-8
    )


def test_other_values_gradcheck():
    z, _ = logits()
    z.requires_grad_()
    target = torch.tensor([0, 3, 6])
    assert torch.autograd.gradcheck(reference.entropy, z, atol=1e-8)
    assert torch.autograd.gradcheck(lambda z: reference.cross_entropy(z, target), z, atol=1e-8)
    assert torch.autograd.gradcheck(reference.plackett_luce, z, atol=1e-8)
    hidden, weight, bias = (torch.randn(*s, dtype=F64, requires_grad=True) for s in ((3, 4), (5, 4), (5,)))
    assert torch.autograd.gradcheck(lambda *x: reference.logits(*x, scale=0.5, softcap=3.0), (hidden, weight, bias))


def test_objectives_gradcheck():
    torch.manual_seed(1)
    z_s, z_t = (
        [2 * torch.randn(n, 9, dtype=F64) for n in (6, 1, 4)],
        [2 * torch.randn(n, 9, dtype=F64) for n in (6, 1, 4)],
    )
    target = [torch.randint(0, 9, (len(z),)) for z in z_s]
    inputs = tuple(z.requires_grad_() for z in z_s)
    options = {"k": 4, "opener_share": 0.4, "entropy_ratio": 0.3, "tau": 0.5, "temperature": 1.3}
    assert torch.autograd.gradcheck(lambda *z: reference.gkd(list(z), z_t, 0.3, 2.0), inputs, atol=1e-8)
    assert torch.autograd.gradcheck(lambda *z: reference.sft(list(z), target), inputs, atol=1e-8)
    # gate and selection are constants to the gradient, so only the terms without a gate can be differenced
    assert torch.autograd.gradcheck(
        lambda *z: reference.tsd_kd(list(z), z_t, direct_weight=0.0, **options), inputs, atol=1e-8
    )


def test_the_gate_is_a_constant():
    z_s, z_t = logits()
    z_s.requires_grad_()
    loss = reference.tsd_kd([z_s], [z_t], indirect_weight=0.0, entropy_weight=0.0, k=2)
    gate = reference.gate(reference.entropy(z_s), reference.entropy(z_t), 1.0)
    assert not gate.requires_grad
    expected = (gate * truth.divergence(z_s, z_t, "jsd.9")).mean()
    close(loss.detach(), expected.detach())
    close(torch.autograd.grad(loss, z_s)[0], torch.autograd.grad(expected, z_s)[0])


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_divergence_closed_form(divergence, temperature):
    z_s, z_t = logits(seed=2)
    z_s.requires_grad_()
    (expected,) = torch.autograd.grad(reference.divergence(z_s, z_t, divergence, temperature).sum(), z_s)
    close(reference.divergence_gradient(z_s.detach(), z_t, divergence, temperature), expected)


def test_entropy_and_plackett_luce_closed_form():
    z, _ = logits(seed=3)
    z.requires_grad_()
    for value, gradient in (
        (reference.entropy, reference.entropy_gradient),
        (reference.plackett_luce, lambda z: reference.plackett_luce_with_gradient(z)[1]),
    ):
        (expected,) = torch.autograd.grad(value(z).sum(), z)
        close(gradient(z.detach()), expected)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("name", truth.DIVERGENCES)
def test_divergence_against_the_formulas(name, temperature):
    z_s, z_t = logits(seed=4)
    close(
        reference.divergence(z_s, z_t, truth.DIVERGENCES[name][0], temperature),
        truth.divergence(z_s, z_t, name, temperature),
    )


# ---- corners ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_masked_entries_are_as_if_absent(divergence):
    """-inf on both sides: value and gradient of the other entries stay, the gradient of the masked ones is 0."""
    z_s, z_t = logits()
    masked_s, masked_t = z_s.clone(), z_t.clone()
    masked_s[:, [1, 4]] = masked_t[:, [1, 4]] = -INF
    rest = [0, 2, 3, 5, 6]
    close(
        reference.divergence(masked_s, masked_t, divergence),
        reference.divergence(z_s[:, rest], z_t[:, rest], divergence),
    )
    gradient = reference.divergence_gradient(masked_s, masked_t, divergence)
    close(gradient[:, rest], reference.divergence_gradient(z_s[:, rest], z_t[:, rest], divergence))
    assert (gradient[:, [1, 4]] == 0).all()


def test_masked_entries_in_the_entropy():
    z, _ = logits()
    masked = z.clone()
    masked[:, 2] = -INF
    rest = [0, 1, 3, 4, 5, 6]
    close(reference.entropy(masked), reference.entropy(z[:, rest]))
    gradient = reference.entropy_gradient(masked)
    close(gradient[:, rest], reference.entropy_gradient(z[:, rest]))
    assert (gradient[:, 2] == 0).all()


@pytest.mark.parametrize("divergence", [kd.JSD(0.3), kd.SkewKL(0.1), kd.SkewReverseKL(0.1)], ids=lambda k: k.name)
def test_interior_mixtures_survive_entries_only_one_side_masks(divergence):
    z_s, z_t = logits()
    z_s[0, 1] = z_t[1, 2] = z_s[2, 3] = z_t[2, 3] = -INF
    value, gradient = reference.divergence(z_s, z_t, divergence), reference.divergence_gradient(z_s, z_t, divergence)
    assert value.isfinite().all() and (value > 0).all()
    assert gradient.isfinite().all() and gradient[0, 1] == gradient[2, 3] == 0
    close(gradient.sum(-1), torch.zeros(3))


def test_the_kl_of_an_entry_the_other_side_masks_is_infinite():
    z_s, z_t = logits(rows=1)
    z_t[0, 2] = -INF
    assert reference.divergence(z_s, z_t, kd.ReverseKL()).item() == INF
    assert reference.divergence(z_t, z_s, kd.ForwardKL()).item() == INF


def test_log_mixture_of_vanishing_probabilities():
    log_p, log_q = (
        torch.tensor([-2000.0, -2000.0, -INF, -INF], dtype=F64),
        torch.tensor([-2000.0, -3000.0, -5.0, -INF], dtype=F64),
    )
    close(reference.log_mixture(log_p, log_q, 0.25)[:3], [-2000.0, -2000 + math.log(0.25), -5 + math.log(0.75)])
    assert reference.log_mixture(log_p, log_q, 0.25)[3] == -INF
    assert reference.log_mixture(log_p, log_q, 0.0) is log_q
    assert reference.log_mixture(log_p, log_q, 1.0) is log_p


def test_vanishing_probabilities_in_float32():
    """A probability-space mixture is NaN below exp(-104)."""
    z_s, z_t = torch.tensor([[0.0, -200.0, -300.0]]), torch.tensor([[0.0, -300.0, -200.0]])
    for divergence, _ in truth.DIVERGENCES.values():
        assert reference.divergence(z_s, z_t, divergence).isfinite().all(), divergence.name
        assert reference.divergence_gradient(z_s, z_t, divergence).isfinite().all(), divergence.name


def test_an_entry_whose_probability_underflows_keeps_its_gradient():
    """exp(-300) is 0 in fp32, but the forward KL still pulls with -p, and the reverse KL with nothing."""
    z_s, z_t = torch.tensor([[0.0, -300.0]]), torch.tensor([[-300.0, 0.0]])
    assert reference.divergence_gradient(z_s, z_t, kd.ForwardKL()).tolist() == [[1.0, -1.0]]
    assert reference.divergence_gradient(z_s, z_t, kd.ReverseKL()).tolist() == [[0.0, 0.0]]
    z_s, z_t = torch.tensor([[1e4, 0.0]], dtype=F64), torch.tensor([[0.0, 1e4]], dtype=F64)
    for divergence, _ in truth.DIVERGENCES.values():
        assert reference.divergence_gradient(z_s, z_t, divergence).isfinite().all(), divergence.name


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_ends_of_the_skew_divergences(alpha):
    """alpha = 0 is the plain KL; at 1 the mixture is the first argument itself: 0."""
    z_s, z_t = logits()
    zero = torch.zeros(3, dtype=F64)
    forward, reverse = truth.divergence(z_s, z_t, "forward"), truth.divergence(z_s, z_t, "reverse")
    close(reference.divergence(z_s, z_t, kd.SkewKL(alpha)), zero if alpha else forward)
    close(reference.divergence(z_s, z_t, kd.SkewReverseKL(alpha)), zero if alpha else reverse)
    if alpha:
        for divergence in (kd.SkewKL(alpha), kd.SkewReverseKL(alpha)):
            assert (reference.divergence_gradient(z_s, z_t, divergence) == 0).all()


@pytest.mark.parametrize("beta", [0.1, 0.5, 0.9])
def test_jsd_is_symmetric_under_exchange(beta):
    z_s, z_t = logits()
    close(reference.divergence(z_s, z_t, kd.JSD(beta)), reference.divergence(z_t, z_s, kd.JSD(1 - beta)))


def test_candidate_ties_go_to_the_smaller_index():
    z = torch.tensor([[1.0, 5.0, 5.0, 0.0, 5.0, 1.0]])
    assert reference.candidates(z, 5).tolist() == [[1, 2, 4, 0, 5]]


def test_teacher_ties_go_to_the_students_rank():
    assert order_of([1.0, 3.0, 1.0, 3.0]).tolist() == [[1, 3, 0, 2]]


@pytest.mark.parametrize(
    "masks", [(-math.inf, -math.inf), (-3.4e38, -3.3e38), (-65504.0, -65472.0), (-1e30, -math.inf)]
)
def test_entries_that_the_teacher_masks_rank_last_by_the_students_rank(masks):
    """A mask's own value says nothing: -65504 plus a logit is another number for each entry."""
    first, second = masks
    assert order_of([1.0, first, 3.0, second, 2.0]).tolist() == [[2, 4, 0, 1, 3]]
    assert order_of([1.0, second, 3.0, first, 2.0]).tolist() == [[2, 4, 0, 1, 3]]
    assert order_of([first, second], top=7.0).tolist() == order_of([second, first], top=7.0).tolist() == [[0, 1]]


def order_of(teacher, top=None):
    z = torch.tensor([teacher])
    return reference.teacher_order(z, z.max(-1).values if top is None else torch.tensor([top]))


@pytest.mark.parametrize("mask", [-math.inf, -3.4e38, -65504.0])
@pytest.mark.parametrize("places", [(0,), (2,), (4,), (0, 1, 3), (0, 1, 2, 3, 4)])
def test_plackett_luce_ranks_the_entries_that_exist(mask, places):
    """Masked candidates change nothing, wherever the teacher ranks them."""
    torch.manual_seed(5)
    entries = torch.randn(3, 4, dtype=F64, requires_grad=True)
    ranked, left = [], list(entries.unbind(-1))
    for place in range(4 + len(places)):
        ranked.append(torch.full((3,), mask, dtype=F64) if place in places else left.pop(0))
    value = reference.plackett_luce(torch.stack(ranked, -1))
    expected = truth.plackett_luce(entries)
    close(value, expected.tolist(), 1e-12)
    (gradient,) = torch.autograd.grad(expected.sum(), entries)
    _, got = reference.plackett_luce_with_gradient(torch.stack(ranked, -1))
    masked = torch.tensor([place in places for place in range(4 + len(places))])
    assert (got[:, masked] == 0).all() and (got[:, ~masked] - gradient).abs().max() < 1e-12
    (through,) = torch.autograd.grad(value.sum(), entries)
    assert (through - gradient).abs().max() < 1e-12 and gradient.norm() > 0


def test_plackett_luce_of_no_entry_or_of_nan_is_nan():
    for row in ([-math.inf] * 3, [1.0, math.nan, 0.0]):
        z = torch.tensor([row])
        value, gradient = reference.plackett_luce_with_gradient(z)
        assert value.isnan().all() and gradient.isnan().any()


@pytest.mark.parametrize(
    ("h", "share", "m"),
    [
        ([0.0, 0.0, 0.0], 0.5, 1),  # no entropy at all
        ([1.0], 0.1, 1),
        ([1.0, 1.0, 1.0, 1.0], 0.0, 1),
        ([1.0, 1.0, 1.0, 1.0], 0.5, 2),  # reached exactly
        ([1.0, 1.0, 1.0, 1.0], 0.51, 3),
        ([0.0, 0.0, 1.0, 0.0], 0.1, 3),
        ([1.0, 1.0, 0.0, 0.0], 1.0, 2),  # nothing after the last entropy is needed
    ],
)
def test_opener(h, share, m):
    got = reference.opener(torch.tensor(h), share)
    assert got.tolist() == [True] * m + [False] * (len(h) - m)


@pytest.mark.parametrize(("length", "n"), [(1, 1), (4, 1), (5, 1), (14, 1), (15, 2), (24, 2), (25, 3), (100, 10)])
def test_number_of_uncertain_tokens(length, n):
    assert reference.most_uncertain(torch.rand(length, dtype=F64), 0.1).sum() == n


def test_uncertain_ties_go_to_the_earlier():
    h = torch.tensor([1.0, 3.0, 2.0, 3.0, 2.0, 2.0])
    assert reference.most_uncertain(h, 0.5).tolist() == [False, True, True, True, False, False]


def test_objectives_against_the_formulas():
    """reference.tsd_kd, gkd and sft on ragged batches against an independent, token-by-token selection."""
    for seed in range(5):
        mask = torch.rand(4, 11, generator=torch.Generator().manual_seed(seed)) < 0.7
        batch = random_batch(seed, mask, vocabulary=20)
        z_s, z_t = truth.token_logits(batch)
        parts = truth.slices(batch)
        s, t = [z_s[r] for r in parts], [z_t[r] for r in parts]
        selection = truth.select(batch, k=4, opener=0.3, ratio=0.25)
        got = reference.tsd_kd(s, t, 0.7, 0.5, 4, 0.3, 0.25, 0.2, 1.5, 0.8, 1.2)
        close(got.detach(), sum(truth.tsd_kd(batch, selection, 0.7, 0.5, 1.2, 0.2, 1.5, 0.8).values()).detach())
        close(reference.gkd(s, t, 0.3, 2.0).detach(), truth.gkd(batch, 0.3, 2.0).detach())
        y = batch.target.flatten()[torch.tensor([i for r in batch.responses for i in r])]
        close(reference.sft(s, [y[r] for r in parts]).detach(), truth.sft(batch).detach())
