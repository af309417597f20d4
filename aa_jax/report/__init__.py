"""One self-contained report.html per run: curves, win rates, tables, samples with their media.

from aa_jax import report

report.write_report(workdir, "LLF on the digits world", [
    report.Numbers("Results", {"win rate": ("63.1 %", "95 % interval 60.2 to 65.9")}),
    report.Curves("Loss", {"dpo": (steps, losses)}, ylabel="loss"),
    report.Bars("Win rate against SFT", [report.Bar.rate("LLF", wins=631, total=1000)],
                reference=0.5, percent=True),
    report.Samples("Samples", ["image", "question", "y", "y*"], rows),
])
"""

from aa_jax.report.media import Media
from aa_jax.report.page import write_report
from aa_jax.report.picture import save_png
from aa_jax.report.sections import (
    Bar,
    Bars,
    Curves,
    Grid,
    KeyValues,
    Numbers,
    Samples,
    Section,
    Table,
    Text,
)

__all__ = [
    "Bar", "Bars", "Curves", "Grid", "KeyValues", "Media", "Numbers", "Samples", "Section",
    "Table", "Text", "save_png", "write_report",
]  # fmt: skip
