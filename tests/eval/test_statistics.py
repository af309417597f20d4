import numpy as np
import pytest

from aa_jax.eval.statistics import across_seeds, bootstrap_mean, paired_difference, win_rate


def test_bootstrap_interval_matches_normal_theory():
    values = np.random.default_rng(3).normal(2.0, 1.5, size=4000)
    interval = bootstrap_mean(values, draws=4000)
    half = 1.959964 * values.std() / np.sqrt(values.size)
    assert interval.estimate == pytest.approx(values.mean())
    assert interval.low == pytest.approx(values.mean() - half, abs=0.1 * half)
    assert interval.high == pytest.approx(values.mean() + half, abs=0.1 * half)


def test_win_rate_counts_ties_half():
    interval = win_rate(np.array([3.0, 1.0, 2.0, 2.0]), np.array([1.0, 3.0, 2.0, 1.0]))
    assert interval.estimate == (1 + 0 + 0.5 + 1) / 4


def test_paired_difference_is_sharper_than_two_unpaired_intervals():
    rng = np.random.default_rng(0)
    prompts = rng.normal(0, 5, 500)  # prompts differ a lot, the arms by 0.5
    first, second = prompts + 0.5 + rng.normal(0, 0.1, 500), prompts
    paired = paired_difference(first, second)
    assert paired.low > 0.48 and paired.high < 0.52
    assert bootstrap_mean(first).low < bootstrap_mean(second).high


def test_across_seeds_is_wider_when_seeds_disagree():
    rng = np.random.default_rng(1)
    agree = [rng.normal(1.0, 0.1, 300) for _ in range(4)]
    disagree = [rng.normal(mean, 0.1, 300) for mean in (0.0, 0.5, 1.5, 2.0)]
    narrow, wide = across_seeds(agree), across_seeds(disagree)
    assert wide.high - wide.low > 5 * (narrow.high - narrow.low)


def test_no_values_is_an_error():
    with pytest.raises(ValueError, match="at least one"):
        bootstrap_mean(np.array([]))
