"""Learning from language feedback, as resumable stages (Ji et al. 2024, section 4).

    x ──M_θ──► y ──M_φ──► c ──M_θ──► y*        pairs y* ≻ y ──DPO──► M_θ'

The feedback model M_φ is trained on (x, y) -> critique + refinement; M_θ improves its own answer y
with the refinement; the improved answers become preference pairs. Beside it, the baseline: DPO on
as many pairs with binary labels. Every arm is trained over the same learning rates, one is chosen
on validation prompts, and test prompts are answered once.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from aa_jax import models, recipes
from aa_jax.data import sources, templates
from aa_jax.data.example import Example
from aa_jax.llf import digits_world as world
from aa_jax.llf.lab import Lab
from aa_jax.llf.pairs import form_pairs, write_pairs
from aa_jax.llf.prompts import critique_prompts, refine_prompts
from aa_jax.llf.stages import write_json


def train_feedback_model(
    folder: Path, lab: Lab, *, base: str, preferences: str, template: str, **training: Any
) -> dict[str, Any]:
    """Feedback modelling: SFT of the initial model on (x, y) -> critique and refinement.

    Args:
      folder: of the stage; the model goes to `model/`.
      lab: shared settings.
      base: checkpoint folder of the initial model.
      preferences: dataset with critiques, read through `template`.
      template: a key of `aa_jax.data.templates.TEMPLATES`.
      **training: keyword arguments of `recipes.train`; `share` < 1 uses only the first part of
        the dataset's rows (Figure 5 of the paper).
    """
    share = training.pop("share", 1.0)
    rows = sources.open_source(preferences)
    count = int(round(share * len(rows)))
    shown = templates.TEMPLATES[template]
    examples = [
        example
        for index in range(count)
        for example in shown.feedback(rows[index], wording=lab.wording)
    ]
    return train_model(folder, lab, "feedback", base=base, examples=examples, **training)


def train_model(
    folder: Path,
    lab: Lab,
    recipe: str,
    *,
    base: str,
    examples: Sequence[Example],
    **training: Any,
) -> dict[str, Any]:
    """Trains a copy of `base` by a recipe and saves it as `folder/model`."""
    model, params, processor = lab.load(base)
    stage = str(folder.relative_to(lab.workdir)).replace("/", ".")
    params, figures = recipes.train(
        recipe,
        model=model,
        params=params,
        processor=processor,
        examples=examples,
        workdir=lab.workdir,
        stage=stage,
        mesh=lab.mesh,
        seed=lab.stream(stage),
        **training,
    )
    models.save(folder / "model", model, params, extra_files_from=base, overwrite=True)
    return figures


def self_improve(
    folder: Path,
    lab: Lab,
    prompts: Sequence[Example],
    answers: Sequence[Mapping[str, Any]],
    *,
    base: str,
    feedback_model: str,
    name: str = "",
) -> tuple[list[dict], list[dict]]:
    """c from the feedback model, then y* from the initial model: (feedback, refined answers)."""
    ask = critique_prompts(prompts, answers, lab.wording)
    feedback = lab.answer(
        folder / f"critique{name}.jsonl", ask, kind="critique",
        params=lab.load(feedback_model)[1], base=base,
    )  # fmt: skip
    ask = refine_prompts(prompts, answers, feedback, lab.wording)
    refined = lab.answer(
        folder / f"refine{name}.jsonl", ask, kind="refine", params=lab.load(base)[1], base=base
    )
    return feedback, refined


def make_pairs(
    path: Path,
    prompts: Sequence[Example],
    answers: Sequence[Mapping[str, Any]],
    refined: Sequence[Mapping[str, Any]],
    limit: int | None,
    keep: Callable[[int], bool] = lambda index: True,
) -> tuple[list[dict], dict[str, int]]:
    """Forms the pairs y* ≻ y and writes them as parquet (template AA_TI2T_LLF reads it).

    Args:
      path: the file.
      prompts: x.
      answers: y.
      refined: y*.
      limit: pairs to use at most.
      keep: says of a prompt's index whether its pair may be used.

    Returns:
      The pairs used, and counts of what was kept and dropped.
    """
    pairs, counts = form_pairs(answers, refined)
    wanted = [pair for pair in pairs if keep(pair["index"])]
    counts["unwanted"] = len(pairs) - len(wanted)
    pairs = wanted[:limit]
    write_pairs(path, pairs, prompts)
    return pairs, {**counts, "used": len(pairs)}


def train_arms(
    folder: Path,
    lab: Lab,
    *,
    base: str,
    arms: Mapping[str, Sequence[Example]],
    lrs: Sequence[float],
    prompts: Sequence[Example],
    records: Sequence,
    baseline: Mapping[str, list[float]],
    optim: Mapping[str, Any],
    **training: Any,
) -> dict[str, Any]:
    """DPO of every arm at every learning rate, scored on validation prompts.

    All arms see the same number of pairs, cut to the smallest arm. The learning rate with the best
    mean validation score is chosen for each arm; nothing here touches a test prompt.

    Returns:
      `pairs` per arm, `cells` (arm, lr, mean and win rate on validation) and the `chosen` lr.
    """
    count = min(len(examples) for examples in arms.values())
    cells = []
    for arm, examples in arms.items():
        for lr in lrs:
            cell = folder / f"{arm}_lr{lr:g}"
            done = cell / "cell.json"
            if not done.exists():
                figures = train_model(
                    cell, lab, "dpo", base=base, examples=examples[:count],
                    optim={**optim, "lr": lr}, reference_cache=folder / f"{arm}_reference.npz",
                    **training,
                )  # fmt: skip
                _, params = models.load(str(cell / "model"), dtype=lab.dtype)
                answers = lab.answer(
                    cell / "validation.jsonl", prompts, kind="answer", params=params, base=base
                )
                table = world.scores(records, answers)
                line = world.summarise(table, baseline)
                write_json(
                    done,
                    {
                        "arm": arm, "lr": lr, "mean": line["mean"].estimate,
                        "win_rate": line["win_rate"].estimate, "steps": figures["steps"],
                    },
                )  # fmt: skip
            cells.append(json.loads(done.read_text()))
    chosen = {
        arm: max((c for c in cells if c["arm"] == arm), key=lambda c: c["mean"])["lr"]
        for arm in arms
    }
    return {"pairs": count, "cells": cells, "chosen": chosen}


def cell_model(folder: Path, arm: str, lr: float) -> str:
    """Checkpoint folder of one cell of `train_arms`."""
    return str(folder / f"{arm}_lr{lr:g}" / "model")
