"""Objectives of on-policy batches: a policy alone, or a policy and its critic.

Batches come from `aa_jax.rl.rollouts`: responses [B, S, R] with `old_logps`, `advantages`, and as
the algorithm needs them `ref_token_logps`, `returns` and `old_values`.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp

from aa_jax import objectives
from aa_jax.errors import ConfigError
from aa_jax.losses.base import Loss, Ratio
from aa_jax.losses.policy import POLICY_LOSSES, value_loss
from aa_jax.models import heads
from aa_jax.models.functional import Batch, Model, Params

Objective = Callable[[Params, Batch], Loss]


def policy(
    model: Model,
    *,
    loss: str = "ppo",
    temperature: float = 1.0,
    entropy: bool = False,
    chunk: int | None = None,
    **options: Any,
) -> Objective:
    """A policy-gradient objective without a critic.

    Args:
      model: the policy's.
      loss: key of `aa_jax.losses.policy.POLICY_LOSSES`.
      temperature: the sampler's; log-probs are those of softmax(logits / temperature).
      entropy: also report the mean entropy (a bonus, ``entropy_coef``, needs and implies it).
      chunk: tokens per block of logits, see `aa_jax.kernels.linear_logprob`.
      **options: of the loss, e.g. clip_low, kl_coef.

    Raises:
      ConfigError: unknown loss.
    """
    if loss not in POLICY_LOSSES:
        raise ConfigError(
            f"There is no policy loss {loss!r}; there are {', '.join(POLICY_LOSSES)}."
        )
    function = POLICY_LOSSES[loss]
    need_entropy = entropy or bool(options.get("entropy_coef"))

    def objective(params: Params, batch: Batch) -> Loss:
        tokens = objectives.token_logps(
            model, params, batch, temperature=temperature, need_entropy=need_entropy, chunk=chunk
        )
        mask = _rows(batch["loss_mask"]) * _rows(batch["sequence_mask"])[:, None]
        advantages = _rows(batch["advantages"])
        more = dict(options)
        if loss == "rloo":
            advantages = advantages[:, 0]  # one per response: every token holds it
        elif "ref_token_logps" in batch:
            more["ref_logps"] = _rows(batch["ref_token_logps"])
        if need_entropy:
            more["entropy"] = _rows(tokens.entropy)
        return function(_rows(tokens.logps), _rows(batch["old_logps"]), advantages, mask, **more)

    return objective


def actor_critic(
    model: Model,
    critic: Model,
    *,
    value_clip: float | None = 0.2,
    value_coef: float = 0.1,
    **options: Any,
) -> Objective:
    """PPO: policy and critic in one update; parameters {"policy": ..., "critic": a score model's}.

    Args:
      model: the policy's.
      critic: the critic's backbone.
      value_clip: see `aa_jax.losses.policy.value_loss`.
      value_coef: weight of the critic's loss. The two share no parameters, so with Adam it only
        matters where their gradients are clipped together: the critic's must not drown the
        policy's.
      **options: of `policy`.
    """
    act = policy(model, **options)

    def objective(params: Params, batch: Batch) -> Loss:
        loss, metrics = act(params["policy"], batch)
        values = heads.values(critic, params["critic"], batch)
        mask = _rows(batch["loss_mask"]) * _rows(batch["sequence_mask"])[:, None]
        critic_loss, more = value_loss(
            _rows(values), _rows(batch["old_values"]), _rows(batch["returns"]), mask,
            clip=value_clip,
        )  # fmt: skip
        term = more.pop("loss")
        terms = metrics["loss"]
        terms = (terms,) if isinstance(terms, Ratio) else tuple(terms)
        weighted = Ratio(value_coef * term.total, term.count)
        metrics = {**metrics, **more, "value_loss": term, "loss": (*terms, weighted)}
        return loss + value_coef * critic_loss, metrics

    return objective


def _rows(array: Any) -> Any:
    """[B, S, ...] -> [B * S, ...]."""
    array = jnp.asarray(array)
    return array.reshape(-1, *array.shape[2:])


def check_options(options: Mapping[str, Any], taken: Mapping[str, Any]) -> None:
    """Refuses options that the algorithm sets itself.

    Raises:
      ConfigError: naming them.
    """
    if both := sorted(set(options) & set(taken)):
        raise ConfigError(
            f"objective.{', objective.'.join(both)} follows from the algorithm and the sampling "
            "section; leave it out."
        )
