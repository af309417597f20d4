"""Policy-gradient losses: PPO and the critic-free family, each normalised as its paper says.

A policy loss is a function of log-probs [B, T] of B sampled responses, those of the policy that
sampled them, advantages (per token or per response) and the response mask. All share
`policy_loss`; what they differ in is

=============  ==============  ====================  ===============================
loss           ratio of        clipped to            averaged over
=============  ==============  ====================  ===============================
ppo            tokens          1 ± 0.2               tokens of the batch
grpo           tokens          1 ± 0.2               tokens of a response, responses
dr_grpo        tokens          1 ± 0.2               responses (fixed length budget)
dapo           tokens          [0.8, 1.28]           tokens of the batch
gspo           responses       [1 - 3e-4, 1 + 4e-4]  responses
cispo          tokens          weight, not gradient  tokens of the batch
rloo           responses       not                   responses
reinforce_pp   tokens          1 ± 0.2               tokens of a response, responses
=============  ==============  ====================  ===============================
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from aa_jax.errors import ConfigError
from aa_jax.losses.advantages import kl_estimate
from aa_jax.losses.base import Loss, Metrics, Ratio, counted, ratio, total_loss
from aa_jax.losses.stable import bounded_exp

Tokens = Float[Array, "B T"]
Advantages = Float[Array, "B T"] | Float[Array, "B"]

AGGREGATES = ("token", "sequence", "sequence_sum", "budget")
LEVELS = ("token", "sequence")


def aggregate(
    values: Float[Array, "B T"],
    mask: Float[Array, "B T"],
    how: str = "token",
    *,
    budget: int | float | None = None,
) -> Ratio:
    """Sums token losses with the denominator an algorithm states.

    Args:
      values: one per token.
      mask: 0 on tokens that do not count.
      how: "token" (mean over all tokens of the batch), "sequence" (mean over a response's tokens,
        then over responses), "sequence_sum" (sum over tokens, mean over responses) or "budget"
        (that sum divided by a fixed number of tokens).
      budget: the number, e.g. the longest response allowed.

    Raises:
      ConfigError: unknown choice, or "budget" without one.
    """
    if how not in AGGREGATES:
        raise ConfigError(f"There is no aggregate {how!r}; choose one of {[*AGGREGATES]}.")
    mask = mask.astype(jnp.float32)
    if how == "token":
        return ratio(values, mask)
    if how == "budget" and not budget:
        raise ConfigError(
            "aggregate='budget' divides by a fixed number of tokens: give budget=, e.g. the "
            "longest response that is sampled."
        )
    sums, lengths = jnp.sum(counted(values, mask) * mask, -1), jnp.sum(mask, -1)
    if how == "sequence":
        sums = sums / jnp.where(lengths == 0, 1, lengths)
    elif how == "budget":
        sums = sums / budget
    return ratio(sums, (lengths > 0).astype(jnp.float32))


def policy_loss(
    logps: Float[Array, "B T"],
    old_logps: Float[Array, "B T"],
    advantages: Float[Array, "B T"] | Float[Array, "B"],
    mask: Float[Array, "B T"],
    *,
    clip_low: float = 0.2,
    clip_high: float | None = None,
    dual_clip: float | None = None,
    level: str = "token",
    how: str = "token",
    budget: int | float | None = None,
    ref_logps: Float[Array, "B T"] | None = None,
    kl_coef: float = 0.0,
    kl_estimator: str = "k3",
    entropy: Float[Array, "B T"] | None = None,
    entropy_coef: float = 0.0,
) -> Loss:
    r"""Clipped surrogate (Schulman et al. 2017, arXiv:1707.06347, eq. 7), minimised.

    .. math:: -\min\left(\rho A,\; \mathrm{clip}(\rho, 1-\epsilon_l, 1+\epsilon_h) A\right)
      + \beta\,\widehat{KL} - \eta H, \qquad \rho = \pi / \pi_{old}

    and for A < 0 at most −cA (dual clip, Ye et al. 2020, arXiv:1912.09729, eq. 5; TRL's ``delta``).
    align-anything averages over responses where TRL averages over tokens (``how``).

    Args:
      logps: log π of each response token.
      old_logps: log π of the policy that sampled them, over the same full vocabulary.
      advantages: A, per token or one per response; no gradient.
      mask: 0 on padding and on tokens the policy did not choose.
      clip_low: ε_l.
      clip_high: ε_h; None is ε_l. DAPO clips higher ("asymmetric").
      dual_clip: c > 1, or None.
      level: "token", or "sequence": ρ is the geometric mean over the response (GSPO).
      how: denominator, see `aggregate`.
      budget: of `aggregate`.
      ref_logps: of the reference; needed with `kl_coef`.
      kl_coef: β of a KL term in the loss, averaged as the surrogate is.
      kl_estimator: see `aa_jax.losses.advantages.kl_estimate`.
      entropy: H of each token's distribution.
      entropy_coef: η; the bonus is a mean over tokens.

    Returns:
      The loss, and metrics ``loss`` (two terms with an entropy bonus), ``policy_loss`` (without
      entropy), ``clip_fraction``, ``approx_kl`` (k3 of π against π_old), ``ratio``, ``advantages``,
      and where given ``kl`` and ``entropy``.

    Raises:
      ConfigError: an unknown level, or a KL term without a reference.
    """
    mask = mask.astype(jnp.float32)
    logps = counted(logps, mask)
    advantages = _per_token(advantages, mask)
    high = clip_low if clip_high is None else clip_high
    log_ratio = _log_ratio(logps, old_logps, mask, level)
    rho = bounded_exp(log_ratio)
    plain, clipped = rho * advantages, jnp.clip(rho, 1 - clip_low, 1 + high) * advantages
    surrogate = jnp.minimum(plain, clipped)
    if dual_clip is not None:
        floor = jnp.maximum(surrogate, dual_clip * advantages)
        surrogate = jnp.where(advantages < 0, floor, surrogate)
    outside = (rho < 1 - clip_low) & (advantages < 0) | (rho > 1 + high) & (advantages > 0)
    metrics: Metrics = {"clip_fraction": ratio(outside.astype(jnp.float32), mask)}
    return _finish(
        -surrogate, logps, log_ratio, advantages, mask, metrics, how, budget,
        ref_logps, kl_coef, kl_estimator, entropy, entropy_coef,
    )  # fmt: skip


def ppo(
    logps: Tokens, old_logps: Tokens, advantages: Advantages, mask: Tokens, **options: Any
) -> Loss:
    """PPO: `policy_loss` as it is, ε = 0.2, token mean (TRL 1.12, verl)."""
    return policy_loss(logps, old_logps, advantages, mask, **options)


def grpo(
    logps: Tokens,
    old_logps: Tokens,
    advantages: Advantages,
    mask: Tokens,
    *,
    kl_coef: float = 0.04,
    **options: Any,
) -> Loss:
    r"""GRPO (Shao et al. 2024, arXiv:2402.03300, eq. 3).

    .. math:: -\frac1G \sum_i \frac{1}{|o_i|} \sum_t \left[\min(\cdot) - \beta\, k3_t\right]

    with β = 0.04 and `group_advantages`. TRL's default is β = 0 and ``dapo``; align-anything has
    β = 0.01, no clip, and a token mean.
    """
    return policy_loss(
        logps, old_logps, advantages, mask, kl_coef=kl_coef, how="sequence", **options
    )


def dr_grpo(
    logps: Tokens,
    old_logps: Tokens,
    advantages: Advantages,
    mask: Tokens,
    *,
    budget: int | float,
    **options: Any,
) -> Loss:
    r"""Dr. GRPO (Liu et al. 2025, arXiv:2503.20783): no division by a response's length.

    .. math:: -\frac{1}{G\,L} \sum_i \sum_t \min(\cdot)

    with the fixed budget L, and ``group_advantages(scale="none")``. The same as TRL's ``dr_grpo``
    with L = ``max_completion_length``.
    """
    return policy_loss(logps, old_logps, advantages, mask, how="budget", budget=budget, **options)


def dapo(
    logps: Tokens,
    old_logps: Tokens,
    advantages: Advantages,
    mask: Tokens,
    *,
    clip_high: float = 0.28,
    **options: Any,
) -> Loss:
    r"""DAPO (Yu et al. 2025, arXiv:2503.14476, eq. 8): clip higher, every token weighs the same.

    .. math:: -\frac{1}{\sum_i |o_i|} \sum_i \sum_t
      \min(\rho A, \mathrm{clip}(\rho, 0.8, 1.28) A)

    The sum runs over all tokens of the batch, as in TRL's ``dapo`` (there of the whole generation
    batch) and the authors' code; the equation writes one prompt's group.
    """
    return policy_loss(logps, old_logps, advantages, mask, clip_high=clip_high, **options)


def gspo(
    logps: Tokens,
    old_logps: Tokens,
    advantages: Advantages,
    mask: Tokens,
    *,
    clip_low: float = 3e-4,
    clip_high: float = 4e-4,
    **options: Any,
) -> Loss:
    r"""GSPO (Zheng et al. 2025, arXiv:2507.18071, eq. 5-7): one ratio per response.

    .. math:: -\frac1G \sum_i \min(s_i A_i, \mathrm{clip}(s_i) A_i), \qquad
      s_i = \left(\pi(y_i)/\pi_{old}(y_i)\right)^{1/|y_i|}

    TRL: ``importance_sampling_level="sequence"`` with ``loss_type="grpo"``.
    """
    return policy_loss(
        logps, old_logps, advantages, mask,
        clip_low=clip_low, clip_high=clip_high, level="sequence", how="sequence", **options,
    )  # fmt: skip


def reinforce_pp(
    logps: Tokens, old_logps: Tokens, advantages: Advantages, mask: Tokens, **options: Any
) -> Loss:
    """REINFORCE++ (Hu 2025, arXiv:2501.03262): PPO's clip, mean over a response's tokens,
    then responses; advantages from `aa_jax.losses.groups.reinforce_plus_plus`."""
    return policy_loss(logps, old_logps, advantages, mask, how="sequence", **options)


def cispo(
    logps: Float[Array, "B T"],
    old_logps: Float[Array, "B T"],
    advantages: Float[Array, "B T"] | Float[Array, "B"],
    mask: Float[Array, "B T"],
    *,
    clip_low: float | None = None,
    clip_high: float = 4.0,
    how: str = "token",
    budget: int | float | None = None,
    ref_logps: Float[Array, "B T"] | None = None,
    kl_coef: float = 0.0,
    kl_estimator: str = "k3",
    entropy: Float[Array, "B T"] | None = None,
    entropy_coef: float = 0.0,
) -> Loss:
    r"""CISPO (MiniMax-M1, arXiv:2506.13585, eq. 4-5): the ratio is a clipped weight.

    .. math:: -\frac{1}{\sum_i |o_i|} \sum_i \sum_t
      \mathrm{sg}\left(\mathrm{clip}(\rho, 1-\epsilon_l, 1+\epsilon_h)\right) A \log\pi

    so that no token loses its gradient. The paper tunes ε_h only and has no lower bound. TRL's
    ``epsilon_high`` is 1 + ε_h.

    Args:
      logps: log π of each response token.
      old_logps: of the policy that sampled them.
      advantages: A.
      mask: 0 on tokens that do not count.
      clip_low: ε_l, None for no bound.
      clip_high: ε_h; the other arguments are `policy_loss`'s.
    """
    mask = mask.astype(jnp.float32)
    logps = counted(logps, mask)
    advantages = _per_token(advantages, mask)
    log_ratio = _log_ratio(logps, old_logps, mask, "token")
    rho = jax.lax.stop_gradient(bounded_exp(log_ratio))
    weight = jnp.clip(rho, None if clip_low is None else 1 - clip_low, 1 + clip_high)
    metrics: Metrics = {"clip_fraction": ratio((weight != rho).astype(jnp.float32), mask)}
    return _finish(
        -weight * advantages * logps, logps, log_ratio, advantages, mask, metrics, how, budget,
        ref_logps, kl_coef, kl_estimator, entropy, entropy_coef,
    )  # fmt: skip


def rloo(
    logps: Float[Array, "B T"],
    old_logps: Float[Array, "B T"],
    advantages: Float[Array, "B"],
    mask: Float[Array, "B T"],
    *,
    clip_low: float | None = None,
    clip_high: float | None = None,
) -> Loss:
    r"""RLOO (Ahmadian et al. 2024, arXiv:2402.14740): REINFORCE on whole responses.

    .. math:: -\frac1N \sum_i A_i \log\pi(y_i)

    with `leave_one_out` advantages of rewards that have the KL to the reference in them. With clip
    bounds the ratio of whole responses is clipped instead, −min(ρA, clip(ρ)A), as in TRL's RLOO
    trainer; on the sampling policy both have the same gradient.

    Args:
      logps: log π of each response token.
      old_logps: of the policy that sampled them.
      advantages: one per response.
      mask: 0 on tokens that do not count.
      clip_low: ε_l, None for REINFORCE.
      clip_high: ε_h; None is ε_l.
    """
    mask = mask.astype(jnp.float32)
    there = (jnp.sum(mask, -1) > 0).astype(jnp.float32)
    logps, old_logps = counted(logps, mask), counted(old_logps, mask)
    advantages = jax.lax.stop_gradient(counted(advantages, there))
    whole = jnp.sum(logps * mask, -1)
    log_ratio = whole - jax.lax.stop_gradient(jnp.sum(old_logps * mask, -1))
    metrics: Metrics = {}
    if clip_low is None:
        values = -advantages * whole
    else:
        rho, high = bounded_exp(log_ratio), clip_low if clip_high is None else clip_high
        inside = jnp.clip(rho, 1 - clip_low, 1 + high)
        values = -jnp.minimum(rho * advantages, inside * advantages)
        metrics["clip_fraction"] = ratio((inside != rho).astype(jnp.float32), there)
    loss = ratio(values, there)
    drift = jax.lax.stop_gradient(logps - old_logps)
    metrics |= {
        "loss": loss,
        "policy_loss": loss,
        "approx_kl": ratio(bounded_exp(drift) - 1 - drift, mask),
        "advantages": ratio(advantages, there),
    }
    return total_loss(loss), metrics


POLICY_LOSSES: dict[str, Callable[..., Loss]] = {
    "ppo": ppo,
    "grpo": grpo,
    "dr_grpo": dr_grpo,
    "dapo": dapo,
    "gspo": gspo,
    "cispo": cispo,
    "rloo": rloo,
    "reinforce_pp": reinforce_pp,
}


def value_loss(
    values: Float[Array, "B T"],
    old_values: Float[Array, "B T"],
    returns: Float[Array, "B T"],
    mask: Float[Array, "B T"],
    *,
    clip: float | None = 0.2,
    how: str = "token",
) -> Loss:
    r"""Clipped critic loss of PPO (as in OpenAI's baselines; not in the paper).

    .. math:: \tfrac12 \max\left((V - R)^2, (V_c - R)^2\right), \qquad
      V_c = \mathrm{clip}(V, V_{old} - \epsilon, V_{old} + \epsilon)

    Args:
      values: V of the critic that is trained.
      old_values: V of the critic at sampling time.
      returns: R, e.g. of `aa_jax.losses.advantages.gae`.
      mask: 0 on tokens that do not count. TRL 1.12 counts one token more than the policy loss.
      clip: ε in units of value (TRL 0.2, RAGEN 0.5, align-anything 5), or None.
      how: denominator, see `aggregate`; TRL "token", align-anything "sequence".

    Returns:
      The loss, and metrics ``loss``, ``value_clip_fraction``, ``values``, ``returns`` and
      ``value_error`` (squared, unclipped).
    """
    mask = mask.astype(jnp.float32)
    values = counted(values, mask)
    old_values, returns = (jax.lax.stop_gradient(counted(x, mask)) for x in (old_values, returns))
    error = (values - returns) ** 2
    worst, outside = error, jnp.zeros_like(error)
    if clip is not None:
        near = jnp.clip(values, old_values - clip, old_values + clip)
        clipped = (near - returns) ** 2
        worst, outside = jnp.maximum(error, clipped), (clipped > error).astype(jnp.float32)
    metrics = {
        "loss": aggregate(0.5 * worst, mask, how),
        "value_clip_fraction": ratio(outside, mask),
        "values": ratio(jax.lax.stop_gradient(values), mask),
        "returns": ratio(returns, mask),
        "value_error": ratio(jax.lax.stop_gradient(error), mask),
    }
    return total_loss(metrics["loss"]), metrics


def _per_token(advantages: Array, mask: Array) -> Array:
    if advantages.ndim == 1:
        advantages = jnp.broadcast_to(advantages[:, None], mask.shape)
    return jax.lax.stop_gradient(counted(advantages, mask))


def _log_ratio(logps: Array, old_logps: Array, mask: Array, level: str) -> Array:
    """log ρ per token; of the sequence level the mean over the response, on all its tokens."""
    if level not in LEVELS:
        raise ConfigError(f"There is no level {level!r}; choose one of {[*LEVELS]}.")
    change = logps - jax.lax.stop_gradient(counted(old_logps, mask))
    if level == "token":
        return change
    mean = jnp.sum(change * mask, -1, keepdims=True)
    mean = mean / jnp.maximum(jnp.sum(mask, -1, keepdims=True), 1)
    return jnp.broadcast_to(mean, mask.shape)


def _finish(
    values, logps, log_ratio, advantages, mask, metrics, how, budget,
    ref_logps, kl_coef, kl_estimator, entropy, entropy_coef,
) -> Loss:  # fmt: skip
    """Adds the KL term and the entropy bonus, divides, and reports."""
    fixed = jax.lax.stop_gradient(log_ratio)
    metrics["approx_kl"] = ratio(bounded_exp(fixed) - 1 - fixed, mask)
    metrics["ratio"] = ratio(bounded_exp(fixed), mask)
    metrics["advantages"] = ratio(advantages, mask)
    if ref_logps is None and kl_coef:
        raise ConfigError(
            f"kl_coef={kl_coef} weighs a KL divergence to the reference: give ref_logps, or set "
            "kl_coef=0."
        )
    if ref_logps is not None:
        reference = jax.lax.stop_gradient(counted(ref_logps, mask))
        kl = kl_estimate(logps, reference, kl_estimator)
        metrics["kl"] = ratio(jax.lax.stop_gradient(kl), mask)
        values = values + kl_coef * kl
    policy = aggregate(values, mask, how, budget=budget)
    terms = [policy]
    if entropy is not None:
        mean = ratio(entropy, mask)
        metrics["entropy"] = Ratio(jax.lax.stop_gradient(mean.total), mean.count)
        if entropy_coef:
            terms.append(Ratio(-entropy_coef * mean.total, mean.count))
    elif entropy_coef:
        raise ConfigError(f"entropy_coef={entropy_coef} needs the entropy of each token.")
    metrics |= {"policy_loss": policy, "loss": policy if len(terms) == 1 else tuple(terms)}
    return total_loss(metrics["loss"]), metrics
