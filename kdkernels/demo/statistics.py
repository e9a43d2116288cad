"""Intervals for shares of right answers.

Shapes: S seeds, P held-out problems, R resamples.
"""

import math

import numpy as np

Z95 = 1.959963984540054  # standard normal quantile of 0.975
RESAMPLES = 4000


def wilson(right: int, problems: int) -> tuple[float, float]:
    """The 95 % score interval of a share of `right` among `problems` (Wilson, JASA 1927).

        (share + z^2 / 2n -+ z sqrt(share (1 - share) / n + z^2 / 4n^2)) / (1 + z^2 / n)

    Raises ValueError unless 0 <= right <= problems and problems > 0.
    """
    if not 0 <= right <= problems or problems == 0:
        raise ValueError(f"right: expected 0 to {problems} of at least one problem, got {right}")
    share, square = right / problems, Z95**2 / problems
    middle = share + square / 2
    margin = math.sqrt(square * (share * (1 - share) + square / 4))
    return max(0.0, (middle - margin) / (1 + square)), min(1.0, (middle + margin) / (1 + square))


def bootstrap_mean(values: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """The 95 % percentile bootstrap interval of the mean of `values` [S, P], drawing seeds and problems independently.

    Give it the right answers (0 or 1) of an arm, or the differences of two arms on the same seeds and problems: then
    it is the paired bootstrap. With one seed only the problems are drawn: nothing is said about other seeds.

    Raises ValueError unless `values` has two dimensions and at least one value.
    """
    if values.ndim != 2 or values.size == 0:
        raise ValueError(f"values: expected a table [seeds, problems], got shape {list(values.shape)}")
    rng = np.random.default_rng(seed)
    means = []
    for _ in range(RESAMPLES):
        seeds, problems = (rng.integers(count, size=count) for count in values.shape)
        means.append(values[seeds].mean(axis=0)[problems].mean())
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)
