"""Intervals against published values and the properties that make them what they are."""

import numpy as np
import pytest

from kdkernels.demo.statistics import bootstrap_mean
from kdkernels.training.evaluation import wilson


@pytest.mark.parametrize(
    ("right", "problems", "low", "high"),
    [  # Newcombe, Statistics in Medicine 17 (1998), table I, method 3
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_against_published_intervals(right, problems, low, high):
    assert wilson(right, problems) == pytest.approx((low, high), abs=5e-5)
    assert wilson(problems - right, problems) == pytest.approx((1 - high, 1 - low), abs=5e-5)


@pytest.mark.parametrize(("right", "problems"), [(3, 2), (-1, 2), (0, 0)])
def test_wilson_refuses(right, problems):
    with pytest.raises(ValueError, match="right: expected 0 to"):
        wilson(right, problems)


def test_bootstrap_of_one_seed_is_that_of_the_problems():
    values = (np.arange(1000) % 10 < 3).astype(float)[None]  # mean 0.3
    low, high = bootstrap_mean(values)
    assert (high - low) / 2 == pytest.approx(1.96 * np.sqrt(0.3 * 0.7 / 1000), rel=0.06)
    assert (low + high) / 2 == pytest.approx(0.3, abs=0.004)


def test_pairing_removes_what_two_arms_share():
    rng = np.random.default_rng(5)
    hard = rng.random(800) < 0.5
    one = np.where(hard, 0.0, 1.0)[None]
    other = one.copy()
    other[0, :40] = 1.0  # differs on few problems only
    low, high = bootstrap_mean(other - one)
    assert 0 < low < (other - one).mean() < high < 0.05
    unpaired = 1.96 * np.sqrt(2 * 0.25 / 800)
    assert (high - low) / 2 < unpaired / 3


def test_seeds_that_disagree_widen_the_interval():
    problems = (np.arange(500) % 2).astype(float)
    agree = np.stack([problems] * 4)
    disagree = np.stack([problems * 0, problems * 0, problems * 0 + 1, problems * 0 + 1])
    assert agree.mean() == disagree.mean() == 0.5
    narrow, wide = bootstrap_mean(agree), bootstrap_mean(disagree)
    assert narrow[1] - narrow[0] < 0.1
    assert wide == (0.0, 1.0)


def test_equal_arms_differ_by_nothing_and_results_repeat():
    assert bootstrap_mean(np.zeros((2, 30))) == (0.0, 0.0)
    values = np.random.default_rng(0).normal(size=(3, 50))
    assert bootstrap_mean(values) == bootstrap_mean(values)
    assert bootstrap_mean(values, seed=1) != bootstrap_mean(values)


@pytest.mark.parametrize("shape", [(5,), (0, 4), (2, 3, 4)])
def test_bootstrap_refuses(shape):
    with pytest.raises(ValueError, match="expected a table"):
        bootstrap_mean(np.zeros(shape))
