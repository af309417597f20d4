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
from aa_jax.losses.logps import sequence_logps
from aa_jax.losses.policy import POLICY_LOSSES, value_loss
from aa_jax.losses.preference import check_variant, pair_up, preference_loss
from aa_jax.losses.sft import sft_loss
from aa_jax.models import heads
from aa_jax.models.functional import Batch, Model, Params

Objective = Callable[[Params, Batch], Loss]

# A critic's parameters and what stands before the names of what it reads and reports.
CRITICS = {"critic": "", "cost_critic": "cost_"}


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
      loss: key of `aa_jax.losses.policy.POLICY_LOSSES` or of `OF_GROUPS`.
      temperature: the sampler's; log-probs are those of softmax(logits / temperature).
      entropy: also report the mean entropy (a bonus, ``entropy_coef``, needs and implies it).
      chunk: tokens per block of logits, see `aa_jax.kernels.linear_logprob`.
      **options: of the loss, e.g. clip_low, kl_coef.

    Raises:
      ConfigError: unknown loss.
    """
    if loss in OF_GROUPS:
        return OF_GROUPS[loss](model, temperature=temperature, chunk=chunk, **options)
    if loss not in POLICY_LOSSES:
        known = ", ".join((*POLICY_LOSSES, *OF_GROUPS))
        raise ConfigError(f"There is no policy loss {loss!r}; there are {known}.")
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


def raft(model: Model, *, temperature: float, chunk: int | None, z_loss: float = 0.0) -> Objective:
    """Best-of-n fine-tuning (Dong et al. 2023, arXiv:2304.06767): SFT on the best of each group."""

    def objective(params: Params, batch: Batch) -> Loss:
        tokens = objectives.token_logps(model, params, batch, temperature=temperature, chunk=chunk)
        weights = jnp.asarray(batch["loss_mask"]) * jnp.asarray(batch["advantages"])
        chosen = jnp.max(weights, axis=-1) * jnp.asarray(batch["sequence_mask"])
        return sft_loss(tokens.logps, weights, chosen, lse=tokens.lse, z_loss=z_loss)

    return objective


def online_dpo(
    model: Model, *, temperature: float, chunk: int | None, variant: str = "sigmoid", **options: Any
) -> Objective:
    """DPO on the best and the worst response of each group (Guo et al. 2024, arXiv:2402.04792).

    Args:
      model: the policy's.
      temperature: the sampler's.
      chunk: see `policy`.
      variant: key of `aa_jax.losses.PREFERENCE_LOSSES`.
      **options: of `aa_jax.losses.preference_loss`, e.g. beta.
    """
    given = {name: value for name, value in options.items() if name not in ("optimism", "sft_coef")}
    check_variant(variant, **given)

    def objective(params: Params, batch: Batch) -> Loss:
        tokens = objectives.token_logps(model, params, batch, temperature=temperature, chunk=chunk)
        logps, lengths = sequence_logps(tokens.logps, tokens.mask)
        reference, _ = sequence_logps(jnp.asarray(batch["ref_token_logps"]), tokens.mask)
        # Every token of a response holds its sign; masked ones hold 0.
        signs = jnp.asarray(batch["advantages"])
        best, worst = jnp.max(signs, axis=-1) > 0, jnp.min(signs, axis=-1) < 0

        def pick(values: Any) -> Any:
            """[B, S] -> [B, 2]: the best one's and the worst one's."""
            return jnp.stack([jnp.sum(jnp.where(one, values, 0), -1) for one in (best, worst)], -1)

        both = jnp.any(best, axis=-1) & jnp.any(worst, axis=-1)
        mask = jnp.broadcast_to(both[:, None].astype(jnp.float32), (*both.shape, 2))
        return preference_loss(
            pair_up(pick(logps), pick(reference), pick(lengths), mask), variant=variant, **options
        )

    return objective


# Losses of whole groups: which of their responses was best.
OF_GROUPS: dict[str, Callable[..., Objective]] = {"online_dpo": online_dpo, "raft": raft}


def with_sft(
    objective: Objective, model: Model, coef: int | float, select: Callable[[Params], Params]
) -> Objective:
    """Adds the likelihood of other data, ``batch["ptx"]`` (InstructGPT's PTX, eq. 2).

    Args:
      objective: of the on-policy part of the batch.
      model: the policy's.
      coef: weight of the likelihood.
      select: takes the policy's parameters out of the trained ones.
    """
    likelihood = objectives.sft(model)

    def mixed(params: Params, batch: Batch) -> Loss:
        loss, metrics = objective(params, {k: v for k, v in batch.items() if k != "ptx"})
        more, found = likelihood(select(params), batch["ptx"])
        metrics = add_term(metrics, found["loss"], coef) | {"ptx_loss": found["nll"]}
        return loss + coef * more, metrics

    return mixed


def add_term(metrics: Any, term: Ratio, weight: float) -> dict[str, Any]:
    """Metrics whose loss has one more term, exact under accumulation."""
    terms = metrics["loss"]
    terms = (terms,) if isinstance(terms, Ratio) else tuple(terms)
    return {**metrics, "loss": (*terms, Ratio(weight * term.total, term.count))}


def actor_critic(
    model: Model,
    critic: Model,
    *,
    costs: bool = False,
    value_clip: float | None = 0.2,
    value_coef: float = 0.1,
    **options: Any,
) -> Objective:
    """PPO: policy and critic in one update; parameters {"policy": ..., "critic": a score model's}.

    Args:
      model: the policy's.
      critic: the critic's backbone.
      costs: there is a second critic of that shape, params["cost_critic"], for the costs.
      value_clip: see `aa_jax.losses.policy.value_loss`.
      value_coef: weight of the critic's loss. The two share no parameters, so with Adam it only
        matters where their gradients are clipped together: the critic's must not drown the
        policy's.
      **options: of `policy`.
    """
    act = policy(model, **options)

    def objective(params: Params, batch: Batch) -> Loss:
        loss, metrics = act(params["policy"], batch)
        mask = _rows(batch["loss_mask"]) * _rows(batch["sequence_mask"])[:, None]
        for name, prefix in CRITICS.items():
            if name == "cost_critic" and not costs:
                continue
            values = heads.values(critic, params[name], batch)
            critic_loss, more = value_loss(
                _rows(values), _rows(batch[f"old_{prefix}values"]),
                _rows(batch[f"{prefix}returns"]), mask, clip=value_clip,
            )  # fmt: skip
            term = more.pop("loss")
            more = {f"{prefix}{key}": value for key, value in more.items()}
            metrics = add_term(metrics, term, value_coef) | more | {f"{prefix}value_loss": term}
            loss = loss + value_coef * critic_loss
        return loss, metrics

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
