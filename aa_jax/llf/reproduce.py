"""The same LLF run over several training seeds, with intervals that cover training too."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from aa_jax import report
from aa_jax.errors import ConfigError
from aa_jax.eval.statistics import Interval, across_seeds, wins
from aa_jax.llf import digits_run
from aa_jax.llf.digits_report import HEADINGS, labels
from aa_jax.llf.stages import seconds, summary, write_json


def run(workdir: str | Path, *, seeds: Sequence[int] = (0, 1, 2), **settings: Any) -> dict:
    """Runs the pipeline once per seed (SFT, feedback model, sampling, annotators and DPO all draw
    anew) and summarises what holds over them. Resumable like a single run.

    Args:
      workdir: run directory; seed k goes to `seed_<k>`.
      seeds: training seeds, three or more for an interval that means something.
      **settings: keyword arguments of `digits_run.run`.

    Returns:
      The summary, also written to results.json, results.md and report.html.
    """
    if not seeds:
        raise ConfigError("seeds is empty; give at least one, e.g. (0, 1, 2).")
    workdir = Path(workdir)
    for seed in seeds:
        digits_run.run(workdir / f"seed_{seed}", seed=seed, **settings)
    result = summarise([workdir / f"seed_{seed}" for seed in seeds])
    write_json(workdir / "results.json", result)
    (workdir / "results.md").write_text(markdown(result))
    write_report(workdir, result)
    return result


def summarise(folders: Sequence[Path]) -> dict[str, Any]:
    """Means and win rates over seeds and prompts (two-level bootstrap), and each seed's own."""
    found = [summary(folder, "evaluate") for folder in folders]
    named = labels(found[0])

    def table(folder: Path, row: str) -> dict[str, np.ndarray]:
        values = json.loads((folder / "evaluate/scores" / f"{row}.json").read_text())
        return {name: np.array(column) for name, column in values.items()}

    def over(value: Callable[[Path], np.ndarray]) -> list[float]:
        return list(across_seeds([value(folder) for folder in folders]))

    rows: dict[str, Any] = {}
    for row in named:
        for name in (row, f"{row}_greedy"):
            if name not in found[0]:
                continue
            base = "initial_greedy" if name.endswith("_greedy") else "initial"
            rows[name] = {
                key: over(lambda f, n=name, k=key: table(f, n)[k])
                for key in HEADINGS if key != "win_rate"
            }  # fmt: skip
            rows[name]["win_rate"] = over(
                lambda f, n=name, b=base: wins(table(f, n)["mean"], table(f, b)["mean"])
            )
            rows[name]["seeds"] = [line[name]["win_rate"][0] for line in found]
    pairs = {}
    arms = [row for row in named if row == "llf" or row.startswith("llf_")]
    for arm in arms:
        for suffix in ("", "_greedy"):
            pairs[f"{arm} - binary{suffix}"] = {
                "mean": over(
                    lambda f, a=arm, s=suffix: (
                        table(f, a + s)["mean"] - table(f, "binary" + s)["mean"]
                    )
                ),
                "win_rate": over(
                    lambda f, a=arm, s=suffix: wins(
                        table(f, a + s)["mean"], table(f, "binary" + s)["mean"]
                    )
                ),
            }
    pairs["trained - untrained feedback"] = {
        "mean": over(
            lambda f: table(f, "improved_trained")["mean"] - table(f, "improved_untrained")["mean"]
        ),
        "win_rate": over(
            lambda f: wins(
                table(f, "improved_trained")["mean"], table(f, "improved_untrained")["mean"]
            )
        ),
    }
    return {
        "seeds": len(folders),
        "labels": named,
        "rows": rows,
        "paired": pairs,
        "chosen": [summary(folder, "dpo")["chosen"] for folder in folders],
        "cells": [summary(folder, "dpo")["cells"] for folder in folders],
        "pairs": [summary(folder, "improve") for folder in folders],
        "annotators": [summary(folder, "collect") for folder in folders],
        "seconds": sum(
            seconds(folder, path.parent.name)
            for folder in folders
            for path in folder.glob("*/done.json")
        ),
    }


def _cells(result: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    columns = ["model", *HEADINGS.values(), "win rate per seed"]
    lines = []
    for row, values in result["rows"].items():
        greedy = row.endswith("_greedy")
        label = result["labels"][row.removesuffix("_greedy")] + (", greedy" if greedy else "")
        line = [label]
        for key in HEADINGS:
            value = Interval(*values[key])
            if key == "win_rate":
                line.append(value.format(1, 100))
            else:
                line.append(value.format(3) if key == "mean" else f"{value.estimate:.2f}")
        lines.append([*line, ", ".join(f"{100 * rate:.1f}" for rate in values["seeds"])])
    return columns, lines


def _paired(result: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    columns = ["comparison, same prompts", "mean score difference", "win rate %"]
    lines = [
        [name, Interval(*value["mean"]).format(3), Interval(*value["win_rate"]).format(1, 100)]
        for name, value in result["paired"].items()
    ]
    return columns, lines


def _grid(result: Mapping[str, Any]) -> tuple[list[str], list[list[Any]]]:
    columns = ["seed", "arm", "learning rate", "updates", "validation mean", "win rate %", "chosen"]
    lines = [
        [seed, c["arm"], f"{c['lr']:g}", c["steps"], f"{c['mean']:.3f}",
         f"{100 * c['win_rate']:.1f}", "yes" if result["chosen"][seed][c["arm"]] == c["lr"] else ""]
        for seed, cells in enumerate(result["cells"])
        for c in cells
    ]  # fmt: skip
    return columns, lines


def markdown(result: Mapping[str, Any]) -> str:
    """The summary as Markdown tables."""
    parts = []
    for title, (columns, lines) in _tables(result).items():
        head = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
        body = ["| " + " | ".join(map(str, line)) + " |" for line in lines]
        parts.append("\n".join([f"### {title}", "", *head, *body]))
    return "\n\n".join(parts) + "\n"


def _tables(result: Mapping[str, Any]) -> dict[str, tuple[list[str], list[list[Any]]]]:
    return {
        f"Held-out images, {result['seeds']} training seeds": _cells(result),
        "Paired comparisons": _paired(result),
        "Validation grid": _grid(result),
    }


def write_report(workdir: Path, result: Mapping[str, Any]) -> Path:
    """report.html over all seeds."""
    sections: list[Any] = [
        report.Table(title, columns, lines) for title, (columns, lines) in _tables(result).items()
    ]
    bars = [
        report.Bar(result["labels"][row], *values["win_rate"])
        for row, values in result["rows"].items()
        if row in result["labels"] and row != "initial"
    ]
    sections.insert(
        1,
        report.Bars("Win rate against the initial model", bars, reference=0.5, percent=True,
                    note="95 % intervals over training seeds and prompts."),
    )  # fmt: skip
    sections.append(report.KeyValues("Pairs", dict(enumerate(result["pairs"]))))
    sections.append(report.KeyValues("Annotators", dict(enumerate(result["annotators"]))))
    return report.write_report(
        workdir, "LLF on the digits world over training seeds", sections,
        wall_seconds=result["seconds"],
    )  # fmt: skip
