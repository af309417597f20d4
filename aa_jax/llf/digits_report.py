"""What a person sees of an LLF run on the digits world: a table in the terminal and report.html."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table as TerminalTable

from aa_jax import report
from aa_jax.data import digits, llf_prompts
from aa_jax.data.digits.prompts import WORDING
from aa_jax.eval.statistics import Interval
from aa_jax.llf.stages import seconds, summary
from aa_jax.training.metrics import read_metrics, series

# Row of the result table -> what it is.
ROWS = {
    "initial": "initial model (SFT)",
    "binary": "DPO on binary pairs",
    "llf": "DPO + LLF",
    "improved_trained": "self-improvement, trained feedback model",
    "improved_untrained": "self-improvement, untrained feedback model",
}
_VARIANTS = {
    "verified": "pairs the feedback model confirms",
    "likeliest": "y* decoded greedily",
}
_DIRECT = "llf_against_binary"
HEADINGS = {
    "prompt_following": "following",
    "objective_rules": "rules",
    "clarity": "clarity",
    "information_richness": "richness",
    "mean": "mean",
    "words": "words",
    "win_rate": "win rate %",
}
_STAGES = ("tower", "pretrain", "sft", "collect", "feedback", "improve", "dpo", "evaluate")


def write(workdir: Path, test: Sequence) -> dict[str, str]:
    """Writes report.html and prints the result table.

    Args:
      workdir: a run whose stages up to `evaluate` have finished.
      test: the test prompts.

    Returns:
      Where the report is.
    """
    found = {name: summary(workdir, name) for name in _STAGES}
    wall = sum(seconds(workdir, name) for name in _STAGES)
    result = found["evaluate"]
    columns, rows = result_table(result)
    caption = (
        f"{len(test)} held-out prompts, images of test digits only, one answer each at temperature "
        "1. Oracle scores 0-3 (mean of the four dimensions); win rate against the initial model's "
        "answers, ties half; 95 % bootstrap intervals over prompts. They do not cover training: "
        "see make reproduce for several training seeds."
    )
    sections = [
        report.Numbers("At a glance", _glance(found)),
        report.Table("Result", columns, rows, caption=caption),
        report.Bars(
            "Win rate against the initial model",
            [
                _bar(label, result[name])
                for name, label in labels(result).items() if name != "initial"
            ],
            reference=0.5, percent=True,
            note="Dashed: the initial model against itself. Intervals: 95 %, over prompts.",
        ),
        report.Text(direct_comparison(result)),
        report.Table("The same models decoded greedily", *_greedy_table(result),
                     caption="Temperature 0; win rate against the initial model's greedy answers."),
        report.Samples(
            "Self-improvement on test images",
            ["image", "question", "y", "critique", "refinement", "y*", "score y → y*"],
            sample_rows(workdir, test),
            caption="y: initial model. Critique and refinement: trained feedback model. y*: the "
            "initial model, shown the refinement. The first prompts where y* differs from y.",
            tones={"y*": "accent"},
        ),
        report.Grid("Learning curves", _curves(workdir, found)),
        report.Table(
            "Learning rates, chosen on validation prompts",
            ["arm", "learning rate", "updates", "mean score", "win rate %", "chosen"],
            [
                [c["arm"], c["lr"], c["steps"], round(c["mean"], 3), round(100 * c["win_rate"], 1),
                 "yes" if found["dpo"]["chosen"][c["arm"]] == c["lr"] else ""]
                for c in found["dpo"]["cells"]
            ],
            caption=f"Every arm sees {found['dpo']['pairs']} pairs and the same grid.",
        ),
        report.KeyValues("What happened in each stage", _stage_figures(workdir, found)),
    ]  # fmt: skip
    path = report.write_report(
        workdir, "Learning from language feedback on the digits world", sections,
        summary="A small LLaVA learns to answer questions about handwritten digits, writes "
        "critiques of its own answers with a feedback model, improves them, and learns from the "
        "improved answers.",
        wall_seconds=wall,
    )  # fmt: skip
    console = Console()
    print_table(columns, rows, console)
    console.print(direct_comparison(result), soft_wrap=not console.is_terminal)
    console.print(f"report: {path}", soft_wrap=True)
    return {"report": str(path), "minutes": round(wall / 60, 2)}


def result_table(result: Mapping[str, Mapping[str, Any]]) -> tuple[list[str], list[list[Any]]]:
    """Headings and rows of the result table: means, and intervals for mean and win rate."""
    columns = ["model", *HEADINGS.values()]
    rows = []
    for name, label in labels(result).items():
        line: list[Any] = [label]
        for key in HEADINGS:
            value = Interval(*result[name][key])
            if key == "win_rate":
                line.append("50 (by definition)" if name == "initial" else value.format(1, 100))
            elif key == "mean":
                line.append(value.format(3))
            else:
                line.append(f"{value.estimate:.{1 if key == 'words' else 2}f}")
        rows.append(line)
    return columns, rows


def print_table(columns: Sequence[str], rows: Sequence[Sequence[Any]], console: Console) -> None:
    """The result table on a terminal or in a log."""
    table = TerminalTable(title="Held-out images, oracle scores 0-3, 95 % intervals")
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left", no_wrap=number == 0)
    for row in rows:
        table.add_row(*map(str, row))
    if not console.is_terminal:
        console.width = max(console.width, 140)
    console.print(table)


def sample_rows(workdir: Path, test: Sequence, count: int = 12) -> list[list[Any]]:
    """The first test prompts whose self-improved answer differs from the first one."""
    folder = workdir / "evaluate"
    first = _lines(folder / "initial.jsonl")
    said = _lines(folder / "critique_trained.jsonl")
    second = _lines(folder / "refine_trained.jsonl")
    rows = []
    for index, record in enumerate(test):
        before, after = first[index]["text"], second[index]["text"]
        if before == after:
            continue
        critique, refinement = llf_prompts.split_feedback(said[index]["text"], WORDING)
        gain = [f"{digits.overall(record.task, text):.2f}" for text in (before, after)]
        rows.append(
            [record.image, record.task.question, before, critique, refinement, after,
             " → ".join(gain)]
        )  # fmt: skip
        if len(rows) == count:
            break
    return rows


def _lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def _bar(label: str, line: Mapping[str, Any]) -> report.Bar:
    value = Interval(*line["win_rate"])
    return report.Bar(label, value.estimate, value.low, value.high)


def labels(result: Mapping[str, Any]) -> dict[str, str]:
    """Rows of the result table, in order, with what they are called."""
    found = {}
    for name, label in ROWS.items():
        found[name] = label
        if name == "llf":
            found |= {
                other: _arm_label(other.removeprefix("llf_"))
                for other in result
                if other.startswith("llf_") and not other.endswith("_greedy")
                and not other.startswith(_DIRECT)
            }  # fmt: skip
    return found


def _arm_label(name: str) -> str:
    if name in _VARIANTS:
        return f"DPO + LLF, {_VARIANTS[name]}"
    return f"DPO + LLF, {name} % of the feedback"


def direct_comparison(result: Mapping[str, Any]) -> str:
    """One sentence: LLF against binary DPO on the same prompts."""
    line = result[_DIRECT]
    gap, rate = Interval(*line["mean_difference"]), Interval(*line["win_rate"])
    verdict = "no difference can be told"
    if gap.low > 0 or gap.high < 0:
        verdict = "DPO + LLF is ahead" if gap.low > 0 else "DPO on binary pairs is ahead"
    return (
        f"DPO + LLF against DPO on binary pairs, same prompts: mean score difference "
        f"{gap.format(3)}, win rate {rate.format(1, 100)} %: {verdict} (this training seed)."
    )


def _greedy_table(result: Mapping[str, Any]) -> tuple[list[str], list[list[Any]]]:
    named = labels(result)
    names = [name for name in named if f"{name}_greedy" in result]
    columns = ["model", *HEADINGS.values()]
    rows = []
    for name in names:
        line = result[f"{name}_greedy"]
        cells = [f"{line[key][0]:.{1 if key == 'words' else 3}f}" for key in list(HEADINGS)[:-1]]
        rate = "50 (by definition)" if name == "initial" else Interval(*line["win_rate"])
        rows.append([named[name], *cells, rate if isinstance(rate, str) else rate.format(1, 100)])
    return columns, rows


def _glance(found: Mapping[str, dict]) -> dict[str, tuple[str, str]]:
    result, collected = found["evaluate"], found["collect"]
    values = {}
    for name in ("llf", "binary", "improved_trained"):
        rate = Interval(*result[name]["win_rate"])
        values[f"{ROWS[name]}: win rate"] = (
            f"{100 * rate.estimate:.1f} %", f"95 % interval {rate.format(1, 100)}"
        )  # fmt: skip
    values["annotators agree"] = (
        f"{100 * collected['agreement_binary']:.1f} % → "
        f"{100 * collected['agreement_feedback']:.1f} %",
        "binary labels → language feedback (paper, Table 1: 62.5 → 70.5)",
    )
    return values


def _curves(workdir: Path, found: Mapping[str, dict]) -> list[report.Curves]:
    def read(stage: str, name: str) -> Any:
        return series(read_metrics(workdir, stage=stage), name)

    charts = [
        report.Curves("Vision tower", {"probe loss": read("tower", "loss")}, ylabel="nats"),
        report.Curves("Base model", {"loss": read("pretrain", "loss")}, ylabel="nats per token"),
        report.Curves("Initial model", {"SFT loss": read("sft", "loss")}, ylabel="nats per token"),
        report.Curves("Feedback model", {"SFT loss": read("feedback", "loss")},
                      ylabel="nats per token"),
    ]  # fmt: skip
    cells = found["dpo"]["cells"]
    for name, title in (("loss", "DPO loss"), ("accuracy", "DPO accuracy on training pairs")):
        lines = {
            f"{c['arm']}, lr {c['lr']:g}": read(f"dpo.{c['arm']}_lr{c['lr']:g}", name)
            for c in cells
        }
        reference = {"chance": 0.6931} if name == "loss" else {"chance": 0.5}
        charts.append(report.Curves(title, lines, reference=reference))
    return charts


def _stage_figures(workdir: Path, found: Mapping[str, dict]) -> dict[str, Any]:
    shown = {}
    for name in _STAGES:
        figures = {"seconds": round(seconds(workdir, name), 1)}
        if name not in ("dpo", "evaluate"):
            figures |= {k: _rounded(v) for k, v in found[name].items()}
        shown[name] = figures
    return shown


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return round(value, 4)
    return {k: _rounded(v) for k, v in value.items()} if isinstance(value, Mapping) else value
