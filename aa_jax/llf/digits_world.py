"""The digits world as the LLF pipeline sees it: prompt sets, annotation, grading by the oracle."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from aa_jax.data import digits
from aa_jax.eval.statistics import Interval, bootstrap_mean, win_rate
from aa_jax.llf.pairs import normalise
from aa_jax.llf.prompts import Lazy

DIMENSIONS = digits.INFORMATIVE


def prompt_examples(records: Sequence) -> Sequence:
    """World prompts as prompt-only Examples, images drawn on access."""
    return Lazy(len(records), lambda i: records[i].to_data_example(()))


def annotate(
    path: Path,
    records: Sequence,
    first: Sequence[Mapping[str, Any]],
    second: Sequence[Mapping[str, Any]],
    *,
    annotator: str,
    source: str,
    seed: int,
    limit: int | None = None,
) -> dict[str, Any]:
    """Annotators compare and criticise two sampled answers per prompt; writes parquet rows.

    Args:
      path: parquet file, columns of align-anything's text-image-to-text.
      records: world prompts.
      first: sampled answers, by `text`.
      second: as many again.
      annotator: "bounded" or "flips"; calibrated to Table 1 of the paper on these very pairs.
      source: who wrote the answers.
      seed: of the annotators' errors.
      limit: rows to keep; further usable pairs are left out.

    Returns:
      Counts, and how good the labels are (which a real dataset could not tell).
    """
    kept, counts = [], {"identical": 0, "empty": 0, "cut": 0}
    for index, (a, b) in enumerate(zip(first, second, strict=True)):
        if not (a["finished"] and b["finished"]):
            counts["cut"] += 1
        elif not a["text"].strip() or not b["text"].strip():
            counts["empty"] += 1
        elif normalise(a["text"]) == normalise(b["text"]):
            counts["identical"] += 1
        else:
            kept.append(index)
    kept = kept[:limit]
    pairs = [
        digits.Pair(records[i].task, normalise(first[i]["text"]), normalise(second[i]["text"]))
        for i in kept
    ]
    person = digits.calibrated(annotator, "TI2T", pairs=pairs, seed=seed)

    def row(position: int) -> dict:
        pair = pairs[position]
        return digits.preference_row(
            records[kept[position]],
            pair.response_1,
            pair.response_2,
            np.random.default_rng((41, seed, position)),
            annotator=person,
            sources=(source, source),
            meta=True,
        )

    rows = [row(position) for position in range(len(kept))]
    digits.write_parquet(rows, path)
    labels = np.array([row["overall_response"] for row in rows])[:, None]
    fresh = np.random.default_rng((42, seed))
    return {
        "rows": len(rows),
        **counts,
        "label_accuracy": digits.accuracy(labels, pairs),
        "agreement_binary": digits.agreement(person.binary_labels(pairs, fresh, 10)),
        "agreement_feedback": digits.agreement(person.feedback_labels(pairs, fresh, 10)),
    }


def scores(records: Sequence, answers: Sequence[Mapping[str, Any]]) -> dict[str, list[float]]:
    """Oracle scores per prompt: each informative dimension, their mean, and the length in words."""
    table: dict[str, list[float]] = {name: [] for name in (*DIMENSIONS, "mean", "words")}
    for record, answer in zip(records, answers, strict=True):
        grade = digits.grade(record.task, answer["text"])
        for name in DIMENSIONS:
            table[name].append(float(getattr(grade, name)))
        table["mean"].append(float(grade.overall))
        table["words"].append(float(len(answer["text"].split())))
    return table


def feedback_quality(
    records: Sequence, answers: Sequence[Mapping], feedback: Sequence[Mapping]
) -> dict[str, float]:
    """Shares of what feedback says that is true, over all prompts."""
    counts: dict[str, list[bool]] = {}
    for record, answer, said in zip(records, answers, feedback, strict=True):
        parts = digits.feedback_accuracy(record.task, answer["text"], said["text"])
        items = [parts[fact] for fact in record.task.facts]
        for name, value in (("facts", items), ("form", [parts["form"]]),
                            ("refinement", [parts["refinement"]])):  # fmt: skip
            counts.setdefault(name, []).extend(value)
    return {name: float(np.mean(values)) for name, values in counts.items()}


def complaints(feedback: str) -> int:
    """How many things a piece of feedback asks to change."""
    return len(digits.parse_feedback(feedback).actions)


def pair_truth(records: Sequence, pairs: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Share of LLF pairs whose y* is truly better, tied or worse than y."""
    truth = [
        digits.prefer(records[pair["index"]].task, pair["refinement"], pair["response"])
        for pair in pairs
    ]
    names = {"better": 1, "tied": 0, "worse": 2}
    return {name: float(np.mean([t == code for t in truth])) for name, code in names.items()}


def summarise(
    table: Mapping[str, list[float]], baseline: Mapping[str, list[float]]
) -> dict[str, Interval]:
    """Mean of every score and the win rate against the baseline's answers, with intervals."""
    result = {name: bootstrap_mean(np.array(values)) for name, values in table.items()}
    result["win_rate"] = win_rate(np.array(table["mean"]), np.array(baseline["mean"]))
    return result


def read_scores(path: Path) -> dict[str, list[float]]:
    """Scores a stage wrote."""
    return json.loads(path.read_text())
