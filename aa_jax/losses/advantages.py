"""From rewards to advantages: KL-shaped rewards, GAE, whitening, and group baselines.

Everything here is data for the policy losses: nothing is differentiated. Token arrays are
[B, T] over response slots with a mask; tokens of mask 0 (padding, environment turns) are skipped,
not counted as steps in time, and may hold anything.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from aa_jax.errors import ConfigError
from aa_jax.losses.base import counted
from aa_jax.losses.stable import bounded_exp

ESTIMATORS = ("k1", "k2", "k3", "abs")


def kl_estimate(
    logps: Float[Array, "*shape"], ref_logps: Float[Array, "*shape"], estimator: str = "k1"
) -> Float[Array, "*shape"]:
    r"""Per-token estimate of KL(π || π_ref) at tokens sampled from π (Schulman 2020).

    With d = log π − log π_ref: k1 = d (unbiased, may be negative), k2 = d²/2 (biased, low
    variance), k3 = e^−d − 1 + d (unbiased, ≥ 0), abs = |d|. Differentiable; as a loss only k2's
    gradient is that of the KL in expectation, k3's (GRPO) is that of the forward KL.

    Raises:
      ConfigError: unknown estimator.
    """
    d = (logps - ref_logps).astype(jnp.float32)
    if estimator == "k1":
        return d
    if estimator == "k2":
        return 0.5 * d**2
    if estimator == "k3":
        return bounded_exp(-d) - 1 + d
    if estimator == "abs":
        return jnp.abs(d)
    raise ConfigError(f"There is no KL estimator {estimator!r}; choose one of {[*ESTIMATORS]}.")


def shaped_rewards(
    logps: Float[Array, "B T"],
    ref_logps: Float[Array, "B T"],
    scores: Float[Array, "B"],
    mask: Float[Array, "B T"],
    *,
    kl_coef: float | Float[Array, ""],
    estimator: str = "k1",
    score_clip: float | None = None,
    reward_clip: float | None = None,
) -> Float[Array, "B T"]:
    r"""Token rewards of RLHF: the score at the last response token, minus a price for each KL.

    .. math:: r_t = -c\,\widehat{KL}_t + 1[t = \text{last}]\, R

    (Ziegler et al. 2019, arXiv:1909.08593, eq. 2, as token rewards.) TRL 1.12's PPO puts the score
    one slot behind the end token where there is room; align-anything clips the sum to ±50
    (``reward_clip``), InstructGPT-style codes the score alone (``score_clip``).

    Args:
      logps: of the sampling policy.
      ref_logps: of the reference.
      scores: reward of each response; none is paid to an empty one.
      mask: 1 on response tokens and their end token.
      kl_coef: c.
      estimator: see `kl_estimate`.
      score_clip: scores are clipped to ± this.
      reward_clip: token rewards are clipped to ± this.
    """
    mask = mask.astype(jnp.float32)
    kl = kl_estimate(counted(logps, mask), counted(ref_logps, mask), estimator)
    scores = scores.astype(jnp.float32)
    if score_clip is not None:
        scores = jnp.clip(scores, -score_clip, score_clip)
    rewards = jnp.where(last_tokens(mask), scores[:, None], 0) - kl_coef * kl
    if reward_clip is not None:
        rewards = jnp.clip(rewards, -reward_clip, reward_clip)
    return jax.lax.stop_gradient(jnp.where(mask != 0, rewards, 0))


def last_tokens(mask: Float[Array, "B T"]) -> Bool[Array, "B T"]:
    """True at the last token of each row whose mask is not 0."""
    there = mask != 0
    after = jnp.cumsum(there[:, ::-1], axis=1)[:, ::-1]
    return there & (after == 1)


def gae(
    rewards: Float[Array, "B T"],
    values: Float[Array, "B T"],
    mask: Float[Array, "B T"],
    *,
    gamma: float = 1.0,
    lam: float = 0.95,
    bootstrap: Float[Array, "B"] | None = None,
    ends: Float[Array, "B T"] | None = None,
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    r"""Generalised advantage estimation (Schulman et al. 2016, arXiv:1506.02438, eq. 11-16).

    .. math:: \delta_t = r_t + \gamma V_{t'} - V_t, \qquad
      A_t = \delta_t + \gamma\lambda A_{t'}

    where t' is the next token of mask 1; behind the last one V and A are 0 (or the bootstrap).
    Rewards must lie on such tokens. TRL's and RAGEN's loops step through masked tokens as well,
    which is the same only for γ = λ = 1.

    Args:
      rewards: token rewards, e.g. of `shaped_rewards`.
      values: V of the state before each token was taken.
      mask: 0 on tokens to skip.
      gamma: γ.
      lam: λ.
      bootstrap: value behind the last token, for responses that were cut off.
      ends: 1 on tokens after which nothing is carried back: what follows is another episode.

    Returns:
      (advantages, returns = advantages + values), 0 where the mask is.
    """
    mask = mask.astype(jnp.float32)
    rewards, values = counted(rewards, mask), counted(values, mask)
    ends = jnp.zeros_like(mask) if ends is None else counted(ends, mask)
    start = jnp.zeros(mask.shape[0], jnp.float32)
    behind = start if bootstrap is None else bootstrap.astype(jnp.float32)

    def back(carry: tuple, token: tuple) -> tuple:
        next_value, next_advantage = carry
        reward, value, there, end = token
        keep = jnp.where(end != 0, 0.0, 1.0)
        delta = reward + gamma * keep * next_value - value
        advantage = delta + gamma * lam * keep * next_advantage
        counts = there != 0
        carry = (
            jnp.where(counts, value, next_value),
            jnp.where(counts, advantage, next_advantage),
        )
        return carry, jnp.where(counts, advantage, 0.0)

    columns = tuple(x.T for x in (rewards, values, mask, ends))
    _, advantages = jax.lax.scan(back, (behind, start), columns, reverse=True)
    advantages = advantages.T
    return jax.lax.stop_gradient((advantages, advantages + values))


def bilevel_gae(
    rewards: Float[Array, "B T"],
    values: Float[Array, "B T"],
    mask: Float[Array, "B T"],
    turn_ends: Float[Array, "B T"],
    *,
    gamma: float = 1.0,
    lam: float = 1.0,
    turn_gamma: float = 0.95,
    turn_lam: float | None = None,
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    r"""GAE over turns, then over the tokens of each turn (RAGEN, arXiv:2504.20073, StarPO).

    First over the turn ends alone, with the sum of a turn's rewards and the discount
    ``turn_gamma``; then inside every turn, where the return A + V of its end takes the place of
    its rewards. With one turn it is `gae` with all of the reward at its end.

    RAGEN takes tokens of non-zero reward for turn ends, so that it loses turns without reward;
    here they are told. Its λ is the same on both levels.

    Args:
      rewards: token rewards; all of a turn count at its end.
      values: V of the state before each token.
      mask: 0 on tokens to skip.
      turn_ends: 1 on the last token of each turn, which must have mask 1. Tokens behind the last
        end form a turn without reward.
      gamma: γ between tokens.
      lam: λ between tokens.
      turn_gamma: γ between turns.
      turn_lam: λ between turns; None is `lam`.

    Returns:
      (advantages, returns), 0 where the mask is.
    """
    mask = mask.astype(jnp.float32)
    ends = counted(turn_ends, mask)
    earned = _turn_sums(counted(rewards, mask), ends)
    _, turn_returns = gae(
        earned, values, ends, gamma=turn_gamma, lam=lam if turn_lam is None else turn_lam
    )
    return gae(turn_returns, values, mask, gamma=gamma, lam=lam, ends=ends)


def _turn_sums(rewards: Float[Array, "B T"], ends: Float[Array, "B T"]) -> Float[Array, "B T"]:
    """The sum of each turn's rewards at its end, 0 elsewhere."""

    def forward(open_sum: Array, token: tuple) -> tuple:
        reward, end = token
        total = open_sum + reward
        return jnp.where(end != 0, 0.0, total), jnp.where(end != 0, total, 0.0)

    start = jnp.zeros(rewards.shape[0], jnp.float32)
    return jax.lax.scan(forward, start, (rewards.T, ends.T))[1].T


def whiten(
    values: Float[Array, "*shape"],
    mask: Float[Array, "*shape"],
    *,
    shift_mean: bool = True,
    eps: float = 1e-8,
) -> Float[Array, "*shape"]:
    r"""Zero mean and unit variance over all tokens of the batch.

    .. math:: (x - \mu)\,/\sqrt{s^2 + \epsilon}, \qquad s^2 \text{ with } n - 1

    The same as TRL 1.12's ``masked_whiten``, but 0 instead of an error or NaN with fewer than two
    tokens. align-anything does not whiten.

    Args:
      values: rewards or advantages.
      mask: 0 on values that do not count; they are transformed like the others.
      shift_mean: False keeps the mean, for rewards.
      eps: ε.
    """
    mask = mask.astype(jnp.float32)
    seen = counted(values, mask)
    count = jnp.sum(mask)
    mean = jnp.sum(seen * mask) / jnp.maximum(count, 1)
    variance = jnp.sum((seen - mean) ** 2 * mask) / jnp.maximum(count - 1, 1)
    white = (values.astype(jnp.float32) - mean) * jax.lax.rsqrt(variance + eps)
    return jax.lax.stop_gradient(white if shift_mean else white + mean)
