"""A chart as a PNG, for a README or a paper; the report itself needs no pictures."""

import os
from pathlib import Path

import numpy as np

from aa_jax.report.sections import Bars, Curves
from aa_jax.report.series import prepare

# The light theme of style.py: colour and dash pattern of the eight styles, in order.
_COLOURS = ("#0a63b0", "#cf4f0a", "#00836a", "#a83e8c", "#a87600", "#454c55", "#2f95cf", "#8a5a2b")
_DASHES = ("-", (0, (5, 2)), (0, (2, 1.5)), (0, (6, 2, 1.5, 2)), (0, (8, 2)), (0, (3, 1, 1, 1)),
           (0, (1, 1.5)), (0, (9, 2, 2, 2)))  # fmt: skip
_INK, _SOFT, _GRID = "#1b1f24", "#5a6370", "#e9ecf0"
_VERDICT = {"above": "#00755c", "below": "#b8420b", "even": "#7b8490", "": "#0a63b0"}


def save_png(
    chart: Curves | Bars, path: str | os.PathLike, size: tuple[float, float] = (6.4, 3.6)
) -> Path:
    """Draws one chart of a report as a picture.

    Args:
      chart: The section, as it stands in the report.
      path: Where to write; ends in .png (or any other format matplotlib writes).
      size: Width and height in inches, at 200 dots per inch.
    """
    # A figure of its own, not pyplot's: nothing global changes and no window can open.
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, dpi=200, layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(chart.title, loc="left", color=_INK, fontweight="bold", fontsize=11)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(_GRID)
    axes.tick_params(colors=_SOFT, labelsize=8.5, length=0)
    axes.set_axisbelow(True)
    if isinstance(chart, Curves):
        _draw_curves(axes, chart)
    else:
        _draw_bars(axes, chart)
    figure.savefig(path)
    return Path(path)


def _draw_curves(axes, chart: Curves) -> None:
    for index, (name, data) in enumerate(chart.series.items()):
        line = prepare(name, data, chart.log_x, chart.log_y, chart.smooth)
        colour, dash = _COLOURS[index % 8], _DASHES[index % 8]
        if line.band:
            axes.fill_between(line.x, *line.band, color=colour, alpha=0.16, linewidth=0)
        if line.raw:
            axes.plot(*line.raw, color=colour, alpha=0.28, linewidth=0.6)
        few = len(line.x) <= 24
        axes.plot(line.x, line.y, color=colour, linestyle=dash, linewidth=1.7, label=name,
                  marker="o" if few else None, markersize=3.5)  # fmt: skip
    for name, value in chart.reference.items():
        axes.axhline(float(value), color=_SOFT, linewidth=1, linestyle=(0, (1, 3)), label=name)
    axes.set_xscale("log" if chart.log_x else "linear")
    axes.set_yscale("log" if chart.log_y else "linear")
    axes.grid(axis="y", color=_GRID)
    axes.set_xlabel(chart.xlabel, color=_SOFT, fontsize=9)
    axes.set_ylabel(chart.ylabel, color=_SOFT, fontsize=9)
    if len(chart.series) + len(chart.reference) > 1:
        axes.legend(frameon=False, fontsize=8.5, labelcolor=_INK)


def _draw_bars(axes, chart: Bars) -> None:
    scale = 100 if chart.percent else 1
    for row, bar in enumerate(chart.bars):
        colour = _VERDICT[bar.verdict(chart.reference)]
        axes.barh(row, scale * bar.value, height=0.6, color=colour, alpha=0.62)
        if bar.low is not None and bar.high is not None:
            reach = scale * np.array([[bar.value - bar.low], [bar.high - bar.value]])
            axes.errorbar(scale * bar.value, row, xerr=reach, color=_INK, capsize=3, linewidth=1)
    axes.set_yticks(range(len(chart.bars)), [bar.label for bar in chart.bars], color=_INK)
    axes.invert_yaxis()
    if chart.reference is not None:
        axes.axvline(scale * chart.reference, color=_INK, linewidth=1, linestyle=(0, (4, 3)))
    if chart.percent:
        axes.set_xlim(0, 100)
        axes.xaxis.set_major_formatter("{x:.0f} %")
    axes.grid(axis="x", color=_GRID)
