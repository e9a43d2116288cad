"""TSD-KD's adaptive opener: the reference, the window's life, and the objective that uses it."""

import copy
import math

import pytest
import torch
import truth
from batches import fixed, loss_of, random_batch, run
from hypothesis import given, settings
from hypothesis import strategies as st
from products import Products
from test_chunks import budget

import kdkernels as kd
from kdkernels import reference

F32, F64 = torch.float32, torch.float64
EDGES, SHARES = (-0.2, 0.3), (0.1, 0.4, 0.8)


def opener(**more) -> kd.AdaptiveOpener:
    return kd.AdaptiveOpener(EDGES, SHARES, **{"window": 3, **more})


def adaptive() -> kd.TSDKD:
    return kd.TSDKD(k=4, opener=opener())


def layout_of(lengths: list[int]) -> kd.Layout:
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return kd.Layout.from_mask(mask)


def shares_of(module: kd.AdaptiveOpener, gaps: list[float]) -> list[float]:
    """Of responses of one token each."""
    gaps = torch.tensor(gaps, dtype=F64)
    return module(1 + gaps, torch.ones_like(gaps), layout_of([1] * len(gaps))).tolist()


# ---- the rule --------------------------------------------------------------------------------------------------------


def test_reference_by_hand():
    """Averages over 3: -.5, -.125, .25, .75 and, the first two gone, .5; a lower edge belongs to its interval."""
    gaps = torch.tensor([-0.5, 0.25, 1.0, 1.0, -0.5], dtype=F64)
    got = reference.adaptive_shares(gaps, gaps[:0], (-0.2, 0.5), SHARES, window=3)
    assert got.tolist() == [0.1, 0.4, 0.4, 0.8, 0.8]
    assert reference.adaptive_shares(gaps[:1], gaps.new_tensor([9.0, 2.0]), EDGES, SHARES, window=3) == 0.8
    assert reference.adaptive_shares(gaps[:1], gaps.new_tensor([9.0, 2.0]), EDGES, SHARES, window=1) == 0.1


GAPS = st.lists(st.floats(-1, 1, width=16), min_size=1, max_size=9)


@settings(deadline=None, derandomize=True)
@given(
    batches=st.lists(GAPS, min_size=1, max_size=4), window=st.integers(1, 6), lengths=st.randoms(use_true_random=False)
)
def test_batches_are_one_sequence(batches, window, lengths):
    module, seen = opener(window=window), []
    for gaps in batches:
        tokens = [lengths.randint(1, 4) for _ in gaps]
        entropy = torch.cat([torch.full((n,), 2.0 + gap, dtype=F64) for n, gap in zip(tokens, gaps, strict=True)])
        got = module(entropy, torch.full_like(entropy, 2.0), layout_of(tokens))
        expected = reference.adaptive_shares(
            torch.tensor(gaps, dtype=F64), torch.tensor(seen, dtype=F64), EDGES, SHARES, window
        )
        assert torch.equal(got, expected)
        seen = [*seen, *gaps][-window:]
    assert module.gaps[-len(seen) :].tolist() == seen and module.gaps[: -len(seen)].isnan().all()


def test_the_gap_is_a_mean_over_tokens():
    module = opener()
    module(torch.tensor([1.0, 2.0, 6.0]), torch.tensor([0.5, 0.5, 1.0]), layout_of([2, 1]))
    assert module.gaps[-2:].tolist() == [1.0, 5.0] and module.gaps[0].isnan()


def test_evaluation_only_looks():
    module = opener()
    shares_of(module, [1.0, -0.8, 0.7])
    before = module.gaps.clone()
    module.eval()
    assert shares_of(module, [5.0, -5.0, 0.1]) == [0.8, 0.1, 0.4], "each with the window, not with the others"
    assert torch.equal(module.gaps, before)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_bad_response_is_absent_from_the_window(bad):
    module = opener()
    got = shares_of(module, [1.0, bad, -0.8, -0.4])  # averages 1, -, .1, -.6
    assert got[0] == 0.8 and got[2:] == [0.4, 0.1]
    assert module.gaps.isnan().sum() == 1


def test_the_window_is_saved():
    module = adaptive()
    shares_of(module.opener, [1.0, 0.5])
    other = adaptive()
    other.load_state_dict(module.state_dict())
    assert other.opener.gaps[1:].tolist() == [1.0, 0.5]
    module.bfloat16()
    assert shares_of(module.opener, [1.0, 0.5]) == [0.8, 0.8], "a model cast to bf16 casts the window"


# ---- the objective ---------------------------------------------------------------------------------------------------


def exact_loss(batch: truth.Batch, history: torch.Tensor, **options) -> tuple[torch.Tensor, torch.Tensor]:
    """reference.tsd_kd with the reference's shares, and the gaps."""
    z_s, z_t = truth.token_logits(batch)
    parts = truth.slices(batch)
    gaps = torch.stack([(truth.entropy(z_s[r]) - truth.entropy(z_t[r])).mean() for r in parts]).detach()
    shares = reference.adaptive_shares(gaps, history, EDGES, SHARES, window=3).tolist()
    loss = reference.tsd_kd([z_s[r] for r in parts], [z_t[r] for r in parts], opener_share=shares, k=4, **options)
    return loss, gaps


def test_training_is_the_reference(backend):
    """Three steps on end: the window goes from one to the next."""
    dtype = F64 if backend == "eager" else F32
    objective, history, used = adaptive(), torch.zeros(0, dtype=F64), set()
    for seed in range(3):
        mask = torch.rand(4, 11, generator=torch.Generator().manual_seed(seed)) < 0.7
        batch = random_batch(seed, mask, vocabulary=40, dtype=dtype)
        batch.mask = kd.Layout.from_segments(mask.long())  # gaps are tokens that do not count
        small = batch.to(dtype)
        loss = run(objective, small).loss
        expected, gaps = exact_loss(batch, history)
        tolerance = 1e-10 if dtype == F64 else 1e-5
        assert abs(loss - expected) <= tolerance * abs(expected)
        got, exact = truth.gradients(loss, small.student), truth.gradients(expected, batch.student)
        assert all(truth.relative(g, e) < tolerance for g, e in zip(got, exact, strict=True))
        samples = torch.cat([history, gaps])
        used |= set(reference.adaptive_shares(gaps, history, EDGES, SHARES, 3).tolist())
        history = samples[-3:]
        torch.testing.assert_close(objective.opener.gaps, history, rtol=1e-5, atol=1e-6)
    assert len(used) >= 2, "one interval alone proves little"


@pytest.mark.parametrize("tokens", [1, 4, 12, 24])
def test_chunks_change_nothing(backend, tokens):
    """Whole responses, pieces of one that is longer than a chunk, teacher sub-chunks: the same shares and window."""
    dtype = F64 if backend == "eager" else F32
    batch = fixed(dtype, (5, 1, 9, 0, 3, 30, 2, 7), longest=30)
    whole, several = adaptive(), adaptive()
    expected = run(whole, batch)
    got = run(several, batch, memory_budget=budget(adaptive, batch, tokens))
    tolerance = 1e-12 if dtype == F64 else 1e-6
    assert got.metrics["opener_share"] == expected.metrics["opener_share"]
    torch.testing.assert_close(several.opener.gaps, whole.opener.gaps, rtol=tolerance, atol=tolerance)
    pairs = zip(truth.gradients(got.loss, batch.student), truth.gradients(expected.loss, batch.student), strict=True)
    assert all(truth.relative(g, e) < tolerance for g, e in pairs)


def test_it_costs_one_product_with_the_teachers_head(backend):
    batch = fixed()
    with Products() as fixed_share:
        loss_of(lambda: kd.TSDKD(k=4), batch)
    with Products() as adaptive_share:
        loss_of(adaptive, batch)
    assert len(adaptive_share.shapes) == len(fixed_share.shapes) + 1
    assert adaptive_share.between(18, 12, 60) == 2


def test_a_second_backward_neither_moves_nor_reads_the_window(backend):
    batch, objective = fixed(), adaptive()
    loss = run(objective, batch).loss
    after = objective.opener.gaps.clone()
    first = torch.autograd.grad(loss, truth.leaves(batch.student), retain_graph=True)
    objective.opener.gaps.fill_(-9.0)  # what a later step may have left there
    second = torch.autograd.grad(loss, truth.leaves(batch.student))
    assert (objective.opener.gaps == -9.0).all() and after[-1].isfinite()
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not torch.equal(torch.autograd.grad(run(objective, batch).loss, batch.student.weight)[0], first[1]), (
        "another window would have been another gradient"
    )


def test_no_grad_and_evaluation(backend):
    batch, objective = fixed(), adaptive()
    trained = copy.deepcopy(objective)
    with torch.no_grad():
        run(trained, batch)
    assert trained.opener.gaps.isfinite().all(), "training mode, not grad mode, moves the window"
    objective.eval()
    run(objective, batch)
    assert objective.opener.gaps.isnan().all()


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"edges": (0.3, 0.1)}, ["edges", "increasing", "0.3"]),
        ({"edges": (math.nan,), "shares": (0.1, 0.2)}, ["edges", "finite", "nan"]),
        ({"edges": (0.1,)}, ["shares", "2", "3"]),
        ({"shares": (0.1, 0.2, 1.5)}, ["shares", "[0, 1]", "1.5"]),
        ({"window": 0}, ["window", "1", "0"]),
        ({"window": 2.5}, ["window", "int", "2.5"]),
    ],
)
def test_bad_options(options, told):
    with pytest.raises((TypeError, ValueError), match=told[0]) as raised:
        kd.AdaptiveOpener(**options)
    assert all(part in str(raised.value) for part in told), str(raised.value)
