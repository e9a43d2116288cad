"""A vocabulary in parts, as in a head whose entries are divided among devices. What the kernels sum up in each part is
added; values and gradients then are those of the whole vocabulary, against fp64.

Axes: C tokens, V vocabulary.
"""

from dataclasses import replace
from itertools import pairwise
from unittest.mock import patch

import pytest
import torch
import truth
from test_rows import F32, F64, FAMILY, INF, NAN, Weights, distribution, z_of
from truth import assert_accurate

from kdkernels import reference
from kdkernels.kernels import Coefficients, backend_for, finished, merged

CUTS = (0, 37, 170, 301)
PARTS = [slice(*each) for each in pairwise(CUTS)]
SCALE = 0.5
MASKED = 2  # the token all of whose entries are masked


def logits(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Of three tokens. Both models mask an entry everywhere, all of two parts of the second token, all of the third."""
    x_s, x_t = distribution("normal", 3, 301, dtype)
    for x in (x_s, x_t):
        x[:, 40] = -INF
        x[1, PARTS[0]] = x[1, PARTS[2]] = -INF
        x[MASKED] = -INF
    return x_s, x_t


def weights_of(dtype: torch.dtype) -> Weights:
    """Coefficients of every term; ids in all parts, twice the same among them."""
    weights = Weights.random(3, 301)
    weights.ids[:] = torch.tensor([100, 101, 38, 100, 169])
    weights.ids[0] = torch.tensor([0, 36, 37, 300, 300])
    wide = torch.promote_types(dtype, F32)
    return Weights(weights.dense.to(wide), weights.ids, weights.scatter.to(wide))


def stats_of(parts) -> torch.Tensor:
    return torch.stack([part.stats for part in parts])


def from_parts(x_s, x_t, divergence, temperature, weights):
    """Value and gradient as a divided head computes them: a part has its own logits and what all parts add up to."""
    backend = backend_for(x_s.device, x_s.dtype)

    def rows(x):
        return [backend.statistics(x[:, part].clone(), SCALE, None, temperature, 1, None) for part in PARTS]

    students, teachers = rows(x_s), rows(x_t)
    s_stats, t_stats = (merged(stats_of(parts), temperature) for parts in (students, teachers))
    students = [replace(each, stats=s_stats) for each in students]
    teachers = [replace(each, stats=t_stats) for each in teachers]
    pairs = list(zip(students, teachers, strict=True))
    value, sums = finished([backend.divergence_sums(s, t, divergence, temperature) for s, t in pairs], s_stats.dtype)
    for part, (s, t) in zip(PARTS, pairs, strict=True):
        here = (weights.ids >= part.start) & (weights.ids < part.stop)
        ids, scatter = torch.where(here, weights.ids - part.start, 0), torch.where(here, weights.scatter, 0)
        coefficients = Coefficients(weights.dense, ids, scatter)
        backend.gradient_(s, t, divergence, temperature, sums, coefficients, s.logits)
    return value, torch.cat([s.logits for s in students], 1)


def by_autograd(x_s, x_t, name, temperature, weights, dtype):
    """The same over the entries that are not masked, in ``dtype``; the gradient in the logits' own."""
    x = x_s.to(torch.promote_types(dtype, x_s.dtype) if dtype == F64 else x_s.dtype, copy=True).requires_grad_()
    values, loss = [], 0.0
    for token in range(len(x)):
        seen = ~torch.isinf(x_s[token])
        z, z_t = (SCALE * each[token, seen][None].to(dtype) for each in (x, x_t))
        values.append(truth.divergence(z, z_t, name, temperature) if seen.any() else z.new_full((1,), NAN))
        if seen.any():
            c_divergence, c_entropy, c_softmax = weights.dense[:, token].to(dtype)
            loss = loss + c_divergence * values[-1] + c_entropy * truth.entropy(z) + c_softmax * z.logsumexp(-1)
            loss = loss + (weights.scatter[token].to(dtype) * SCALE * x[token, weights.ids[token]].to(dtype)).sum()
    return torch.cat(values).detach(), torch.autograd.grad(loss.sum(), x)[0]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("name", FAMILY)
def test_values_and_gradients_are_those_of_the_whole(dtype, name, temperature):
    """A part in which all of a token's entries are masked contributes nothing; a token without any entry is NaN."""
    (x_s, x_t), weights = logits(dtype), weights_of(dtype)
    value, got = from_parts(x_s, x_t, truth.DIVERGENCES[name][0], temperature, weights)
    exact, exact_gradient = by_autograd(x_s, x_t, name, temperature, weights, F64)
    assert value[MASKED].isnan() and got[MASKED].isnan().all()
    value, exact, got, exact_gradient = (each[:MASKED] for each in (value, exact, got, exact_gradient))
    assert (got[torch.isinf(x_s[:MASKED])] == 0).all() and (got != 0).any(1).all()
    if dtype == F64:
        assert truth.relative(value, exact) < 1e-12 and truth.relative(got, exact_gradient) < 1e-12
        return
    narrow, narrow_gradient = by_autograd(x_s, x_t, name, temperature, weights, F32)
    assert_accurate(value, narrow[:MASKED], exact, "value")
    assert_accurate(got, narrow_gradient[:MASKED], exact_gradient, "gradient", F32)


@pytest.mark.parametrize("name", ["jsd.1", "jsd.9", "skl", "srkl"])
@pytest.mark.parametrize("who", ["student", "teacher"])
def test_parts_that_only_one_model_masks(backend, who, name):
    """Interior mixtures are finite there."""
    x_s, x_t = distribution("normal", 3, 301)
    masking = x_s if who == "student" else x_t
    masking[1, PARTS[0]] = masking[2, PARTS[0]] = masking[2, PARTS[1]] = -INF
    weights, divergence = weights_of(F32), truth.DIVERGENCES[name][0]
    weights.dense[1:], weights.scatter[:] = 0, 0
    value, got = from_parts(x_s, x_t, divergence, 0.7, weights)
    z_s, z_t = SCALE * x_s.double(), SCALE * x_t.double()
    assert truth.relative(value, reference.divergence(z_s, z_t, divergence, 0.7)) < 1e-6
    expected = SCALE * weights.dense[0, :, None] * reference.divergence_gradient(z_s, z_t, divergence, 0.7)
    for token in range(3):
        assert truth.relative(got[token], expected[token]) < 1e-5
    assert (got[torch.isinf(x_s)] == 0).all()


@pytest.mark.parametrize("scale", [1, 3, 10])
@pytest.mark.parametrize("name", FAMILY)
def test_parts_round_as_the_whole_does(backend, name, scale):
    """Over so many tokens that chance does not decide: gradients in parts are as near to fp64 as in one piece."""
    generator = torch.Generator().manual_seed(0)
    x_s, x_t = (scale * torch.randn(200, 301, generator=generator) for _ in range(2))
    weights, divergence = Weights.random(200, 301), truth.DIVERGENCES[name][0]
    weights = Weights(weights.dense.float(), weights.ids, weights.scatter.float())
    weights.dense[0], weights.dense[1:], weights.scatter[:] = 1 / SCALE, 0, 0
    exact = reference.divergence_gradient(SCALE * x_s.double(), SCALE * x_t.double(), divergence, 1.0)
    errors = []
    for parts in (PARTS, [slice(0, 301)]):
        with patch.dict(globals(), PARTS=parts):
            errors.append(truth.relative(from_parts(x_s, x_t, divergence, 1.0, weights)[1], exact))
    in_parts, whole = errors
    assert 0 < in_parts < 1.3 * whole + 2e-8, f"{in_parts:.3g} in parts, {whole:.3g} in one piece"


@pytest.mark.parametrize("who", ["student", "teacher"])
def test_a_nan_among_masked_entries_is_not_overlooked(backend, who):
    """A part of nothing but masked entries and a NaN does not count as masked."""
    x_s, x_t = distribution("normal", 3, 301)
    clean = from_parts(x_s, x_t, truth.DIVERGENCES["jsd.9"][0], 0.7, weights_of(F32))
    spoilt = x_s if who == "student" else x_t
    for part in PARTS:
        spoilt[1, part] = -INF
    spoilt[1, 5], spoilt[1, 200] = NAN, 1.0
    value, got = from_parts(x_s, x_t, truth.DIVERGENCES["jsd.9"][0], 0.7, weights_of(F32))
    assert value[1].isnan() and got[1].isnan().all()
    others = [0, 2]
    assert torch.equal(value[others], clean[0][others]) and torch.equal(got[others], clean[1][others])


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("cuts", [(0, 1000, 2047), (0, 64, 700, 1300, 2047)], ids=str)
@pytest.mark.parametrize("name", ["normal", "peaked", "huge", "masked"])
def test_statistics_are_merged(backend, name, cuts, temperature):
    """As close to fp64 as in one piece; a token that is masked everywhere has the statistics of such a row."""
    x, _ = distribution(name, 7, 2047, F32)
    x[2, : cuts[1]] = -INF
    x[3] = -INF
    rows = backend_for(x.device, F32)
    parts = [rows.statistics(x[:, a:b].clone(), 2.0, None, temperature, 1, None) for a, b in pairwise(cuts)]
    got, whole = merged(stats_of(parts), temperature), rows.statistics(x.clone(), 2.0, None, temperature, 1, None)
    kept = torch.arange(7) != 3
    assert got.dtype == whole.stats.dtype == F32 and torch.equal(got[kept, 0], whole.max[kept])
    nothing = torch.tensor([NAN, NAN, NAN, NAN, 0, 0, NAN])
    for found in (got[3], whole.stats[3]):
        torch.testing.assert_close(found, nothing, rtol=0, atol=0, equal_nan=True)
    z = z_of(x[kept].double(), 2.0, None)
    z = z - z.max(-1, keepdim=True).values
    q = z.softmax(-1)
    mean, sums = (q * z.clamp_min(-1e30)).sum(-1), (z.logsumexp(-1), (z / temperature).logsumexp(-1))
    exact = torch.stack([sums[0], sums[0] - mean, sums[1], sums[0].exp(), sums[1].exp(), mean], 1)
    for found in (got[kept, 1:], whole.stats[kept, 1:]):
        torch.testing.assert_close(found.double(), exact, rtol=2e-6, atol=2e-6)
    assert exact.norm() > 0
