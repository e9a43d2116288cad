"""Intervals for shares of right answers.

Shapes: S seeds, P held-out problems, R resamples.
"""

import numpy as np

RESAMPLES = 4000


def bootstrap_mean(values: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """The 95 % percentile bootstrap interval of the mean of `values` [S, P], drawing seeds and problems independently.

    Give it the right answers (0 or 1) of an arm, or the differences of two arms on the same seeds and problems: then
    it is the paired bootstrap. With one seed only the problems are drawn: nothing is said about other seeds.

    Raises ValueError unless `values` has two dimensions and at least one value.
    """
    if values.ndim != 2 or values.size == 0:
        raise ValueError(f"values: expected a table [seeds, problems], got shape {list(values.shape)}")
    rng = np.random.default_rng(seed)
    drawn = [rng.multinomial(count, np.full(count, 1 / count), RESAMPLES) for count in values.shape]  # how often each
    means = (drawn[0] @ values * drawn[1]).sum(axis=1) / values.size
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)
