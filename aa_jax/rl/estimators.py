"""From one iteration's rewards to what the policy loss reads: advantages, returns for a critic.

An estimator takes an `Experience` and returns arrays for the batch, [P, G, R]: P prompts, G
responses each, R response slots.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from aa_jax.errors import ConfigError
from aa_jax.losses import advantages as adv
from aa_jax.losses import groups
from aa_jax.losses.lagrangian import combined_advantages

# Compiled once, not in every iteration: a scan that runs by itself is compiled at every call.
_gae = jax.jit(adv.gae, static_argnames=("gamma", "lam"))
_whiten = jax.jit(adv.whiten)
_shaped_rewards = jax.jit(
    adv.shaped_rewards, static_argnames=("estimator", "score_clip", "reward_clip")
)
_reinforce_plus_plus = jax.jit(groups.reinforce_plus_plus, static_argnames="gamma")


@dataclasses.dataclass(frozen=True)
class Experience:
    """What one iteration has sampled.

    Attributes:
      rewards: [P, G], 0 where not valid.
      valid: [P, G], 0 on responses without a usable reward and on rows that only fill up.
      logps: [P, G, R] of the policy that sampled.
      ref_logps: [P, G, R] of the reference, or None.
      values: [P, G, R] of the critic, or None.
      mask: [P, G, R], 1 on response tokens of valid responses.
      kl_coef: price of the KL in the rewards, from the controller.
      costs: [P, G], of a cost model, or None.
      cost_values: [P, G, R] of its critic, or None.
      multiplier: λ, the price of the costs.
    """

    rewards: np.ndarray
    valid: np.ndarray
    logps: np.ndarray
    ref_logps: np.ndarray | None
    values: np.ndarray | None
    mask: np.ndarray
    kl_coef: float
    costs: np.ndarray | None = None
    cost_values: np.ndarray | None = None
    multiplier: float = 0.0

    def rows(self, array: Any) -> jax.Array:
        """[P, G, ...] -> [P * G, ...]."""
        return jnp.asarray(array).reshape(-1, *np.shape(array)[2:])

    def token_rewards(self, **options: Any) -> jax.Array:
        """Reward at the last token, minus the price of the KL at every token; [P * G, R]."""
        logps = self.rows(self.logps)
        reference = logps if self.ref_logps is None else self.rows(self.ref_logps)
        return _shaped_rewards(
                logps, reference, self.rows(self.rewards), self.rows(self.mask),
                kl_coef=self.kl_coef, **options,
        )  # fmt: skip


def gae(
    experience: Experience,
    *,
    gamma: float = 1.0,
    lam: float = 0.95,
    whiten: bool = True,
    kl_estimator: str = "k1",
    score_clip: float | None = None,
    reward_clip: float | None = None,
) -> dict[str, np.ndarray]:
    """PPO: generalised advantage estimation against the critic (`losses.advantages.gae`)."""
    rewards = experience.token_rewards(
        estimator=kl_estimator, score_clip=score_clip, reward_clip=reward_clip
    )
    mask = experience.rows(experience.mask)
    advantages, returns = _gae(
        rewards, experience.rows(experience.values), mask, gamma=gamma, lam=lam
    )
    if whiten:
        advantages = jnp.where(mask != 0, _whiten(advantages, mask), 0)
    shape = experience.mask.shape
    return {
        "advantages": np.asarray(advantages).reshape(shape),
        "returns": np.asarray(returns).reshape(shape),
        "old_values": np.asarray(experience.values, np.float32),
    }


def lagrangian(experience: Experience, *, whiten: bool = True, **options: Any) -> dict:
    """PPO-Lagrangian (Dai et al. 2023, eq. 14): A = (A_r - λ A_c) / (1 + λ), a critic for each.

    A cost is a reward that is to be low, so the KL to the reference counts with the other sign.

    Args:
      experience: with costs and the values of their critic.
      whiten: the advantage.
      **options: of `gae`, the same for rewards and costs.
    """
    paid = gae(experience, whiten=False, **options)
    costly = dataclasses.replace(
        experience, rewards=experience.costs, values=experience.cost_values,
        kl_coef=-experience.kl_coef,
    )  # fmt: skip
    cost = gae(costly, whiten=False, **options)
    advantages = combined_advantages(
        jnp.asarray(paid["advantages"]), jnp.asarray(cost["advantages"]), experience.multiplier
    )
    if whiten:
        mask = jnp.asarray(experience.mask)
        flat = experience.rows(advantages), experience.rows(mask)
        advantages = jnp.where(mask != 0, _whiten(*flat).reshape(mask.shape), 0)
    return paid | {
        "advantages": np.asarray(advantages), "cost_returns": cost["returns"],
        "old_cost_values": cost["old_values"],
    }  # fmt: skip


def best(experience: Experience, *, least: int | float | None = None) -> dict[str, np.ndarray]:
    """RAFT: 1 for the best response of each group, the first of several.

    A group whose responses all got the same reward has no best one. Neither has one whose best
    reward is below ``least``.
    """
    rewards, high, low = _ordered(experience)
    some = (rewards.max(1) > _lowest(rewards)) & (
        rewards.max(1) >= (-np.inf if least is None else least)
    )
    found = np.zeros_like(experience.rewards)
    found[some, high[some]] = 1
    return _per_token(experience, found)


def best_and_worst(experience: Experience) -> dict[str, np.ndarray]:
    """Online DPO: 1 for the best response of each group, -1 for the worst; ties are no pair."""
    rewards, high, low = _ordered(experience)
    some = rewards.max(1) > _lowest(rewards)
    found = np.zeros_like(experience.rewards)
    found[some, high[some]], found[some, low[some]] = 1, -1
    return _per_token(experience, found)


def _ordered(experience: Experience) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(rewards, -inf where there is none; the best response of each group; its worst)."""
    there = experience.valid > 0
    rewards = np.where(there, experience.rewards, -np.inf)
    return rewards, rewards.argmax(1), np.where(there, rewards, np.inf).argmin(1)


def _lowest(rewards: np.ndarray) -> np.ndarray:
    return np.where(np.isfinite(rewards), rewards, np.inf).min(1)


def reinforce_plus_plus(
    experience: Experience,
    *,
    gamma: float = 1.0,
    kl_estimator: str = "k1",
    score_clip: float | None = None,
    reward_clip: float | None = None,
) -> dict[str, np.ndarray]:
    """REINFORCE++: returns to go, whitened over the batch."""
    rewards = experience.token_rewards(
        estimator=kl_estimator, score_clip=score_clip, reward_clip=reward_clip
    )
    found = _reinforce_plus_plus(rewards, experience.rows(experience.mask), gamma=gamma)
    return {"advantages": np.asarray(found).reshape(experience.mask.shape)}


def group(experience: Experience, *, scale: str = "group", eps: float = 1e-4) -> dict:
    """GRPO, DAPO, Dr. GRPO (``scale="none"``): rewards against the group's mean."""
    found = groups.group_advantages(*_paid(experience), scale=scale, eps=eps)
    return _per_token(experience, found)


def leave_one_out(experience: Experience) -> dict[str, np.ndarray]:
    """RLOO. The KL, if it has a price, is part of each response's reward, as in the paper."""
    rewards, valid = _paid(experience)
    if experience.ref_logps is not None and experience.kl_coef:
        rewards = experience.token_rewards().reshape(experience.mask.shape).sum(-1)
    return _per_token(experience, groups.leave_one_out(rewards, valid))


def reinforce_baseline(experience: Experience) -> dict[str, np.ndarray]:
    """REINFORCE++-baseline: minus the group's mean, whitened over the batch."""
    found = groups.reinforce_plus_plus_baseline(*_paid(experience))
    return _per_token(experience, found)


def _paid(experience: Experience) -> tuple[jax.Array, jax.Array]:
    return jnp.asarray(experience.rewards), jnp.asarray(experience.valid)


def _per_token(experience: Experience, found: Any) -> dict[str, np.ndarray]:
    there = (experience.mask != 0).astype(np.float32)
    return {"advantages": np.asarray(found, np.float32)[..., None] * there}


ESTIMATORS: Mapping[str, Callable[..., dict[str, np.ndarray]]] = {
    "gae": gae,
    "lagrangian": lagrangian,
    "best": best,
    "best_and_worst": best_and_worst,
    "group": group,
    "leave_one_out": leave_one_out,
    "reinforce_plus_plus": reinforce_plus_plus,
    "reinforce_plus_plus_baseline": reinforce_baseline,
}


def find_estimator(name: str) -> Callable[..., dict[str, np.ndarray]]:
    """An estimator by name.

    Raises:
      ConfigError: there is none of that name.
    """
    if name not in ESTIMATORS:
        raise ConfigError(f"There is no estimator {name!r}; there are {', '.join(ESTIMATORS)}.")
    return ESTIMATORS[name]
