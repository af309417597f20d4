"""Means, win rates and differences with bootstrap intervals over evaluation prompts.

The interval covers the choice of prompts (and, at temperature > 0, of the one sample drawn for
each). It does not cover training: for that, repeat the training with other seeds and use
`across_seeds`.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float


class Interval(NamedTuple):
    """A point estimate with its 95 % interval, in the unit of the data."""

    estimate: float
    low: float
    high: float

    def format(self, digits: int = 1, scale: float | int = 1) -> str:
        """Text such as `66.9 [64.6, 69.3]`."""
        point, low, high = (value * scale for value in self)
        return f"{point:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def bootstrap_mean(
    values: Float[np.ndarray, " N"], *, draws: int = 2000, seed: int = 0, level: float = 0.95
) -> Interval:
    """Percentile bootstrap of the mean (Efron & Tibshirani 1993, chapter 13).

    Args:
      values: one number per prompt.
      draws: resamples of the prompts.
      seed: of the resampling.
      level: coverage.

    Raises:
      ValueError: no values.
    """
    values = np.asarray(values, np.float64)
    if values.size == 0:
        raise ValueError("bootstrap_mean needs at least one value.")
    rng = np.random.default_rng(seed)
    # Multinomial weights instead of index draws: same distribution, no [draws, N] gather of floats.
    weights = rng.multinomial(values.size, np.full(values.size, 1 / values.size), size=draws)
    means = weights @ values / values.size
    tail = (1 - level) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return Interval(float(values.mean()), float(low), float(high))


def wins(
    scores: Float[np.ndarray, " N"], baseline: Float[np.ndarray, " N"]
) -> Float[np.ndarray, " N"]:
    """1 where a response beats the baseline's response to the same prompt, 0.5 on ties, else 0."""
    scores, baseline = np.asarray(scores, np.float64), np.asarray(baseline, np.float64)
    return (scores > baseline) + 0.5 * (scores == baseline)


def win_rate(
    scores: Float[np.ndarray, " N"], baseline: Float[np.ndarray, " N"], **kwargs
) -> Interval:
    """Share of prompts won against a baseline, ties counting half, with its interval."""
    return bootstrap_mean(wins(scores, baseline), **kwargs)


def paired_difference(
    first: Float[np.ndarray, " N"], second: Float[np.ndarray, " N"], **kwargs
) -> Interval:
    """Mean of `first - second` over the same prompts; an interval without 0 is a difference."""
    return bootstrap_mean(np.asarray(first, np.float64) - np.asarray(second, np.float64), **kwargs)


def across_seeds(per_seed: Sequence[Float[np.ndarray, " N"]], **kwargs) -> Interval:
    """Interval of a mean over training seeds *and* prompts (two-level bootstrap).

    Each draw resamples the seeds, then the prompts within each drawn seed, so that an effect which
    only one training run shows does not look certain. With fewer than three seeds the outer level
    is coarse; the interval is then a lower bound on the uncertainty.

    Args:
      per_seed: one array of per-prompt values (or paired differences) for each training seed.
      **kwargs: `draws`, `seed`, `level` as in `bootstrap_mean`.
    """
    draws, seed = kwargs.get("draws", 2000), kwargs.get("seed", 0)
    rng = np.random.default_rng(seed)
    arrays = [np.asarray(values, np.float64) for values in per_seed]
    resampled = []
    for values in arrays:
        weights = rng.multinomial(values.size, np.full(values.size, 1 / values.size), size=draws)
        resampled.append(weights @ values / values.size)
    table = np.stack(resampled)  # [seeds, draws]
    chosen = rng.integers(len(arrays), size=(len(arrays), draws))
    means = np.take_along_axis(table, chosen, axis=0).mean(axis=0)
    tail = (1 - kwargs.get("level", 0.95)) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return Interval(float(np.mean([v.mean() for v in arrays])), float(low), float(high))
