"""What a person sees of an LLF run on a dataset: report.html."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from aa_jax import report
from aa_jax.data import llf_prompts
from aa_jax.data.example import Example
from aa_jax.llf.respond import read_lines
from aa_jax.llf.stages import seconds
from aa_jax.training.metrics import read_metrics, series


def write(
    workdir: Path,
    found: Mapping[str, Mapping[str, Any]],
    prompts: Sequence[Example],
    wording: Mapping[str, str] | None,
) -> dict[str, Any]:
    """Writes report.html.

    Args:
      workdir: a run whose stages up to `dpo` have finished.
      found: their summaries.
      prompts: the prompts that were answered, with decoded images.
      wording: of the feedback prompts.

    Returns:
      Where the report is, and the minutes the stages took.
    """
    wall = sum(seconds(workdir, name) for name in found)
    cells, chosen = found["dpo"]["cells"], found["dpo"]["chosen"]

    def curve(stage: str, name: str) -> Any:
        return series(read_metrics(workdir, stage=stage), name)

    charts = [report.Curves("Feedback model", {"SFT loss": curve("feedback", "loss")},
                            ylabel="nats per token")]  # fmt: skip
    titles = {
        "loss": ("DPO loss", 0.6931),
        "accuracy": ("Accuracy on training pairs", 0.5),
        "eval/accuracy": ("Accuracy on held-out preferences", 0.5),
    }
    for name, (title, chance) in titles.items():
        lines = {f"{c['arm']}, lr {c['lr']:g}": curve(f"dpo.{c['arm']}_lr{c['lr']:g}", name)
                 for c in cells}  # fmt: skip
        lines = {label: line for label, line in lines.items() if len(line[1])}
        if lines:
            charts.append(report.Curves(title, lines, reference={"chance": chance}))
    path = report.write_report(
        workdir, "Learning from language feedback",
        [
            report.KeyValues("Pairs y* ≻ y", found["improve"]),
            report.Table(
                "Learning rates, chosen on held-out preferences",
                ["arm", "learning rate", "updates", "held-out accuracy %", "chosen"],
                [[c["arm"], c["lr"], c["steps"], _percent(c["accuracy"]),
                  "yes" if chosen[c["arm"]] == c["lr"] else ""] for c in cells],
                caption=f"Every arm sees {found['dpo']['pairs']} pairs. Accuracy: how often the "
                "implicit reward ranks a held-out pair as its label does.",
            ),
            report.Samples(
                "Self-improvement", ["image", "question", "y", "critique", "refinement", "y*"],
                sample_rows(workdir, prompts, wording),
                caption="The first prompts where y* differs from y.", tones={"y*": "accent"},
            ),
            report.Grid("Learning curves", charts),
        ],
        wall_seconds=wall,
    )  # fmt: skip
    return {"report": str(path), "minutes": round(wall / 60, 2)}


def _percent(share: float) -> str:
    return "not measured" if share != share else f"{100 * share:.1f}"


def sample_rows(
    workdir: Path,
    prompts: Sequence[Example],
    wording: Mapping[str, str] | None,
    count: int = 12,
) -> list[list[Any]]:
    """The first prompts whose improved answer differs from the first one."""
    first, said, second = (
        read_lines(workdir / "improve" / f"{name}.jsonl")
        for name in ("response", "critique", "refine")
    )
    rows: list[list[Any]] = []
    for index, (y, c, improved) in enumerate(zip(first, said, second, strict=True)):
        if y["text"] == improved["text"]:
            continue
        prompt = prompts[index]
        critique, refinement = llf_prompts.split_feedback(c["text"], wording)
        image = prompt.media[0] if prompt.media else "–"
        question = prompt.messages[-1].text
        rows.append([image, question, y["text"], critique, refinement, improved["text"]])
        if len(rows) == count:
            break
    return rows
