"""The weight of the KL penalty over a run: constant, or steered to a target."""

import jax.numpy as jnp
from jaxtyping import Array, Float

Scalar = float | Float[Array, ""]


def fixed_kl(coef: Scalar, kl: Scalar) -> Scalar:
    """The same coefficient whatever the KL was."""
    del kl
    return coef


def adaptive_kl(
    coef: Scalar, kl: Scalar, *, target: float, gain: Scalar = 0.1, limit: float = 0.2
) -> Float[Array, ""]:
    r"""Proportional controller in log space (Ziegler et al. 2019, arXiv:1909.08593, §2.2).

    .. math:: e = \mathrm{clip}\left(\frac{KL - KL_{target}}{KL_{target}}, -0.2, 0.2\right), \qquad
      \beta \leftarrow \beta\,(1 + K_\beta e)

    Pure: the coefficient is the state, keep it in the train state.

    Args:
      coef: β of the last update.
      kl: mean KL(π || π_ref) per response measured with it, in nats.
      target: KL_target.
      gain: K_β, 0.1 in the paper; implementations with a horizon use responses / horizon.
      limit: bound of the error.
    """
    error = jnp.clip(jnp.asarray(kl, jnp.float32) / target - 1, -limit, limit)
    return jnp.asarray(coef, jnp.float32) * (1 + gain * error)
