"""From raw points to what a chart draws: gaps, running means, thinning, axis limits."""

import dataclasses
import math
from typing import Any

import numpy as np

from aa_jax.errors import DataError

_DRAWN = 600  # points per line; more cannot be seen and make the file large
_SMOOTH_FROM = 120  # lines shorter than this are shown as they are


@dataclasses.dataclass(frozen=True)
class Line:
    """One series, ready to draw. All arrays are float64 [n], NaN = gap."""

    name: str
    x: np.ndarray
    y: np.ndarray  # the bold line: the running mean, or the data themselves
    raw: tuple[np.ndarray, np.ndarray] | None  # (x, y) of the thin line behind a running mean
    band: tuple[np.ndarray, np.ndarray] | None  # (low, high)
    window: int
    lost: int  # points that cannot be shown: NaN, infinite, or not positive on a log axis

    @property
    def last(self) -> float:
        """The last finite value of the bold line, NaN if there is none."""
        finite = self.y[np.isfinite(self.y)]
        return float(finite[-1]) if finite.size else math.nan


def prepare(name: str, data: Any, log_x: bool, log_y: bool, smooth: int | None) -> Line:
    """Checks one series of a chart and reduces it to what can be seen.

    Args:
      name: For the error message.
      data: (x, y) or (x, y, low, high), each a sequence [n].
      log_x: Whether x that is not positive is a gap.
      log_y: The same for y.
      smooth: Points in the running mean, None to choose by length.

    Raises:
      DataError: The sequences do not have the same length, or there are not 2 or 4 of them.
    """
    columns = [np.asarray(column, dtype=np.float64) for column in data]
    shapes = [column.shape for column in columns]
    if len(columns) not in (2, 4) or any(len(s) != 1 or s != shapes[0] for s in shapes):
        raise DataError(
            f"curve {name!r} must be (x, y) or (x, y, low, high) of one length, got shapes "
            f"{', '.join(map(str, shapes))}"
        )
    x, y, *band = columns
    bad = ~np.isfinite(x) | ~np.isfinite(y) | (log_x & (x <= 0)) | (log_y & (y <= 0))
    x, y = x[~np.isnan(x)], np.where(bad, np.nan, y)[~np.isnan(x)]
    lost = int(bad.sum())
    if band:
        return Line(name, x, y, None, (band[0], band[1]), 1, lost)
    window = smooth if smooth is not None else (len(y) // 40 if len(y) >= _SMOOTH_FROM else 1)
    if window <= 1:
        return Line(name, *_thin_extremes(x, y), None, None, 1, lost)
    mean = _running_mean(y, window)
    if smooth is None and not _is_noisy(y, mean):
        return Line(name, *_thin_extremes(x, y), None, None, 1, lost)
    return Line(name, *_thin_mean(x, mean), _thin_extremes(x, y), None, window, lost)


def limits(values: list[np.ndarray], log: bool) -> tuple[float, float] | None:
    """Axis limits with a little air; None without a finite value. Starts at 0 if 0 is near."""
    finite = np.concatenate([v[np.isfinite(v)] for v in values]) if values else np.empty(0)
    if log:
        finite = finite[finite > 0]
    if not finite.size:
        return None
    low, high = float(finite.min()), float(finite.max())
    if log:
        air = (high / low) ** 0.04 if high > low else 2.0
        return low / air, high * air
    if high == low:
        air = abs(high) * 0.1 or 1.0
        return low - air, high + air
    air = 0.05 * (high - low)
    return (0.0 if 0 <= low < 0.35 * high else low - air), high + air


def _is_noisy(y: np.ndarray, mean: np.ndarray) -> bool:
    """Whether the points scatter about their mean; a schedule does not, and keeps its corners."""
    known = np.isfinite(y)
    if not known.any():
        return False
    return bool(np.median(np.abs(y - mean)[known]) > 0.01 * np.ptp(y[known]))


def _running_mean(y: np.ndarray, window: int) -> np.ndarray:
    """Centred mean over `window` points, over fewer at the ends; gaps are skipped, not spread."""
    kernel = np.ones(min(window, len(y)))
    known = np.isfinite(y)
    total = np.convolve(np.where(known, y, 0.0), kernel, mode="same")
    count = np.convolve(known.astype(np.float64), kernel, mode="same")
    return np.where(known, total / np.maximum(np.round(count), 1), np.nan)


def _thin_mean(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    if len(x) <= _DRAWN:
        return x, y
    keep = np.unique(np.linspace(0, len(x) - 1, _DRAWN).round().astype(int))
    return x[keep], y[keep]


def _thin_extremes(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Keeps the lowest and the highest point of every stretch, so that no spike is lost."""
    if len(x) <= _DRAWN:
        return x, y
    keep = {0, len(x) - 1}
    for part in np.array_split(np.arange(len(x)), _DRAWN // 2):
        known = part[np.isfinite(y[part])]
        if known.size:
            keep |= {int(known[np.argmin(y[known])]), int(known[np.argmax(y[known])])}
        if known.size < part.size:
            keep.add(int(part[~np.isfinite(y[part])][0]))  # a gap stays a gap
    order = np.array(sorted(keep))
    return x[order], y[order]
