"""Alignment via optimal transport: whole distributions of margins are compared, not pairs."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from aa_jax.losses.preference.pairs import Pairs, log_ratios
from aa_jax.losses.stable import smoothed_logistic


def aot(pairs: Pairs, *, beta: float = 0.1, label_smoothing: float = 0.0) -> Float[Array, "P"]:
    r"""AOT, paired (Melnyk et al. 2024, arXiv:2406.05882): the policy's margins shall
    dominate the reference's in the first order.

    .. math:: -\log\sigma(\beta\,(u_{(i)} - v_{(i)})), \quad
      u = \log\pi(y_w) - \log\pi(y_l),\; v = \log\pi_{ref}(y_w) - \log\pi_{ref}(y_l)

    with both sorted over the batch. The same as TRL's ``aot``, but sorted over all devices. Under
    accumulation every micro-batch is sorted by itself; with one pair it is DPO.
    """
    policy = pairs.chosen - pairs.rejected
    reference = pairs.ref_chosen - pairs.ref_rejected
    partner = _same_rank(policy, reference, pairs.mask)
    return smoothed_logistic(beta * (policy - reference[partner]), label_smoothing)


def aot_unpaired(
    pairs: Pairs, *, beta: float = 0.1, label_smoothing: float = 0.0
) -> Float[Array, "P"]:
    r"""AOT, unpaired (arXiv:2406.05882): rewards of chosen responses shall dominate those of
    rejected ones, whichever prompts they answer.

    .. math:: -\log\sigma(\beta\,(\Delta_{w(i)} - \Delta_{l(i)}))

    with both sorted over the batch; otherwise as `aot`.
    """
    chosen, rejected = log_ratios(pairs)
    partner = _same_rank(chosen, rejected, pairs.mask)
    return smoothed_logistic(beta * (chosen - rejected[partner]), label_smoothing)


def _same_rank(
    left: Float[Array, "P"], right: Float[Array, "P"], mask: Float[Array, "P"]
) -> Int[Array, "P"]:
    """For each entry of `left` the index of the entry of `right` of equal rank, padding last."""

    def order(x: Float[Array, "P"]) -> Int[Array, "P"]:
        return jnp.argsort(jnp.where(mask != 0, jax.lax.stop_gradient(x), jnp.inf))

    return order(right)[jnp.argsort(order(left))]
