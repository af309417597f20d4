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
    """

    rewards: np.ndarray
    valid: np.ndarray
    logps: np.ndarray
    ref_logps: np.ndarray | None
    values: np.ndarray | None
    mask: np.ndarray
    kl_coef: float

    def rows(self, array: np.ndarray) -> jax.Array:
        """[P, G, ...] -> [P * G, ...]."""
        return jnp.asarray(array).reshape(-1, *np.shape(array)[2:])

    def token_rewards(self, **options: Any) -> jax.Array:
        """Reward at the last token, minus the price of the KL at every token; [P * G, R]."""
        logps = self.rows(self.logps)
        reference = logps if self.ref_logps is None else self.rows(self.ref_logps)
        return adv.shaped_rewards(
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
    advantages, returns = adv.gae(
        rewards, experience.rows(experience.values), mask, gamma=gamma, lam=lam
    )
    if whiten:
        advantages = jnp.where(mask != 0, adv.whiten(advantages, mask), 0)
    shape = experience.mask.shape
    return {
        "advantages": np.asarray(advantages).reshape(shape),
        "returns": np.asarray(returns).reshape(shape),
        "old_values": np.asarray(experience.values, np.float32),
    }


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
    found = groups.reinforce_plus_plus(rewards, experience.rows(experience.mask), gamma=gamma)
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
