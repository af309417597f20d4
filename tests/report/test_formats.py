"""Ticks and number formats."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aa_jax.report import formats


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        (0, 2000, [0, 500, 1000, 1500, 2000]),
        (-0.3, 0.3, [-0.2, 0.0, 0.2]),
        (3.1, 3.2, [3.1, 3.12, 3.14, 3.16, 3.18, 3.2]),
        (0, 1e-6, [0, 2e-7, 4e-7, 6e-7, 8e-7, 1e-6]),
        (5, 5, [5]),
    ],
)
def test_linear_ticks(low, high, expected):
    assert formats.linear_ticks(low, high) == pytest.approx(expected, abs=1e-15)


@given(st.floats(-1e12, 1e12), st.floats(1e-9, 1e12))
def test_linear_ticks_are_inside_and_few(low, width):
    high = low + width
    ticks = formats.linear_ticks(low, high)
    slack = 1e-6 * max(abs(low), abs(high), width)
    assert all(low - slack <= tick <= high + slack for tick in ticks)
    assert len(ticks) <= 11
    assert ticks == sorted(ticks)


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (1, 1000, [1, 10, 100, 1000]),
        (0.5, 30, [0.5, 1, 2, 5, 10, 20]),
        (1e-12, 1, [1e-12, 1e-9, 1e-6, 1e-3, 1]),
        (2.1, 2.4, [2.1, 2.2, 2.3, 2.4]),
    ],
)
def test_log_ticks(low, high, expected):
    assert formats.log_ticks(low, high) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.69314718, "0.6931"),
        (0.0, "0"),
        (12, "12"),
        (12800, "12\u202f800"),
        (-3, "−3"),
        (123456789, "123.5M"),
        (123456.0, "123456"),
        (2.5e-7, "2.5×10⁻⁷"),
        (1e-6, "10⁻⁶"),
        (-1e-6, "−10⁻⁶"),
        (3e21, "3×10²¹"),
        (math.nan, "nan"),
        (-math.inf, "−∞"),
    ],
)
def test_short(value, text):
    assert formats.short(value) == text


@pytest.mark.parametrize(
    ("value", "spacing", "text"),
    [(0.5, 0.05, "0.50"), (20000, 5000, "20k"), (1500, 500, "1500"), (0, 1, "0"), (-2, 1, "−2")],
)
def test_tick_label(value, spacing, text):
    assert formats.tick_label(value, spacing) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.44, "0.4 s"), (12, "12 s"), (65, "1 min 05 s"), (7800, "2 h 10 min"), (59.9, "1 min 00 s")],
)
def test_duration(seconds, text):
    assert formats.duration(seconds) == text


def test_percent():
    assert formats.percent(0.631) == "63.1\u00a0%"
    assert formats.percent(-0.02) == "−2.0\u00a0%"
