"""Reinforcement learning on prompts and a checkpoint of your own, against a reward model."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from aa_jax import models, platforms, report
from aa_jax.data.processor import Processor
from aa_jax.errors import ConfigError
from aa_jax.models import adapt, heads
from aa_jax.rewards.base import close
from aa_jax.rewards.build import make_reward
from aa_jax.rl.algorithms import find_algorithm
from aa_jax.rl.train import train
from aa_jax.runs import load_dataset, save
from aa_jax.sharding import make_mesh, shardings
from aa_jax.training.metrics import read_metrics, series


def run(
    workdir: str | Path,
    *,
    algorithm: str,
    model: Mapping[str, Any],
    prompts: Mapping[str, Any],
    reward: Mapping[str, Any],
    rollout: Mapping[str, int],
    sampling: Mapping[str, Any],
    optim: Mapping[str, Any],
    critic: Mapping[str, Any] | None = None,
    kl: Mapping[str, Any] | None = None,
    objective: Mapping[str, Any] | None = None,
    estimator: Mapping[str, Any] | None = None,
    cost: Mapping[str, Any] | None = None,
    limit: Mapping[str, Any] | None = None,
    ptx: Mapping[str, Any] | None = None,
    ptx_coef: int | float = 0.0,
    alarms: Mapping[str, Any] | None = None,
    reference: str = "reference",
    allowed_functions: Sequence[str] = (),
    frozen: Sequence[str] = (),
    accumulation: int = 1,
    offload: bool = False,
    checkpoint_every: int | None = None,
    lora: Mapping[str, Any] | None = None,
    mesh: Mapping[str, Any] | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Trains a policy and writes `workdir/model` and `workdir/report.html`.

    With low-rank adapters `workdir/model` has them merged in, and `workdir/adapter` is a PEFT
    folder with them alone.

    Args:
      workdir: run directory; the same command again continues.
      algorithm: a key of `aa_jax.rl.algorithms.ALGORITHMS`.
      model: `path` of the policy's Hugging Face folder, and options of `models.load`.
      prompts: keyword arguments of `runs.load_dataset`.
      reward: see `aa_jax.rewards.build.make_reward`; with `path` alone it is a score model (as
        `launch/train.py` writes it with the recipe "reward"), whose tokenizer may be another one.
      rollout: keyword arguments of `aa_jax.rl.rollouts.Plan`.
      sampling: `max_new_tokens`, `batch_rows`, `temperature`, `top_p`, `top_k`.
      optim: keyword arguments of `make_optimizer`; `lr` is required.
      critic: for algorithms that have one: `path` of the score model it starts from (null: the
        policy's backbone and a new head) and `lr_scale`, its learning rate over the policy's.
      kl: `coef`, `target`, `gain`, see `aa_jax.rl.algorithms.Controller`.
      objective: options of the loss.
      estimator: options of the advantage estimator.
      cost: for `ppo_lagrangian`: a section as `reward` (kind "cost" if left out) that says how
        harmful a response is.
      limit: `threshold`, `initial`, `lr`, `maximum`, `window`, `delay`, see
        `aa_jax.rl.algorithms.CostLimit`.
      ptx: keyword arguments of `runs.load_dataset` for supervised data that is trained on beside.
      ptx_coef: weight of its likelihood.
      alarms: keyword arguments of `aa_jax.rl.alarms.Alarms`; default: its defaults.
      reference: the column (among those the template keeps) that holds the truth a reward judges
        by, e.g. "answer".
      allowed_functions: Python functions the reward may import, "package.module:name".
      frozen: path globs of parameters that do not train, in policy and critic.
      accumulation: micro-batches an update is computed in.
      offload: keep the optimizer state in the host's memory.
      checkpoint_every: updates between checkpoints.
      lora: keyword arguments of `aa_jax.models.adapt.attach`, for policy and critic; a critic
        without a path of its own shares the policy's base.
      mesh: sizes for `make_mesh`; default: all devices over data.
      seed: of prompts, samples and minibatches.

    Returns:
      Figures of the run.

    Raises:
      ConfigError: a critic for an algorithm without one.
    """
    workdir = Path(workdir)
    kind = find_algorithm(algorithm)
    chosen = dict(critic or {})
    if chosen and not kind.critic:
        raise ConfigError(f"{algorithm} has no critic: leave the critic section out.")
    platforms.current()  # says in the log what it decides
    devices = make_mesh(**(mesh or {}))
    options = dict(model)
    path = options.pop("path")

    def place(m: models.Model) -> Any:
        return shardings(m.axes(), m.abstract(), devices)

    built, params = models.load(path, shardings=place, **options)
    processor = Processor.from_pretrained(path)
    start = None
    if chosen.get("path"):
        start = heads.load(chosen["path"], shardings=place, **options)
    if lora is not None:
        adapters = {"seed": seed, **lora}
        built, params = adapt.attach(built, params, shardings=place, **adapters)
        if start is not None:
            backbone, values = start
            backbone, inner = adapt.attach(
                backbone, values["model"], shardings=place, **{**adapters, "path": None}
            )
            start = backbone, {**values, "model": inner}
    judge = make_reward(reward, mesh=devices, allowed=allowed_functions)
    price = None
    if cost:
        section = cost if "terms" in cost else {"kind": "cost", **cost}
        price = make_reward(section, mesh=devices, allowed=allowed_functions, path="config.cost")
    try:
        final, figures = train(
            algorithm, model=built, params=params, processor=processor,
            prompts=load_dataset("prompt", processor, **prompts), reward=judge,
            workdir=workdir, mesh=devices, rollout=rollout, sampling=sampling, optim=optim,
            critic=start, critic_lr_scale=chosen.get("lr_scale", 1.0), kl=kl, objective=objective,
            cost=price, limit=limit, alarms=alarms or {}, ptx_coef=ptx_coef,
            ptx=load_dataset("supervised", processor, **ptx) if ptx else None,
            estimator=estimator, reference_key=reference, frozen=frozen,
            accumulation=accumulation, offload=offload, seed=seed,
            checkpoint_every=checkpoint_every,
        )  # fmt: skip
    finally:
        close(judge)
        close(price)
    save(workdir, built, final, path)
    write_report(workdir, f"{algorithm}: {Path(path).name}", figures)
    return figures


def write_report(workdir: Path, title: str, figures: Mapping[str, Any]) -> Path:
    """report.html with the curves of the rollouts and of the updates."""
    charts = []
    hidden = {"stage", "step", "time", "nonfinite", "step_seconds", "data_seconds",
              "compute_seconds", "checkpoint_seconds", "skipped", "loss_gap"}  # fmt: skip
    for stage, per in (("rl.rollout", "iteration"), ("rl", "update")):
        rows = read_metrics(workdir, stage=stage)
        for name in sorted({name for line in rows for name in line} - hidden):
            line = series(rows, name)
            if len(line[1]):
                charts.append(report.Curves(f"{name} per {per}", {name: line}))
    return report.write_report(
        workdir, title,
        [report.KeyValues("This run", dict(figures)), report.Grid("Curves", charts)],
        wall_seconds=figures["seconds"],
    )  # fmt: skip
