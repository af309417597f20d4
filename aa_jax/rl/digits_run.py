"""Reinforcement learning on the digits world: does a learned reward raise the true score?

The same experiment for every subtask and family. It starts from an initial model made by SFT on
imperfect demonstrations (`aa_jax.llf.digits_run` for LLaVA, `aa_jax.rl.digits_start` for the
others): a reward model learns from pairs of that model's answers, labelled by the oracle or by the
annotators; policies are trained against it by several algorithms over the same learning rates. The
rate is chosen on validation prompts twice, by the oracle and by the reward model, which is all a
real run has: the second choice shows what that costs. Test prompts are answered once and graded by
the oracle.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from aa_jax import hosts, models, recipes
from aa_jax.config.binding import bind
from aa_jax.data import sources, templates
from aa_jax.data.example import Example
from aa_jax.errors import ConfigError, DataError
from aa_jax.llf import digits_run as llf
from aa_jax.llf import digits_world as world
from aa_jax.llf.lab import Lab, Lengths
from aa_jax.llf.respond import read_lines
from aa_jax.llf.stages import Stage, run_stages, summary, write_json
from aa_jax.models import adapt, heads
from aa_jax.rewards.base import Reward, evaluate
from aa_jax.rewards.build import make_reward
from aa_jax.rewards.learned import RewardModel
from aa_jax.rewards.oracle import Oracle
from aa_jax.rl import digits_start
from aa_jax.rl.algorithms import find_algorithm
from aa_jax.rl.digits_subtasks import subtask_of
from aa_jax.rl.train import train
from aa_jax.runs import save
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
    subtask: str = "TI2T",
    labels: str = "oracle",
    cost: Mapping[str, Any] | None = None,
    lora: Mapping[str, Any] | None = None,
    prompts: int = 3000,
    validation_prompts: int = 256,
    test_prompts: int = 1024,
    seed: int = 0,
    max_digits: int = 3,
    min_digits: int = 1,
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
      start: keyword arguments of `aa_jax.llf.digits_run.run` (TI2T) or of
        `aa_jax.rl.digits_start.stages` (the others) for those stages.
      algorithms: arm -> its own keyword arguments of `aa_jax.rl.train.train`, with `algorithm` if
        the arm is not named like one; a `rollout` among them adds to the common one; `reward` is
        "learned" (the reward model), "oracle" (the truth itself, as a verifiable reward), or a
        section as `aa_jax.rewards.build.make_reward` reads it.
      lrs: learning rates, the same for every algorithm.
      rollout: keyword arguments of `Plan`, common to all.
      reward: keyword arguments of `recipes.train` for the reward model.
      subtask: a key of `aa_jax.small_models.SHOWN`, which decides the family.
      labels: who labels its pairs, "oracle" or, of TI2T, "annotators".
      cost: a section as `make_reward` reads it: what algorithms with a cost keep below their
        limit. Every row of the result then has its mean.
      lora: keyword arguments of `aa_jax.models.adapt.attach`: policies and critics train adapters
        on the initial model. `model/` of a cell has them merged in, `adapter/` holds them.
      prompts: to train on; not those of the reward model's pairs.
      validation_prompts: on which the learning rates are chosen.
      test_prompts: held out: images of test digits, or sequences of digits where no image is shown.
      seed: of everything.
      max_digits: most digits shown or drawn.
      min_digits: fewest; must be 1 for TI2T, whose initial model is another pipeline's.
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
    hosts.only_one("the digits experiment")
    _check(subtask, labels, algorithms, cost, min_digits)
    workdir = Path(workdir)
    lab = Lab(
        workdir=workdir, mesh=make_mesh(**(mesh or {})), seed=seed,
        lengths=Lengths(**llf.default_lengths(max_digits)), **(sampling or {}),
    )  # fmt: skip
    tokenizer = str(workdir / digits_start.TOKENIZER)
    asked = subtask_of(subtask, lab, max_digits, tokenizer, min_digits)
    llava = subtask == "TI2T"
    begin = START if llava else digits_start.STAGES
    base = str(workdir / digits_start.BASE)
    shown = int(start.get("preference_prompts", 3200))
    collected = asked.records("train", shown)

    def reward_stage(folder: Path) -> dict:
        asked.fit(base)
        pairs = labelled_pairs(workdir, asked, collected, labels)
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
        asked.fit(base)
        return RewardModel(str(workdir / "reward/model"), mesh=lab.mesh)

    def priced() -> Reward | None:
        return cost and make_reward({"kind": "cost", **cost}, mesh=lab.mesh, path="config.cost")

    def rl_stage(folder: Path) -> dict:
        cells = []
        graded = asked.records("validation", validation_prompts)
        learned = judge()
        for arm, own in algorithms.items():
            for lr in lrs:
                cell = folder / f"{arm}_lr{lr:g}"
                if not (cell / "cell.json").exists():
                    write_json(cell / "cell.json", cell_of(cell, arm, dict(own), lr, learned))
                params = models.load(str(cell / "model"), dtype=lab.dtype)[1]
                answers = asked.answer(cell / "validation.jsonl", graded, params=params, base=base)
                figures = {
                    "reward": evaluate(learned, asked.requests(graded, answers)).values.mean(),
                    "oracle": np.mean(asked.scores(graded, answers)["mean"]),
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
        algorithm = own.pop("algorithm", arm)
        payer: Any = own.pop("reward", "learned")
        if isinstance(payer, str):
            payer = {"learned": learned, "oracle": Oracle()}[payer]
        else:
            payer = make_reward(payer, mesh=lab.mesh, path=f"config.algorithms.{arm}.reward")
        if find_algorithm(algorithm).costs:
            own["cost"] = priced()
        if lora is not None:
            adapters = {"seed": lab.stream(stage_name), **lora}
            model, params = adapt.attach(model, params, shardings=lab.places, **adapters)
        final, figures = train(
            algorithm, model=model, params=params, processor=processor,
            prompts=asked.asked(asked.records("train", prompts, shown)), reward=payer,
            workdir=workdir, mesh=lab.mesh, frozen=frozen, seed=lab.stream(stage_name),
            stage=stage_name, rollout={**rollout, **own.pop("rollout", {})},
            sampling=asked.sampling(), optim={**(optim or {}), "lr": lr}, **own,
        )  # fmt: skip
        save(cell, model, final, base)
        last = read_metrics(workdir, stage=f"{stage_name}.rollout")[-1]
        return {
            "arm": arm, "lr": lr, "updates": figures["updates"], "kl": last.get("kl"),
            "seconds": figures["seconds"],
        }  # fmt: skip

    def evaluate_stage(folder: Path) -> dict:
        chosen = summary(workdir, "rl")["chosen"]
        test = asked.records("test", test_prompts)
        learned, dear, result, tables = judge(), priced(), {}, {}
        named = {"initial": base} | {
            arm if by == "oracle" else f"{arm}_by_reward": str(workdir / f"rl/{arm}_lr{lr:g}/model")
            for by in (("oracle", "reward") if len(lrs) > 1 else ("oracle",))
            for arm, lr in chosen[by].items()
        }
        for name, model in named.items():
            for greedy in (False, True):
                row = f"{name}_greedy" if greedy else name
                answers = asked.answer(
                    folder / f"{row}.jsonl", test, params=lab.load(model)[1], base=base,
                    greedy=greedy,
                )  # fmt: skip
                requests = asked.requests(test, answers)
                tables[row] = asked.scores(test, answers)
                if dear is not None:
                    tables[row]["cost"] = evaluate(dear, requests).values.astype(float).tolist()
                write_json(folder / f"{row}_scores.json", tables[row])
                against = tables["initial_greedy" if greedy else "initial"]
                result[row] = {k: list(v) for k, v in world.summarise(tables[row], against).items()}
                result[row]["reward"] = float(evaluate(learned, requests).values.mean())
        return result

    if stage is None or stage in begin:
        if llava:
            for name in begin:
                bind(llf.run, start, path="config.start", workdir=workdir, seed=seed,
                     max_digits=max_digits, stage=name)()  # fmt: skip
        else:
            first = bind(digits_start.stages, start, path="config.start", workdir=workdir,
                         asked=asked)  # fmt: skip
            run_stages(workdir, first(), only=stage)
        if stage in begin:
            return {stage: summary(workdir, stage)}
    stages = [
        Stage(
            "reward", f"reward model: pairs labelled by the {labels}", reward_stage, ("collect",)
        ),
        Stage("rl", "policies against the reward model", rl_stage, ("reward",)),
        Stage("evaluate_rl", "held-out prompts, judged by the oracle", evaluate_stage, ("rl",)),
    ]
    return run_stages(workdir, stages, only=stage)


def labelled_pairs(workdir: Path, asked: Any, records: Sequence, labels: str) -> list[Example]:
    """Two answers of the initial model per prompt, (better, worse); ties are left out."""
    if labels == "annotators":
        rows = sources.open_source(str(workdir / "collect/preferences.parquet"))
        return [templates.TEMPLATES["AA_TI2T"].preference(row) for row in rows]
    first, second = (read_lines(workdir / f"collect/response_{k}.jsonl") for k in (1, 2))
    return asked.pairs(records, first, second)


def _check(
    subtask: str, labels: str, algorithms: Mapping[str, Mapping], cost: Any, min_digits: int
) -> None:
    if subtask == "TI2T" and min_digits != 1:
        raise ConfigError(
            f"min_digits is {min_digits}; of TI2T it must be 1: its initial model and the answers "
            "for the reward model come from the pipeline of language feedback, which shows all."
        )
    known = LABELS if subtask == "TI2T" else LABELS[:1]
    if labels not in known:
        raise ConfigError(
            f"labels is {labels!r}; of {subtask} it must be one of {', '.join(known)}."
        )
    for arm, own in algorithms.items():
        payer = own.get("reward", "learned")
        if isinstance(payer, str) and payer not in ("learned", "oracle"):
            raise ConfigError(
                f"algorithms.{arm}.reward is {payer!r}; it must be learned, oracle, or a section "
                "that describes a reward."
            )
        if find_algorithm(own.get("algorithm", arm)).costs and not cost:
            raise ConfigError(
                f"algorithms.{arm} keeps a cost below a limit, but the run has none: give the "
                "section cost, e.g. {'kind': 'falsehood'}."
            )
