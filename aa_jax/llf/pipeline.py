"""Learning from language feedback, as resumable stages (Ji et al. 2024, section 4).

    x ──M_θ──► y ──M_φ──► c ──M_θ──► y*        pairs y* ≻ y ──DPO──► M_θ'

The feedback model M_φ is trained on (x, y) -> critique + refinement; M_θ improves its own answer y
with the refinement; the improved answers become preference pairs. Beside it, the baseline: DPO on
as many pairs with binary labels. Every arm is trained over the same learning rates, and one is
chosen on validation data.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from aa_jax import recipes
from aa_jax.data import sources, templates
from aa_jax.data.example import Example
from aa_jax.errors import ConfigError
from aa_jax.llf.lab import Lab
from aa_jax.llf.pairs import form_pairs, write_pairs
from aa_jax.llf.prompts import critique_prompts, refine_prompts
from aa_jax.llf.stages import read_json, write_json
from aa_jax.models import adapt
from aa_jax.runs import save


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
    examples: Sequence,
    lora: Mapping[str, Any] | None = None,
    **training: Any,
) -> dict[str, Any]:
    """Trains a copy of `base` by a recipe and saves it as `folder/model`.

    With low-rank adapters that is the base with them merged in, and `folder/adapter` holds them.

    Args:
      folder: of the stage.
      lab: shared settings.
      recipe: a key of `recipes.RECIPES`.
      base: checkpoint folder it starts from.
      examples: Examples, or data already encoded.
      lora: keyword arguments of `aa_jax.models.adapt.attach`: adapters train, the model does not.
      **training: keyword arguments of `recipes.train`.
    """
    model, params, processor = lab.load(base)
    stage = str(folder.relative_to(lab.workdir)).replace("/", ".")
    if lora is not None:
        seed = lab.stream(stage)
        model, params = adapt.attach(model, params, shardings=lab.places, **{"seed": seed, **lora})
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
    save(folder, model, params, base)
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
    """Forms the pairs y* ≻ y and writes them as parquet (templates AA_T2T_LLF, AA_TI2T_LLF).

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
    arms: Mapping[str, Sequence],
    lrs: Sequence[float],
    judge: Callable[[Path], Mapping[str, Any]],
    best: str,
    optim: Mapping[str, Any],
    **training: Any,
) -> dict[str, Any]:
    """DPO of every arm at every learning rate, judged on validation data.

    Nothing here touches test data.

    Args:
      folder: of the stage; a cell goes to `<arm>_lr<lr>`.
      lab: shared settings.
      base: checkpoint folder of the initial model.
      arms: arm -> preferences, of equal number, so that all arms take as many updates.
      lrs: peak learning rates, the same for every arm.
      judge: called with a trained cell's folder; its figures on validation data.
      best: the figure by which each arm's learning rate is chosen, the largest wins.
      optim: further keyword arguments of `make_optimizer`.
      **training: keyword arguments of `recipes.train`.

    Returns:
      `pairs` per arm, `cells` (arm, lr, updates and the judge's figures) and the `chosen` lr.

    Raises:
      ConfigError: the arms differ in size.
    """
    sizes = {arm: len(examples) for arm, examples in arms.items()}
    if len(set(sizes.values())) != 1:
        raise ConfigError(f"the arms must have equally many pairs to be compared, not {sizes}.")
    cells = []
    for arm, examples in arms.items():
        for lr in lrs:
            cell = folder / f"{arm}_lr{lr:g}"
            done = cell / "cell.json"
            if read_json(done) is None:
                figures = train_model(
                    cell, lab, "dpo", base=base, examples=examples,
                    optim={**optim, "lr": lr}, reference_cache=folder / f"{arm}_reference.npz",
                    **training,
                )  # fmt: skip
                write_json(done, {"arm": arm, "lr": lr, "steps": figures["steps"], **judge(cell)})
            cells.append(read_json(done))
    chosen = {
        arm: max((c for c in cells if c["arm"] == arm), key=lambda c: c[best])["lr"] for arm in arms
    }
    return {"pairs": sizes.popitem()[1], "cells": cells, "chosen": chosen}


def cell_model(folder: Path, arm: str, lr: float) -> str:
    """Checkpoint folder of one cell of `train_arms`."""
    return str(folder / f"{arm}_lr{lr:g}" / "model")
