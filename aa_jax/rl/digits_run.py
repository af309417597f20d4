"""Reinforcement learning on the digits world: does a learned reward raise the true score?

Starts from the initial model of an LLF run (`aa_jax.llf.digits_run`): a reward model learns from
pairs of that model's answers, labelled by the oracle or by the annotators; policies are trained
against it by several algorithms over the same learning rates. The rate is chosen on validation
prompts twice, by the oracle and by the reward model, which is all a real run has: the second
choice shows what that costs. Test prompts are answered once and graded by the oracle.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from aa_jax import hosts, models, recipes
from aa_jax.data import digits, sources, templates
from aa_jax.data.example import Example
from aa_jax.errors import ConfigError, DataError
from aa_jax.llf import digits_run as llf
from aa_jax.llf import digits_world as world
from aa_jax.llf.lab import Lab, Lengths
from aa_jax.llf.prompts import Lazy
from aa_jax.llf.respond import read_lines
from aa_jax.llf.stages import Stage, run_stages, summary, write_json
from aa_jax.models import heads
from aa_jax.rewards.learned import RewardModel
from aa_jax.rewards.oracle import Oracle
from aa_jax.rl.train import train
from aa_jax.sharding.mesh import make_mesh
from aa_jax.training.metrics import read_metrics

START = ("tower", "pretrain", "sft", "collect")
LABELS = ("oracle", "annotators")


def run(
    workdir: str | Path,
    *,
    start: Mapping[str, Any],
    algorithms: Mapping[str, Mapping[str, Any]],
    lrs: Sequence[float],
    rollout: Mapping[str, Any],
    reward: Mapping[str, Any],
    labels: str = "oracle",
    prompts: int = 3000,
    validation_prompts: int = 256,
    test_prompts: int = 1024,
    seed: int = 0,
    max_digits: int = 3,
    frozen: Sequence[str] = ("vision_tower/*",),
    sampling: Mapping[str, Any] | None = None,
    optim: Mapping[str, Any] | None = None,
    mesh: Mapping[str, int] | None = None,
    stage: str | None = None,
) -> dict[str, dict]:
    """Runs (or continues) the experiment; every argument is a section or key of the config.

    Args:
      workdir: run directory. The stages the initial model comes from are run in it if they are not
        finished there.
      start: keyword arguments of `aa_jax.llf.digits_run.run` for those stages.
      algorithms: arm -> its own keyword arguments of `aa_jax.rl.train.train`, with `algorithm` if
        the arm is not named like one; a `rollout` among them adds to the common one; `reward` is
        "learned" (the reward model) or "oracle" (the truth itself, as a verifiable reward).
      lrs: learning rates, the same for every algorithm.
      rollout: keyword arguments of `Plan`, common to all.
      reward: keyword arguments of `recipes.train` for the reward model.
      labels: who labels its pairs, "oracle" or "annotators".
      prompts: to train on; not those of the reward model's pairs.
      validation_prompts: on which the learning rates are chosen.
      test_prompts: held out, images of test digits.
      seed: of everything.
      max_digits: digits per strip.
      frozen: globs of parameters that do not train.
      sampling: `batch_rows`, `temperature`.
      optim: keyword arguments of `make_optimizer` but the rate.
      mesh: sizes for `make_mesh`.
      stage: run just this stage.

    Returns:
      stage name -> summary.

    Raises:
      ConfigError: unknown labels.
    """
    for arm, own in algorithms.items():
        if own.get("reward", "learned") not in ("learned", "oracle"):
            raise ConfigError(f"algorithms.{arm}.reward must be learned or oracle.")
    if labels not in LABELS:
        raise ConfigError(f"labels is {labels!r}; it must be one of {', '.join(LABELS)}.")
    hosts.only_one("the digits experiment")
    workdir = Path(workdir)
    lab = Lab(
        workdir=workdir, mesh=make_mesh(**(mesh or {})), seed=seed,
        lengths=Lengths(**llf.default_lengths(max_digits)), **(sampling or {}),
    )  # fmt: skip
    base = str(workdir / llf.BASE)
    shown = int(start.get("preference_prompts", 3200))

    def records(split: str, count: int, offset: int = 0) -> Sequence:
        every = digits.evaluation_prompts(offset + count, seed, split, max_digits=max_digits)
        return Lazy(count, lambda i: every[offset + i])

    def tasks(of: Sequence) -> Sequence[Example]:
        return Lazy(
            len(of), lambda i: of[i].to_data_example(()).replace(meta={"reference": of[i].task})
        )

    def reward_stage(folder: Path) -> dict:
        pairs = labelled_pairs(workdir, records("train", shown), labels)
        if len(pairs) < 2:
            raise DataError(
                f"{len(pairs)} of {shown} pairs of answers in {workdir / 'collect'} can be "
                f"labelled by the {labels}: the others are tied, empty or cut off. Train the "
                "initial model longer (start.sft.steps) or raise start.preference_prompts."
            )
        held = max(1, len(pairs) // 10)
        model, params, processor = lab.load(base)
        options = {"frozen": frozen, **reward}
        final, figures = recipes.train(
            "reward", model=model, params=params, processor=processor, examples=pairs[held:],
            eval_examples=pairs[:held], workdir=workdir, stage="reward", mesh=lab.mesh,
            seed=lab.stream("reward"), **options,
        )  # fmt: skip
        heads.save(folder / "model", model, final, extra_files_from=base, overwrite=True)
        last = [line for line in read_metrics(workdir, stage="reward") if "eval/accuracy" in line]
        return {**figures, "held_out_accuracy": last[-1]["eval/accuracy"]}

    def judge() -> RewardModel:
        return RewardModel(str(workdir / "reward/model"), mesh=lab.mesh)

    def rl_stage(folder: Path) -> dict:
        cells = []
        graded = records("validation", validation_prompts)
        validation, learned = tasks(graded), judge()
        for arm, own in algorithms.items():
            for lr in lrs:
                cell = folder / f"{arm}_lr{lr:g}"
                if not (cell / "cell.json").exists():
                    write_json(cell / "cell.json", cell_of(cell, arm, dict(own), lr, learned))
                params = models.load(str(cell / "model"), dtype=lab.dtype)[1]
                answers = lab.answer(
                    cell / "validation.jsonl", validation, kind="answer", params=params, base=base
                )
                figures = {
                    "reward": np.mean(learned.scores(validation, [a["text"] for a in answers])),
                    "oracle": np.mean(world.scores(graded, answers)["mean"]),
                }
                line = json.loads((cell / "cell.json").read_text())
                cells.append(line | {key: float(value) for key, value in figures.items()})
        chosen = {
            by: {
                arm: max((c for c in cells if c["arm"] == arm), key=lambda c, k=by: c[k])["lr"]
                for arm in algorithms
            }
            for by in ("oracle", "reward")
        }
        return {"cells": cells, "chosen": chosen}

    def cell_of(cell: Path, arm: str, own: dict, lr: float, learned: RewardModel) -> dict:
        model, params, processor = lab.load(base)
        stage_name = f"rl.{cell.name}"
        payer = {"learned": learned, "oracle": Oracle()}[own.pop("reward", "learned")]
        final, figures = train(
            own.pop("algorithm", arm), model=model, params=params, processor=processor,
            prompts=tasks(records("train", prompts, shown)), reward=payer, workdir=workdir,
            mesh=lab.mesh, frozen=frozen, seed=lab.stream(stage_name), stage=stage_name,
            rollout={**rollout, **own.pop("rollout", {})},
            sampling={"max_new_tokens": lab.lengths.answer, "batch_rows": lab.batch_rows,
                      "temperature": lab.temperature},
            optim={**(optim or {}), "lr": lr}, **own,
        )  # fmt: skip
        models.save(cell / "model", model, final, extra_files_from=base, overwrite=True)
        last = read_metrics(workdir, stage=f"{stage_name}.rollout")[-1]
        return {
            "arm": arm, "lr": lr, "updates": figures["updates"], "kl": last.get("kl"),
            "seconds": figures["seconds"],
        }  # fmt: skip

    def evaluate_stage(folder: Path) -> dict:
        chosen = summary(workdir, "rl")["chosen"]
        test = records("test", test_prompts)
        asked, learned, result, tables = tasks(test), judge(), {}, {}
        named = {"initial": base} | {
            arm if by == "oracle" else f"{arm}_by_reward": str(workdir / f"rl/{arm}_lr{lr:g}/model")
            for by in ("oracle", "reward")
            for arm, lr in chosen[by].items()
        }
        for name, model in named.items():
            for greedy in (False, True):
                row = f"{name}_greedy" if greedy else name
                answers = lab.answer(
                    folder / f"{row}.jsonl", asked, kind="answer", params=lab.load(model)[1],
                    base=base, greedy=greedy,
                )  # fmt: skip
                tables[row] = world.scores(test, answers)
                write_json(folder / f"{row}_scores.json", tables[row])
                against = tables["initial_greedy" if greedy else "initial"]
                result[row] = {k: list(v) for k, v in world.summarise(tables[row], against).items()}
                paid = learned.scores(asked, [a["text"] for a in answers])
                result[row]["reward"] = float(np.mean(paid))
        return result

    if stage is None or stage in START:
        for name in START:
            llf.run(workdir, seed=seed, max_digits=max_digits, stage=name, **start)
        if stage in START:
            return {stage: summary(workdir, stage)}
    stages = [
        Stage(
            "reward", f"reward model: pairs labelled by the {labels}", reward_stage, ("collect",)
        ),
        Stage("rl", "policies against the reward model", rl_stage, ("reward",)),
        Stage("evaluate_rl", "held-out images, judged by the oracle", evaluate_stage, ("rl",)),
    ]
    return run_stages(workdir, stages, only=stage)


def labelled_pairs(workdir: Path, records: Sequence, labels: str) -> list[Example]:
    """Two answers of the initial model per prompt, (better, worse); ties are left out."""
    if labels == "annotators":
        rows = sources.open_source(str(workdir / "collect/preferences.parquet"))
        return [templates.TEMPLATES["AA_TI2T"].preference(row) for row in rows]
    first, second = (read_lines(workdir / f"collect/response_{k}.jsonl") for k in (1, 2))
    pairs = []
    for record, a, b in zip(records, first, second, strict=True):
        usable = a["finished"] and b["finished"] and a["text"].strip() and b["text"].strip()
        better = digits.prefer(record.task, a["text"], b["text"]) if usable else 0
        if better:
            texts = (a["text"], b["text"]) if better == 1 else (b["text"], a["text"])
            pairs.append(record.to_data_example(texts))
    return pairs
