"""Trains a policy by reinforcement learning: rollouts into the one training loop."""

import contextlib
import functools
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from aa_jax.data.collate import Batch, collate, plan_shapes
from aa_jax.data.encoded import EncodedExamples
from aa_jax.data.example import Example
from aa_jax.data.processor import Processor
from aa_jax.data.tokens import Limits
from aa_jax.errors import ConfigError
from aa_jax.models import Model, heads
from aa_jax.rewards.base import Reward
from aa_jax.rl import objectives
from aa_jax.rl.actor import Actor
from aa_jax.rl.alarms import Alarms
from aa_jax.rl.algorithms import Algorithm, Controller, CostLimit, find_algorithm
from aa_jax.rl.estimators import Experience, find_estimator
from aa_jax.rl.rollouts import Plan, Rollouts
from aa_jax.sharding import shardings
from aa_jax.training.loop import fit
from aa_jax.training.metrics import MetricWriter
from aa_jax.training.optim import make_optimizer
from aa_jax.training.state import init_state
from aa_jax.training.step import make_step

log = logging.getLogger(__name__)


def train(
    algorithm: str,
    *,
    model: Model,
    params: Mapping[str, Any],
    processor: Processor,
    prompts: Any,
    reward: Reward,
    workdir: str | Path,
    mesh: jax.sharding.Mesh,
    rollout: Mapping[str, Any],
    sampling: Mapping[str, Any],
    optim: Mapping[str, Any],
    critic: tuple[Model, Mapping[str, Any]] | None = None,
    critic_lr_scale: float = 1.0,
    cost: Reward | None = None,
    limit: Mapping[str, Any] | None = None,
    ptx: Any = None,
    ptx_coef: int | float = 0.0,
    alarms: Mapping[str, Any] | None = None,
    reference: Mapping[str, Any] | None = None,
    kl: Mapping[str, Any] | None = None,
    objective: Mapping[str, Any] | None = None,
    estimator: Mapping[str, Any] | None = None,
    reference_key: str = "reference",
    frozen: Sequence[str] = (),
    accumulation: int = 1,
    offload: bool = False,
    seed: int = 0,
    stage: str = "rl",
    limits: Mapping[str, Any] | None = None,
    checkpoint_every: int | None = None,
    evaluate: Callable[[Mapping[str, Any], int], Mapping[str, float]] | None = None,
    eval_every: int | None = None,
    config: Mapping[str, Any] | None = None,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Trains a policy; called again with the same `workdir` it continues, bit for bit.

    Args:
      algorithm: a key of `aa_jax.rl.algorithms.ALGORITHMS`.
      model: the policy's architecture.
      params: its initial parameters; also the reference, unless one is given. Of a model with
        adapters (`aa_jax.models.adapt`) these alone train, and policy, critic and reference share
        the base's arrays.
      processor: the policy's.
      prompts: prompt-only Examples, or a `Dataset` of the task "prompt"; by random access.
      reward: see `aa_jax.rewards`: requests in, one value each out.
      workdir: run directory.
      mesh: device mesh.
      rollout: keyword arguments of `Plan`.
      sampling: `max_new_tokens`, and options of `Actor` (batch_rows, temperature, top_p, top_k).
      optim: keyword arguments of `make_optimizer`; `lr` is required.
      critic: model and parameters of a score model the critic starts from; default for algorithms
        that have one: the policy's backbone with a new head.
      critic_lr_scale: the critic's learning rate as a multiple of the policy's.
      cost: how harmful a response is, for algorithms that keep it below a limit.
      limit: keyword arguments of `CostLimit` (threshold, initial, lr, maximum, window, delay).
      ptx: supervised Examples, or a `Dataset` of the task "supervised", whose likelihood is added
        to every update: as many rows as an update has prompts.
      ptx_coef: its weight (16 in InstructGPT and align-anything).
      alarms: keyword arguments of `aa_jax.rl.alarms.Alarms`; {} for the defaults, None for none.
      reference: parameters of the reference.
      kl: keyword arguments of `Controller` (coef, target, gain) for algorithms that pay the KL in
        the reward; others take ``objective={"kl_coef": ...}``.
      objective: options of the loss (clip_low, kl_coef, entropy_coef, value_clip, ...).
      estimator: options of the advantage estimator (gamma, lam, whiten, scale, ...).
      reference_key: where a prompt's meta holds the truth a reward judges by.
      frozen: path globs of parameters that do not train, in policy and critic.
      accumulation: micro-batches an update is computed in.
      offload: keep the optimizer state in the host's memory and fetch it for every update.
      seed: of prompts, samples and minibatches.
      stage: name of this training in the run directory.
      limits: keyword arguments of `Limits`.
      checkpoint_every: updates between checkpoints.
      evaluate: `(policy parameters, step) -> figures`, logged as "eval/...".
      eval_every: updates between evaluations; they also run at the end.
      config: of the run, kept in the checkpoint.

    Returns:
      The policy's final parameters, and `prompts`, `dropped`, `updates`, `seconds`.

    Raises:
      ConfigError: unknown algorithm or option, or too few samples per prompt.
      DataError: no usable prompt.
    """
    started = time.perf_counter()
    row = find_algorithm(algorithm)
    plan = Plan(**rollout)
    _check(row, algorithm, plan, kl, objective, cost, limit)
    data = prompts
    if not hasattr(prompts, "sizes"):
        data = EncodedExamples(prompts, processor, Limits(**(limits or {})))
    sampling = dict(sampling)
    new = sampling.pop("max_new_tokens")
    _check_rope(model, max(size.prompt for size in data.sizes) + new)
    actor = Actor(
        model, processor, mesh, prompt=plan_shapes(data.sizes, "prompt"), max_new_tokens=new,
        **sampling,
    )  # fmt: skip
    options = {"temperature": actor.temperature, "loss": row.loss}
    if row.loss == "dr_grpo":
        options["budget"] = float(new)
    objectives.check_options(objective or {}, options)
    options |= objective or {}
    axes: Any = model.axes()
    start: Any = params
    if row.critic:
        backbone, critic_params = critic or (model, _new_critic(model, params, seed))
        start = {"policy": params, "critic": critic_params}
        axes = {"policy": axes, "critic": heads.axes(backbone)}
        if row.costs:  # of the same start: first values differ by what is learned, not by luck
            start["cost_critic"], axes["cost_critic"] = critic_params, axes["critic"]
        sides = {f"{side}/model": backbone for side in start if side != "policy"}
        sides = {"policy": model, **sides}
        frozen = [f"{at}/{glob}" for at, m in sides.items() for glob in (*m.frozen, *frozen)]
        loss = objectives.actor_critic(model, backbone, costs=row.costs, **options)
    else:
        frozen = (*model.frozen, *frozen)
        loss = objectives.policy(model, **options)
    select = (lambda p: p["policy"]) if row.critic else (lambda p: p)
    if ptx is not None and ptx_coef:
        loss = objectives.with_sft(loss, model, ptx_coef, select)
        ptx = _supervised(ptx, processor, Limits(**(limits or {})), seed)
    priced = (
        row.kl == "reward"
        or row.loss == "online_dpo"
        or bool(options.get("kl_coef", row.loss == "grpo"))
    )
    estimate = find_estimator(row.estimator)
    estimator_options = {**row.estimator_options, **(estimator or {})}

    def estimated(experience: Experience) -> Mapping[str, np.ndarray]:
        return estimate(experience, **estimator_options)

    scales = None
    if row.critic and critic_lr_scale != 1:
        scales = {f"{side}/*": critic_lr_scale for side in start if side != "policy"}
    tx, schedule = make_optimizer(total_steps=plan.updates, lr_scales=scales, **optim)
    rollouts = Rollouts(
        prompts=data, sources=_Examples(data), actor=actor, reward=reward, estimator=estimated,
        plan=plan, seed=seed, reference_key=reference_key,
        policy=select, critic=(lambda p: p["critic"]) if row.critic else None,
        cost=cost, cost_critic=(lambda p: p["cost_critic"]) if row.costs else None,
        limit=CostLimit(**(limit or {})) if row.costs else None,
        ptx=ptx if ptx_coef else None,
        alarms=None if alarms is None else Alarms(**alarms),
        reference=(params if reference is None else reference) if priced else None,
        controller=Controller(**(kl or {})) if row.kl == "reward" else None,
        share_rows=row.loss not in objectives.OF_GROUPS,
        writer=functools.partial(MetricWriter, workdir, f"{stage}.rollout"),
    )  # fmt: skip
    places = shardings(axes, jax.eval_shape(lambda: start), mesh)

    def evaluated(state: Mapping[str, Any], step: int) -> Mapping[str, float]:
        return evaluate(rollouts.policy_of(state["params"]), step)

    with contextlib.closing(rollouts):
        state = fit(
            step=make_step(
                loss, tx, mesh=mesh, schedule=schedule, frozen=frozen, accumulation=accumulation
            ),
            state=init_state(
                start, tx, mesh=mesh, shardings=places, frozen=frozen, seed=seed, offload=offload
            ),
            batches=rollouts, total_steps=plan.updates, workdir=workdir, stage=stage,
            checkpoint_every=checkpoint_every, log_every=plan.epochs * plan.minibatches,
            evaluate=evaluated if evaluate else None, eval_every=eval_every, config=config,
            save_frozen=not model.frozen,
        )  # fmt: skip
    figures = {
        "prompts": len(data), "dropped": dict(data.report.dropped), "updates": int(state["step"]),
        "seconds": time.perf_counter() - started,
    }  # fmt: skip
    return rollouts.policy_of(state["params"]), figures


def _supervised(
    data: Any, processor: Processor, limits: Limits, seed: int
) -> Callable[[int, int], Batch]:
    """``(update, rows) -> batch``: every example once per pass, in a new order; no state."""
    if not hasattr(data, "sizes"):
        data = EncodedExamples(data, processor, limits)
    shapes = plan_shapes(data.sizes, "supervised")

    def batch(update: int, rows: int) -> Batch:
        chosen = []
        for i in range(update * rows, (update + 1) * rows):
            epoch, at = divmod(i, len(data))
            chosen.append(int(np.random.default_rng([seed, 4, epoch]).permutation(len(data))[at]))
        items = [data[i] for i in chosen]
        return collate(items, shapes, "supervised", batch_rows=rows, pad_id=processor.pad_id)

    return batch


def _check(
    row: Algorithm, name: str, plan: Plan, kl: Any, objective: Any, cost: Any, limit: Any
) -> None:
    if row.costs != (cost is not None) or (limit and not row.costs):
        raise ConfigError(
            f"{name} {'keeps a cost below a limit: give the cost section' if row.costs else 'has'}"
            f"{'' if row.costs else ' no cost: leave the cost and limit sections out'}."
        )
    if plan.samples < row.samples:
        raise ConfigError(
            f"{name} compares responses to one prompt with each other: rollout.samples is "
            f"{plan.samples}, give at least {row.samples}."
        )
    if kl and row.kl != "reward":
        where = "has no KL: leave the kl section out."
        if row.kl == "loss":
            where = "has the KL in its loss: set objective.kl_coef instead of the kl section."
        raise ConfigError(f"{name} {where}")
    if row.kl == "reward" and (objective or {}).get("kl_coef"):
        raise ConfigError(
            f"{name} pays the KL in the reward: set kl.coef instead of objective.kl_coef."
        )


def _check_rope(model: Model, longest: int) -> None:
    """Refuses responses during which the rotary angles would change."""
    rope = getattr(model.config, "text", model.config).rope
    if rope.context is not None and longest > rope.context:
        raise ConfigError(
            f"The longest prompt with its response has {longest} tokens, and this model's rotary "
            f"angles (rope_type {rope.kind!r}) depend on the length beyond {rope.context}: keys in "
            "the sampler's cache keep the angles of the length they were written at, so its "
            "log-probs would not be the trainer's. Lower sampling.max_new_tokens, or drop longer "
            "prompts with limits.max_prompt_length."
        )


def _new_critic(model: Model, params: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """The policy's backbone with a head of zeros: first values are 0, not noise."""
    head = heads.init_score_head(model, jax.random.key(seed))
    return {"model": dict(params), "score_head": jax.tree.map(np.zeros_like, head)}


class _Examples(Sequence):
    """The prompts behind encoded ones, as the reward wants to see them."""

    def __init__(self, data: Any):
        self._data = data

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, index: int) -> Example:
        return self._data.example(index)
