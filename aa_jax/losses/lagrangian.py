"""PPO-Lagrangian of Safe RLHF: reward against a cost that has to stay below a limit.

Source: Dai et al. 2023, arXiv:2310.12773, §3.3 and appendix B; Safe RLHF-V uses the same.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from aa_jax.errors import ConfigError


class Lagrangian(NamedTuple):
    """State of the multiplier; a pytree for the train state.

    Attributes:
      log_lambda: η = log λ, shape [].
      costs: the last W episode costs, a ring.
      count: number of costs seen, shape [].
    """

    log_lambda: Float[Array, ""]
    costs: Float[Array, "W"]
    count: Float[Array, ""]

    @property
    def multiplier(self) -> Float[Array, ""]:
        """λ."""
        return jnp.exp(self.log_lambda)

    @property
    def mean_cost(self) -> Float[Array, ""]:
        """J_c: mean of the costs in the window, 0 before the first."""
        filled = jnp.minimum(self.count, self.costs.shape[0])
        return jnp.sum(self.costs) / jnp.maximum(filled, 1)


def lagrangian(initial: float = 10.0, window: int = 128) -> Lagrangian:
    """The state before training.

    Args:
      initial: λ at the start, > 0.
      window: W, episodes that J_c is the mean of.

    Raises:
      ConfigError: a value that is not positive.
    """
    if initial <= 0 or window < 1:
        raise ConfigError(
            f"a Lagrange multiplier starts above 0 and its window holds costs, got "
            f"initial={initial}, window={window}."
        )
    zero = jnp.float32(0)
    return Lagrangian(jnp.log(jnp.float32(initial)), jnp.zeros(window, jnp.float32), zero)


def observe_costs(
    state: Lagrangian, costs: Float[Array, "N"], mask: Float[Array, "N"] | Bool[Array, "N"]
) -> Lagrangian:
    """The state with the costs of finished episodes in its window; the oldest leave.

    Args:
      state: the state.
      costs: one per episode, of the cost model (without KL).
      mask: 0 on rows that only fill the batch.
    """
    window = state.costs.shape[0]
    there = mask != 0
    order = jnp.cumsum(there) - 1
    slot = jnp.where(there, (state.count.astype(jnp.int32) + order) % window, window)
    # Of more costs than slots only the last of each slot may be written.
    late = there & (order >= jnp.sum(there) - window)
    ring = state.costs.at[jnp.where(late, slot, window)].set(
        jnp.where(late, costs, 0).astype(jnp.float32), mode="drop"
    )
    return state._replace(costs=ring, count=state.count + jnp.sum(there).astype(jnp.float32))


def update_multiplier(
    state: Lagrangian,
    *,
    threshold: float,
    lr: float = 0.1,
    maximum: float | None = None,
    mean_cost: float | Float[Array, ""] | None = None,
) -> Lagrangian:
    r"""Gradient ascent on λ in log space.

    .. math:: \eta \leftarrow \min\left(\eta + \alpha\,(J_c - d)\,\lambda,\;
      \log\lambda_{max}\right), \qquad \lambda = e^\eta

    Args:
      state: the state.
      threshold: d, the mean cost allowed (−0.5 in align-anything).
      lr: α.
      maximum: λ_max, or None.
      mean_cost: J_c; None is the window's mean.
    """
    cost = state.mean_cost if mean_cost is None else jnp.asarray(mean_cost, jnp.float32)
    value = state.log_lambda + lr * (cost - threshold) * state.multiplier
    if maximum is not None:
        value = jnp.minimum(value, jnp.log(jnp.float32(maximum)))
    return state._replace(log_lambda=value)


def combined_advantages(
    reward_advantages: Float[Array, "*shape"],
    cost_advantages: Float[Array, "*shape"],
    multiplier: float | Float[Array, ""],
) -> Float[Array, "*shape"]:
    r"""One advantage for the policy loss.

    .. math:: A = \frac{A_r - \lambda A_c}{1 + \lambda}
    """
    multiplier = jnp.asarray(multiplier, jnp.float32)
    return (reward_advantages - multiplier * cost_advantages) / (1 + multiplier)
