"""Rule-based reinforcement learning on arithmetic, from nothing: SFT on slips, then a policy.

The reward is a rule (the exact answer, and the form), so it can be earned only by being right. The
start imitates demonstrators who forget carries; held-out problems are answered before and after.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from aa_jax import models, recipes
from aa_jax.data import arithmetic
from aa_jax.data.collate import plan_shapes
from aa_jax.data.encoded import EncodedExamples
from aa_jax.data.processor import Processor
from aa_jax.errors import DataError
from aa_jax.eval.statistics import across_seeds, bootstrap_mean
from aa_jax.rewards.base import Request, close, evaluate
from aa_jax.rewards.build import make_reward
from aa_jax.rewards.text import ExactMatch
from aa_jax.rl.actor import Actor
from aa_jax.rl.dataset_run import write_report
from aa_jax.rl.train import train
from aa_jax.sharding import make_mesh

RESULT = "arithmetic.json"


def run(
    workdir: str | Path,
    *,
    algorithm: str,
    sft: Mapping[str, Any],
    rollout: Mapping[str, Any],
    sampling: Mapping[str, Any],
    optim: Mapping[str, Any],
    reward: Mapping[str, Any],
    model: Mapping[str, Any] | None = None,
    objective: Mapping[str, Any] | None = None,
    kl: Mapping[str, Any] | None = None,
    digits: int = 2,
    slip: float = 0.5,
    demonstrations: int = 4000,
    prompts: int = 4000,
    test_problems: int = 512,
    seed: int = 0,
    mesh: Mapping[str, int] | None = None,
) -> dict[str, Any]:
    """Runs (or continues) the experiment and writes `arithmetic.json`, `model` and `report.html`.

    Args:
      workdir: run directory.
      algorithm: a key of `aa_jax.rl.algorithms.ALGORITHMS`.
      sft: keyword arguments of `recipes.train` for the start.
      rollout: keyword arguments of `aa_jax.rl.rollouts.Plan`.
      sampling: `max_new_tokens` and options of `Actor`.
      optim: keyword arguments of `make_optimizer`.
      reward: see `aa_jax.rewards.build.make_reward`.
      model: keyword arguments of `arithmetic.model_config`.
      objective: options of the loss.
      kl: see `aa_jax.rl.algorithms.Controller`.
      digits: of each operand.
      slip: probability that a demonstrator forgets a carry or borrow.
      demonstrations: solutions the start is trained on.
      prompts: training problems of the policy.
      test_problems: held out.
      seed: of everything.
      mesh: sizes for `make_mesh`.

    Returns:
      Exact match on held-out problems before and after, sampled and greedy, with intervals.
    """
    workdir, devices = Path(workdir), make_mesh(**(mesh or {}))
    processor = Processor.from_pretrained(arithmetic.write_processor(workdir / "processor"))
    built = models.build(arithmetic.model_config(**(model or {})))
    rng = np.random.default_rng([seed, 7])
    shown = arithmetic.problems(demonstrations, seed, "train", digits=digits)
    examples = [problem.example(problem.solution(rng, slip)) for problem in shown]
    start, first = recipes.train(
        "sft", model=built, params=built.init(jax.random.key(seed)), processor=processor,
        examples=examples, workdir=workdir, stage="sft", mesh=devices, seed=seed, **sft,
    )  # fmt: skip
    asked = arithmetic.problems(prompts, seed + 1, "train", digits=digits)
    judge = make_reward(reward, mesh=devices)
    try:
        final, then = train(
            algorithm, model=built, params=start, processor=processor,
            prompts=[problem.example() for problem in asked], reward=judge, workdir=workdir,
            mesh=devices, rollout=rollout, sampling=sampling, optim=optim, objective=objective,
            kl=kl, seed=seed, alarms={},
        )  # fmt: skip
    finally:
        close(judge)
    models.save(workdir / "model", built, final, extra_files_from=workdir / "processor",
                overwrite=True)  # fmt: skip
    held = arithmetic.problems(test_problems, seed, "test", digits=digits)
    right = {}
    for name, params in (("start", start), (algorithm, final)):
        for greedy in (False, True):
            row = f"{name}, greedy" if greedy else name
            right[row] = _right(built, params, processor, devices, held, sampling, greedy, seed)
    seconds = {"sft": first["seconds"], algorithm: then["seconds"]}
    lines = {"algorithm": algorithm, "right": right, "seconds": seconds}
    (workdir / RESULT).write_text(json.dumps(lines) + "\n")
    figures = {name: bootstrap_mean(np.asarray(values, float)).format(1, 100)
               for name, values in right.items()}  # fmt: skip
    shown_figures = {f"exact match %, {name}": text for name, text in figures.items()}
    write_report(workdir, f"arithmetic: {algorithm}",
                 {**shown_figures, "seconds": sum(seconds.values())})  # fmt: skip
    return figures


def _right(
    built: models.Model,
    params: Mapping[str, Any],
    processor: Processor,
    mesh: jax.sharding.Mesh,
    held: Sequence[arithmetic.Problem],
    sampling: Mapping[str, Any],
    greedy: bool,
    seed: int,
) -> list[float]:
    """1 for every problem answered exactly."""
    data = EncodedExamples([problem.example() for problem in held], processor)
    actor = Actor(built, processor, mesh, prompt=plan_shapes(data.sizes, "prompt"), **sampling)
    seeds = np.random.default_rng([seed, 9]).integers(0, 2**32, (len(held), 1), np.uint32)
    found = actor.respond(params, list(data), seeds, greedy=greedy)
    requests = [
        Request(problem.question, actor.text(samples[0]), problem.answer)
        for problem, samples in zip(held, found, strict=True)
    ]
    return evaluate(ExactMatch(where="answer"), requests).values.astype(float).tolist()


def table(folders: Sequence[Path]) -> str:
    """Markdown: exact match on held-out problems with 95 % intervals over seeds and problems.

    Args:
      folders: run directories, one per seed, of the same config.

    Raises:
      DataError: a run that is not finished.
    """
    found = []
    for folder in folders:
        if not (folder / RESULT).is_file():
            raise DataError(
                f"{folder} holds no finished run on arithmetic; run the same command with "
                f"--workdir {folder} again to finish it."
            )
        found.append(json.loads((folder / RESULT).read_text()))
    lines = ["| model | exact match %, held-out problems | seeds |", "|---|---|---|"]
    for row in found[0]["right"]:
        every = [np.asarray(one["right"][row], float) for one in found]
        each = " / ".join(f"{100 * values.mean():.1f}" for values in every)
        lines.append(f"| {row} | {across_seeds(every).format(1, 100)} | {each} |")
    spent = [sum(one["seconds"].values()) for one in found]
    lines.append(f"\nSeconds per run: {min(spent):.0f} to {max(spent):.0f}.")
    return "\n".join(lines)
