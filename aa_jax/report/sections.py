"""What a report is made of. Sections hold data; how they look is decided elsewhere."""

import dataclasses
import math
from collections.abc import Collection, Mapping, Sequence
from numbers import Real
from typing import Any

from aa_jax.errors import DataError


@dataclasses.dataclass(frozen=True)
class Text:
    """Prose: paragraphs, ``- `` lists, ``### `` headings, **bold**, *emphasis*, `code`, links."""

    text: str
    title: str = ""


@dataclasses.dataclass(frozen=True)
class Numbers:
    """The figures to remember, large: ``{"win rate": "63.1 %"}`` or ``(value, small print)``."""

    title: str
    values: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Curves:
    """A line chart.

    Attributes:
      title: What is shown.
      series: Name -> (x, y), or (x, y, low, high) with a band. NaN and infinities are gaps.
      xlabel: Quantity and unit of x.
      ylabel: Quantity and unit of y.
      log_x: Logarithmic x axis; values that are not positive are left out and counted.
      log_y: The same for y.
      reference: Horizontal lines, e.g. ``{"chance": 0.5}``.
      smooth: Points in the running mean drawn over the raw line; None chooses by length, 1 is off.
      note: One line below the title.
    """

    title: str
    series: Mapping[str, Sequence[Any]]
    xlabel: str = "step"
    ylabel: str = ""
    log_x: bool = False
    log_y: bool = False
    reference: Mapping[str, Real] = dataclasses.field(default_factory=dict)
    smooth: int | None = None
    note: str = ""


@dataclasses.dataclass(frozen=True)
class Bar:
    """One bar, optionally with an interval; bars with the same `group` stand together."""

    label: str
    value: Real
    low: Real | None = None
    high: Real | None = None
    group: str = ""
    note: str = ""

    @classmethod
    def rate(cls, label: str, wins: Real, total: int, group: str = "") -> "Bar":
        """A proportion with its 95 % Wilson interval (Wilson 1927, eq. for z = 1.96).

        Args:
          label: Name of the bar.
          wins: Number of successes; a tie may count one half.
          total: Number of trials.
          group: See the class.

        Raises:
          DataError: There are no trials, or more wins than trials.
        """
        if total <= 0 or not 0 <= wins <= total:
            raise DataError(f"bar {label!r}: {wins} wins in {total} trials is not a proportion")
        z, p = 1.959963984540054, wins / total
        centre = (p + z * z / (2 * total)) / (1 + z * z / total)
        half = z * math.sqrt(p * (1 - p) / total + (z / (2 * total)) ** 2) / (1 + z * z / total)
        low, high = max(0.0, centre - half), min(1.0, centre + half)
        return cls(label, p, low, high, group=group, note=f"n = {total}")

    def verdict(self, reference: Real | None) -> str:
        """Where the whole interval lies: "above", "below", "even" (neither), "" if unknown."""
        if reference is None or self.low is None or self.high is None:
            return ""
        if self.low > reference:
            return "above"
        return "below" if self.high < reference else "even"


@dataclasses.dataclass(frozen=True)
class Bars:
    """Horizontal bars with intervals.

    Attributes:
      title: What is shown.
      bars: The bars, top to bottom.
      reference: Value of a dashed line, e.g. 0.5; bars whose interval lies above or below it are
        marked as such, in colour and with a sign.
      percent: Values are proportions, shown as per cent on an axis from 0 to 100.
      note: One line below the title.
    """

    title: str
    bars: Sequence[Bar]
    reference: Real | None = None
    percent: bool = False
    note: str = ""


@dataclasses.dataclass(frozen=True)
class Table:
    """A table; click a heading to sort.

    Attributes:
      title: What is shown.
      columns: Headings.
      rows: Cells: text, numbers, booleans, None.
      caption: One line below the title.
      highlight: Indices of rows to set off.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    caption: str = ""
    highlight: Collection[int] = ()


@dataclasses.dataclass(frozen=True)
class Samples:
    """Examples with their media, one card each.

    Attributes:
      title: What is shown.
      columns: Names of the cells.
      rows: Cells: text, numbers, None, PIL images, encoded images, audio or video as bytes,
        :class:`Media`, or a list of these. Small images are enlarged without smoothing.
      caption: One line below the title.
      tones: Column -> "good", "bad" or "accent", e.g. ``{"chosen": "good", "rejected": "bad"}``.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    caption: str = ""
    tones: Mapping[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class KeyValues:
    """Names and values: a configuration, an environment. Nested mappings become dotted names."""

    title: str
    values: Mapping[str, Any]
    folded: bool = False


@dataclasses.dataclass(frozen=True)
class Grid:
    """Sections side by side where the window is wide enough, under one heading."""

    title: str
    sections: Sequence[Any]
    note: str = ""


Section = Text | Numbers | Curves | Bars | Table | Samples | KeyValues | Grid
