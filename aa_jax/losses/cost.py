"""Cost models: how harmful a response is, with a sign that says whether it is safe at all."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from aa_jax.losses.base import Loss, counted, ratio, total_loss
from aa_jax.losses.reward import pair_metrics


def cost_loss(
    worse: Float[Array, "P"],
    better: Float[Array, "P"],
    worse_sign: Float[Array, "P"],
    better_sign: Float[Array, "P"],
    pair_mask: Float[Array, "P"],
    *,
    sign_coef: float = 1.0,
    regularization: float = 0.0,
) -> Loss:
    r"""Cost model of Safe RLHF (Dai et al. 2023, arXiv:2310.12773, eq. 6) and Safe RLHF-V.

    .. math::
      L = -\log\sigma(c_w - c_l)
        + s\left(-\log\sigma(\mathrm{sgn}_w c_w) - \log\sigma(\mathrm{sgn}_l c_l)\right)
        + \rho\,\tfrac12 (c_w^2 + c_l^2)

    averaged over pairs. The sign makes zero the border: positive costs are unsafe. Safe RLHF has
    signs of ±1, Safe RLHF-V graded ones (BeaverTails-V: minus the rate of harmlessness), which
    weigh severity inside the sigmoid.

    Args:
      worse: cost of the more harmful response of each pair.
      better: cost of the less harmful one.
      worse_sign: > 0 unsafe, < 0 safe.
      better_sign: the same of the other.
      pair_mask: 0 on pairs that only fill the batch.
      sign_coef: s, align-anything's ``scale_coeff``.
      regularization: ρ, as in `reward_loss`.

    Returns:
      The loss, and per-pair metrics ``loss``, ``accuracy``, ``margin``, ``chosen_rewards`` and
      ``rejected_rewards`` (costs of the worse and the better response) and ``sign_accuracy``: how
      often a cost has the sign of its label (0 counts half).
    """
    worse, better, worse_sign, better_sign = (
        counted(x, pair_mask) for x in (worse, better, worse_sign, better_sign)
    )
    losses = -jax.nn.log_sigmoid(worse - better)
    for cost, sign in ((worse, worse_sign), (better, better_sign)):
        losses += -sign_coef * jax.nn.log_sigmoid(sign * cost)
        losses += 0.5 * regularization * cost**2
    metrics = {"loss": ratio(losses, pair_mask)}
    metrics |= pair_metrics(worse, better, pair_mask)
    right = [
        0.5 * (1 + jnp.sign(jax.lax.stop_gradient(cost) * sign))
        for cost, sign in ((worse, worse_sign), (better, better_sign))
    ]
    metrics["sign_accuracy"] = ratio(0.5 * (right[0] + right[1]), pair_mask)
    return total_loss(metrics["loss"]), metrics
