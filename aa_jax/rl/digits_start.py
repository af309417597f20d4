"""Where reinforcement learning on the digits world starts: a small model trained from nothing.

Stages for any family: `tokenizer` (Chameleon alone) learns to draw, `pretrain` learns what
pre-trained models bring along from answers without flaws, `sft` imitates people who err, `collect`
samples two answers per prompt for the reward model's pairs. (The small LLaVA has its own start,
`aa_jax.llf.digits_run`.)
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from aa_jax import image_recipe, small_models
from aa_jax.llf import pipeline
from aa_jax.llf.stages import Stage
from aa_jax.rl.digits_subtasks import DRAWN

STAGES = ("tokenizer", "pretrain", "sft", "collect")
BASE = "sft/model"
TOKENIZER = "tokenizer/tokenizer"


def stages(
    workdir: Path,
    asked: Any,
    *,
    model: Mapping[str, Any] | None = None,
    pretrain: Mapping[str, Any],
    sft: Mapping[str, Any],
    image_tokenizer: Mapping[str, Any] | None = None,
    pretrain_examples: int = 10_000,
    demonstrations: Mapping[str, Any] | None = None,
    preference_prompts: int = 3000,
) -> list[Stage]:
    """The stages, to be run by `aa_jax.llf.stages.run_stages`.

    Args:
      workdir: run directory.
      asked: the subtask, from `aa_jax.rl.digits_subtasks`.
      model: keyword arguments of `aa_jax.small_models.write_model`.
      pretrain: keyword arguments of `recipes.train` for the base model.
      sft: the same for the initial model.
      image_tokenizer: for a Chameleon: keyword arguments of `image_recipe.train_tokenizer`.
      pretrain_examples: answers without flaws the base model learns from.
      demonstrations: `n`, and options of the subtask's `demonstrations`.
      preference_prompts: prompts that get two answers each.
    """
    lab, draws = asked.lab, asked.subtask in DRAWN

    def tokenizer_stage(folder: Path) -> dict:
        return image_recipe.train_tokenizer(
            workdir=folder, mesh=lab.mesh, max_digits=asked.max_digits,
            seed=lab.stream("tokenizer") % 2**31, **(image_tokenizer or {}),
        )[2]  # fmt: skip

    def pretrain_stage(folder: Path) -> dict:
        start = folder / "start"
        small_models.write_model(
            start, asked.subtask, max_digits=asked.max_digits, seed=lab.stream("model"),
            **({"image_tokenizer": workdir / TOKENIZER} if draws else {}), **(model or {}),
        )  # fmt: skip
        shown = asked.demonstrations(pretrain_examples, lab.stream("clean"), clean=True)
        return pipeline.train_model(folder, lab, "sft", base=str(start), examples=shown, **pretrain)

    def sft_stage(folder: Path) -> dict:
        options = {"n": 10_000, **(demonstrations or {})}
        shown = asked.demonstrations(options.pop("n"), lab.stream("demonstrations"), **options)
        return pipeline.train_model(
            folder, lab, "sft", base=str(workdir / "pretrain/model"), examples=shown, **sft
        )

    def collect_stage(folder: Path) -> dict:
        base = str(workdir / BASE)
        asked.fit(base)
        records, params = asked.records("train", preference_prompts), lab.load(base)[1]
        for k in (1, 2):
            asked.answer(folder / f"response_{k}.jsonl", records, params=params, base=base)
        return {"prompts": preference_prompts}

    made: Sequence[tuple[str, str, Callable[[Path], dict], tuple[str, ...]]] = (
        ("pretrain", "base model: to perceive and to reckon", pretrain_stage, STAGES[:1] * draws),
        ("sft", "initial model: SFT on imperfect demonstrations", sft_stage, ("pretrain",)),
        ("collect", "two of its answers to every prompt", collect_stage, ("sft",)),
    )
    first = Stage(STAGES[0], "image tokenizer: to draw digits", tokenizer_stage)
    return [first] * draws + [Stage(*one) for one in made]
