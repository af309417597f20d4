"""Line charts and bars as HTML with inline SVG.

Lines live in an SVG that stretches with the window (strokes do not), labels are HTML text placed
in per cent: a chart is as readable at 390 pixels as on a wide screen, and in print.
"""

import math
from numbers import Real

import numpy as np

from aa_jax.report import formats
from aa_jax.report.html import Markup, el
from aa_jax.report.sections import Bars, Curves
from aa_jax.report.series import Line, limits, prepare

_UNIT = 1000.0  # the SVG's own coordinates, in both directions
_STYLES = 8  # colours and dash patterns defined in style.py
_DOTS_UP_TO = 24  # sparse lines show their points
_ROWS = 12  # rows of the table of values behind a chart


class _Axis:
    """Maps data to 0..1 along one direction, and knows its ticks."""

    def __init__(self, low: Real, high: Real, log: bool, count: int):
        self.low, self.high, self.log = low, high, log
        self.ticks = formats.log_ticks(low, high) if log else formats.linear_ticks(low, high, count)
        spacing = self.ticks[1] - self.ticks[0] if len(self.ticks) > 1 else abs(low) or 1.0
        self.labels = [
            formats.short(t, 3) if log else formats.tick_label(t, spacing) for t in self.ticks
        ]

    def __call__(self, value):
        if self.log:
            low, high = math.log(self.low), math.log(self.high)
            with np.errstate(divide="ignore", invalid="ignore"):
                return (np.log(value) - low) / (high - low)
        return (np.asarray(value) - self.low) / (self.high - self.low)


def curves(chart: Curves) -> Markup:
    """A figure in two parts, so that the plots of charts side by side stand level."""
    lines = [
        prepare(name, data, chart.log_x, chart.log_y, chart.smooth)
        for name, data in chart.series.items()
    ]
    x_limits = limits([line.x for line in lines], chart.log_x)
    heights = [np.array(list(chart.reference.values()), dtype=np.float64)]
    for line in lines:
        heights += [line.y, *(line.raw[1:] if line.raw else ()), *(line.band or ())]
    y_limits = limits(heights, chart.log_y)
    if x_limits is None or y_limits is None or not any(np.isfinite(line.last) for line in lines):
        return el("p", "No finite values to draw.", class_="empty")

    first, last = min(np.nanmin(line.x) for line in lines), max(np.nanmax(line.x) for line in lines)
    if not chart.log_x and last > first:
        x_limits = (first, last)  # time has no air at its ends
    x_axis = _Axis(*x_limits, chart.log_x, 5)
    y_axis = _Axis(*y_limits, chart.log_y, 5)
    gutter = max(len(label) for label in y_axis.labels)
    plot = el(
        "div",
        _drawing(chart, lines, x_axis, y_axis),
        [
            el("span", label, class_="ty", style=f"top:{100 - 100 * float(y_axis(tick)):.2f}%")
            for tick, label in zip(y_axis.ticks, y_axis.labels, strict=True)
        ],
        [
            el("span", label, class_="tx", style=f"left:{100 * float(x_axis(tick)):.2f}%")
            for tick, label in zip(x_axis.ticks, x_axis.labels, strict=True)
        ],
        class_="plot",
        style=f"--gutter:{gutter}ch",
    )
    head = el(
        "div",
        el("p", chart.note, class_="note") if chart.note else None,
        _legend(chart, lines),
        el("div", chart.ylabel, class_="axis-y") if chart.ylabel else None,
        class_="head",
    )
    body = el(
        "div", plot, el("div", chart.xlabel, class_="axis-x"), _small_print(lines),
        _values(chart, lines),
    )  # fmt: skip
    return el("figure", head, body)


def _drawing(chart: Curves, lines: list[Line], x_axis: _Axis, y_axis: _Axis) -> Markup:
    marks = [_rule(0, y_axis(tick), 1, y_axis(tick), "grid") for tick in y_axis.ticks]
    marks += [_rule(0, y_axis(v), 1, y_axis(v), "reference") for v in chart.reference.values()]
    for index, line in enumerate(lines):
        style = f"s{index % _STYLES}"
        if line.band:
            low, high = (y_axis(edge) for edge in line.band)
            marks.append(_path(_outline(x_axis(line.x), low, high), f"band {style}"))
        if line.raw:
            x, y = line.raw
            marks.append(_path(_polyline(x_axis(x), y_axis(y)), f"raw {style}"))
    for index, line in enumerate(lines):  # bold lines above all thin ones
        style = f"s{index % _STYLES}"
        title = el("title", line.name)
        x, y = x_axis(line.x), y_axis(line.y)
        marks.append(_path(_polyline(x, y), f"line {style}", title))
        known = np.isfinite(y)
        alone = known & ~np.r_[False, known[:-1]] & ~np.r_[known[1:], False]
        dots = known if known.sum() <= _DOTS_UP_TO else alone
        if dots.any():
            marks.append(_path("".join(_dot(a, b) for a, b in zip(x[dots], y[dots], strict=True)),
                               f"dots {style}"))  # fmt: skip
    return el(
        "svg", marks, viewBox=f"0 0 {_UNIT:.0f} {_UNIT:.0f}", preserveAspectRatio="none",
        role="img", aria_label=_spoken(chart, lines),
    )  # fmt: skip


def _spoken(chart: Curves, lines: list[Line]) -> str:
    said = []
    for line in lines:
        known = line.y[np.isfinite(line.y)]
        if known.size:
            said.append(f"{line.name} from {known[0]:.4g} to {known[-1]:.4g}")
    axes = f"{chart.ylabel or 'value'} by {chart.xlabel or 'x'}"
    return f"Line chart, {chart.title}, {axes}: {'; '.join(said)}."


def _legend(chart: Curves, lines: list[Line]) -> Markup:
    entries = [
        el(
            "li",
            _swatch(f"line s{index % _STYLES}"),
            el("span", line.name),
            el("b", formats.short(line.last)),
        )
        for index, line in enumerate(lines)
    ]
    entries += [
        el("li", _swatch("reference"), el("span", name), el("b", formats.short(float(value))))
        for name, value in chart.reference.items()
    ]
    return el("ul", entries, class_="legend")


def _swatch(style: str) -> Markup:
    stroke = el("path", d="M1 5H25", class_=style)
    return el("svg", stroke, viewBox="0 0 26 10", width=26, height=10, aria_hidden="true")


def _small_print(lines: list[Line]) -> Markup | None:
    windows = sorted({line.window for line in lines if line.window > 1})
    said = []
    if windows:
        sizes = " or ".join(map(str, windows))
        said.append(f"Bold: mean of {sizes} neighbouring points; thin: every point.")
    said += [f"{line.name}: {line.lost} points cannot be drawn." for line in lines if line.lost]
    return el("p", " ".join(said), class_="small") if said else None


def _values(chart: Curves, lines: list[Line]) -> Markup:
    """The chart as a folded table, for those who cannot see it or want the figures."""
    bodies = []
    for line in lines:
        keep = np.unique(np.linspace(0, len(line.x) - 1, min(_ROWS, len(line.x))).round())
        for i in keep.astype(int):
            cells = (formats.short(float(line.x[i])), formats.short(float(line.y[i])))
            bodies.append(
                el("tr", el("td", line.name), [el("td", cell, class_="number") for cell in cells])
            )
    heads = [el("th", name, scope="col") for name in ("", chart.xlabel, chart.ylabel or "value")]
    table = el("table", el("thead", el("tr", heads)), el("tbody", bodies))
    return el("details", el("summary", "Values"), el("div", table, class_="scroll"), class_="data")


def bars(chart: Bars) -> Markup:
    """Labels, bars with whiskers, values; the axis stands below."""
    edges = [edge for bar in chart.bars for edge in (bar.value, bar.low, bar.high)]
    edges = [edge for edge in edges if edge is not None and math.isfinite(edge)]
    if not edges:
        return el("p", "No finite values to draw.", class_="empty")
    if chart.reference is not None:
        edges.append(chart.reference)
    low, high = min(0.0, *edges), max(0.0, *edges)
    if chart.percent:
        low, high = min(0.0, low), max(1.0, high)
    else:
        air = 0.05 * (high - low)
        low, high = (low - air if low < 0 else low), (high + air if high > 0 else high)
    axis = _Axis(low, high if high > low else low + 1.0, False, 5)
    show = formats.percent if chart.percent else formats.short

    rows, group = [], ""
    for bar in chart.bars:
        if bar.group != group:
            group = bar.group
            rows.append(el("li", group, class_="group"))
        rows.append(_bar(bar, chart, axis, show))
    ticks = list(zip(axis.ticks, axis.labels, strict=True))
    if chart.percent:
        quarters = [k / 4 for k in range(math.ceil(4 * low), math.floor(4 * high) + 1)]
        ticks = [(tick, f"{100 * tick:.0f}\N{NO-BREAK SPACE}%") for tick in quarters]
    scale = [
        el("span", label, style=f"left:{100 * float(axis(tick)):.2f}%") for tick, label in ticks
    ]
    ruler = el("li", el("div", scale, class_="ruler"), class_="axis", aria_hidden="true")
    return el("ul", rows, ruler, class_="bars")


def _bar(bar, chart: Bars, axis: _Axis, show) -> Markup:
    def place(value: Real) -> float:
        return 100 * float(axis(value))

    has_interval = bar.low is not None and bar.high is not None
    verdict = bar.verdict(chart.reference)
    sign = {"above": "▲", "below": "▼"}.get(verdict)
    zero, end = place(0.0), place(bar.value) if math.isfinite(bar.value) else place(0.0)
    marks = [
        el("i", class_="fill", style=f"left:{min(zero, end):.2f}%;width:{abs(end - zero):.2f}%")
    ]
    if has_interval:
        left, right = place(bar.low), place(bar.high)
        marks.append(el("i", class_="whisker", style=f"left:{left:.2f}%;width:{right - left:.2f}%"))
    if chart.reference is not None:
        marks.append(el("i", class_="mark", style=f"left:{place(chart.reference):.2f}%"))
    interval = f"{show(bar.low)} to {show(bar.high)}" if has_interval else ""
    small = [part for part in (interval, bar.note) if part]
    return el(
        "li",
        el("span", bar.label, class_="label"),
        el("span", marks, class_="track", aria_hidden="true"),
        el("span", el("b", show(bar.value)),
           el("span", f" {sign}", class_="sign", role="img",
              aria_label=f"{verdict} the reference") if sign else None,
           el("small", " · ".join(small)) if small else None, class_="value"),
        class_=verdict or None,
    )  # fmt: skip


def _point(x: Real, y: Real) -> str:
    return f"{_UNIT * x:.1f} {_UNIT * (1 - y):.1f}"


def _polyline(x: np.ndarray, y: np.ndarray) -> str:
    parts, pen_down = [], False
    for a, b in zip(x, y, strict=True):
        known = math.isfinite(a) and math.isfinite(b)
        if known:
            parts.append(("L" if pen_down else "M") + _point(a, b))
        pen_down = known
    return "".join(parts)


def _outline(x: np.ndarray, low: np.ndarray, high: np.ndarray) -> str:
    known = np.isfinite(x) & np.isfinite(low) & np.isfinite(high)
    if not known.any():
        return ""
    there = [_point(a, b) for a, b in zip(x[known], high[known], strict=True)]
    back = [_point(a, b) for a, b in zip(x[known][::-1], low[known][::-1], strict=True)]
    return "M" + "L".join(there + back) + "Z"


def _dot(x: Real, y: Real) -> str:
    # A line of no length with round ends is a dot that does not stretch with the drawing.
    return f"M{_point(x, y)}h.01"


def _path(d: str, style: str, *children: Markup) -> Markup:
    return el("path", *children, d=d, class_=style)


def _rule(x0, y0, x1, y1, style: str) -> Markup:
    return _path(f"M{_point(x0, float(y0))}L{_point(x1, float(y1))}", style)
