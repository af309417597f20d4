"""What a chart draws of its data."""

import math

import numpy as np
import pytest
from scipy.stats import binomtest

from aa_jax.errors import DataError
from aa_jax.report import Bar
from aa_jax.report.series import limits, prepare


def test_short_series_are_untouched():
    line = prepare("a", ([1, 2, 3], [3.0, math.nan, 1.0]), False, False, None)
    np.testing.assert_array_equal(line.x, [1, 2, 3])
    np.testing.assert_array_equal(line.y, [3.0, np.nan, 1.0])
    assert line.raw is None and line.window == 1 and line.lost == 1 and line.last == 1.0


def test_running_mean_of_a_line_is_the_line_away_from_its_ends():
    x = np.arange(200.0)
    line = prepare("a", (x, 2 * x + 1), False, False, 9)
    np.testing.assert_allclose(line.y[4:-4], 2 * x[4:-4] + 1)
    assert line.window == 9


def test_running_mean_skips_gaps():
    y = np.ones(300)
    y[100:110] = np.nan
    y[:100] = 1.0
    line = prepare("a", (np.arange(300), y), False, False, 21)
    assert np.isnan(line.y[100:110]).all()
    np.testing.assert_allclose(line.y[~np.isnan(line.y)], 1.0)


def test_only_noise_is_smoothed():
    x = np.arange(2000)
    schedule = np.minimum(1, x / 100) * np.cos(x / 1400)
    assert prepare("lr", (x, schedule), False, False, None).window == 1
    noise = schedule + np.random.default_rng(0).normal(0, 0.1, x.size)
    assert prepare("loss", (x, noise), False, False, None).window == 50


def test_thinning_keeps_every_spike():
    x, y = np.arange(100_000), np.zeros(100_000)
    y[12_345], y[67_890] = 5.0, -7.0
    line = prepare("a", (x, y), False, False, 1)
    assert line.x.size <= 1300
    assert line.y[line.x == 12_345] == 5.0 and line.y[line.x == 67_890] == -7.0
    assert line.x[0] == 0 and line.x[-1] == 99_999


def test_thinning_keeps_gaps():
    y = np.ones(10_000)
    y[5000:5600] = np.nan
    assert np.isnan(prepare("a", (np.arange(10_000), y), False, False, 1).y).any()


def test_log_axes_count_what_they_cannot_show():
    line = prepare("a", ([0, 1, 10], [1.0, -1.0, 2.0]), True, True, None)
    assert line.lost == 2 and line.last == 2.0


@pytest.mark.parametrize(
    "data",
    [([1, 2], [1.0]), ([1],), ([1], [1.0], [1.0]), ([[1]], [[1.0]]), ([1], [1], [1, 2], [1])],
)
def test_uneven_data(data):
    with pytest.raises(DataError, match="curve 'loss' must be"):
        prepare("loss", data, False, False, None)


def test_limits():
    assert limits([np.array([2.0, 10.0])], False) == (0.0, pytest.approx(10.4))
    low, high = limits([np.array([8.0, np.inf, 10.0])], False)
    assert low == pytest.approx(7.9) and high == pytest.approx(10.1)
    low, high = limits([np.array([3.0])], False)
    assert low < 3.0 < high
    assert limits([np.array([np.nan])], False) is None
    low, high = limits([np.array([-1.0, 0.01, 100.0])], True)
    assert 0.005 < low < 0.01 and 100 < high < 200


@pytest.mark.parametrize(("wins", "total"), [(0, 10), (10, 10), (631, 1000), (1, 3), (50, 100)])
def test_wilson_interval_is_scipys(wins, total):
    bar = Bar.rate("arm", wins, total)
    expected = binomtest(wins, total).proportion_ci(0.95, method="wilson")
    assert (bar.low, bar.high) == pytest.approx((expected.low, expected.high), abs=1e-12)
    assert bar.value == wins / total and bar.note == f"n = {total}"


@pytest.mark.parametrize(("wins", "total"), [(1, 0), (3, 2), (-1, 2)])
def test_impossible_rates(wins, total):
    with pytest.raises(DataError, match="'arm'"):
        Bar.rate("arm", wins, total)
