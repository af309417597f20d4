"""Axis ticks and numbers a person can read."""

import math
from numbers import Real

_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
_MINUS = "\N{MINUS SIGN}"


def linear_ticks(low: Real, high: Real, count: int = 5) -> list[float]:
    """About `count` multiples of 1, 2 or 5 times a power of ten inside [low, high]."""
    if not high > low:
        return [float(low)]
    rough = (high - low) / max(1, count)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * 0.999999)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    # Multiples are rounded to the step's own decimals, so that 0.1 * 3 is 0.3.
    decimals = max(0, -math.floor(math.log10(step)) + 1)
    return [round(index * step, decimals) + 0.0 for index in range(first, last + 1)]


def log_ticks(low: Real, high: Real, count: int = 6) -> list[float]:
    """Powers of ten inside [low, high], thinned to `count`; 1, 2 and 5 when they are few."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    powers = [10.0**k for k in range(first, last + 1) if low * 0.999 <= 10.0**k <= high * 1.001]
    if len(powers) > count:
        return powers[:: math.ceil(len(powers) / count)]
    if len(powers) >= 3:
        return powers
    fine = [m * 10.0**k for k in range(first, last + 1) for m in (1, 2, 5)]
    fine = [tick for tick in fine if low * 0.999 <= tick <= high * 1.001]
    return fine if len(fine) >= 2 else linear_ticks(low, high, 4)


def tick_label(value: Real, spacing: Real) -> str:
    """A tick with just the decimals its spacing needs: 0.50, 20k, 10⁻⁶."""
    size = abs(value)
    if value == 0:
        return "0"
    if size >= 1e6 or size < 1e-4:
        return short(value)
    if size >= 10_000:
        return _signed(f"{value / 1000:.4g}k")
    decimals = max(0, math.ceil(-math.log10(spacing) - 1e-9)) if spacing > 0 else 3
    return _signed(f"{value:.{min(decimals, 6)}f}")


def short(value: Real, digits: int = 4) -> str:
    """A number in few characters: 0.6931, 1 234, 12.3M, 2.5×10⁻⁶."""
    if isinstance(value, int) and abs(value) < 1e6:
        return _signed(f"{value:,}".replace(",", "\N{NARROW NO-BREAK SPACE}"))
    if math.isnan(value):
        return "nan"
    if math.isinf(value):
        return "∞" if value > 0 else _MINUS + "∞"
    size = abs(value)
    if size >= 1e15 or 0 < size < 1e-4:
        mantissa, exponent = f"{value:.{digits - 2}e}".split("e")
        mantissa = mantissa.rstrip("0").rstrip(".") if "." in mantissa else mantissa
        power = "10" + str(int(exponent)).translate(_SUPERSCRIPT)
        if mantissa in ("1", "-1"):
            return _signed(("-" if mantissa[0] == "-" else "") + power)
        return _signed(f"{mantissa}×{power}")
    for limit, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M")):
        if size >= limit:
            return _signed(f"{value / limit:.{digits}g}{letter}")
    return _signed(f"{value:.{max(digits, len(str(int(size))))}g}")


def percent(value: Real) -> str:
    """0.631 -> 63.1 %."""
    return f"{_signed(f'{100 * value:.1f}')}\N{NO-BREAK SPACE}%"


def duration(seconds: Real) -> str:
    """Seconds as 0.4 s, 12 s, 3 min 05 s or 2 h 10 min."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if not minutes:
        return f"{rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def _signed(text: str) -> str:
    return text.replace("-", _MINUS)
