"""Reward models from pairwise preferences."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from aa_jax.losses.base import Loss, Ratio, counted, ratio, total_loss


def reward_loss(
    chosen: Float[Array, "P"],
    rejected: Float[Array, "P"],
    pair_mask: Float[Array, "P"],
    *,
    margin: Float[Array, "P"] | None = None,
    regularization: float = 0.0,
    centering: float = 0.0,
) -> Loss:
    r"""Bradley-Terry likelihood of the preferences.

    .. math::
      L = -\log\sigma(r_w - r_l - m) + \rho\,\tfrac12 (r_w^2 + r_l^2) + \kappa\,(r_w + r_l)^2,

    averaged over pairs (Ouyang et al. 2022, eq. 1; margin: Touvron et al. 2023, eq. 2; centering:
    Eisenstein et al. 2023, eq. 2). The regularisation is align-anything's: the mean of the
    squared rewards over both sides. TRL's ``center_rewards_coefficient`` is κ.

    Args:
      chosen: reward of the preferred response of each pair.
      rejected: reward of the other.
      pair_mask: 0 on pairs that only fill the batch.
      margin: how much better the preferred response is, in units of reward.
      regularization: ρ ≥ 0, align-anything's default is 0.001.
      centering: κ ≥ 0.

    Returns:
      The loss, and per-pair metrics ``loss``, ``accuracy`` (ties count half; TRL counts them as
      wrong), ``margin``, ``chosen_rewards`` and ``rejected_rewards``.
    """
    chosen, rejected = counted(chosen, pair_mask), counted(rejected, pair_mask)
    difference = chosen - rejected
    if margin is not None:
        difference = difference - counted(margin, pair_mask)
    losses = -jax.nn.log_sigmoid(difference)
    losses += 0.5 * regularization * (chosen**2 + rejected**2)
    losses += centering * (chosen + rejected) ** 2
    metrics = {"loss": ratio(losses, pair_mask)}
    metrics |= pair_metrics(chosen, rejected, pair_mask)
    return total_loss(metrics["loss"]), metrics


def pair_metrics(
    chosen: Float[Array, "P"], rejected: Float[Array, "P"], pair_mask: Float[Array, "P"]
) -> dict[str, Ratio]:
    """How well rewards order the pairs: accuracy (ties count half), margin, both rewards."""
    chosen, rejected = jax.lax.stop_gradient((chosen, rejected))
    better = 0.5 * (jnp.sign(chosen - rejected) + 1)
    return {
        "accuracy": ratio(better, pair_mask),
        "margin": ratio(chosen - rejected, pair_mask),
        "chosen_rewards": ratio(chosen, pair_mask),
        "rejected_rewards": ratio(rejected, pair_mask),
    }
