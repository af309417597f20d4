"""Formulas whose values and gradients stay finite where the textbook form overflows."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

LARGEST_EXPONENT = 30.0  # e^30 ~ 1e13; its square times any log-ratio still fits float32


def bounded_exp(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """exp(x), continued by its tangent above `LARGEST_EXPONENT`.

    Exact for every ratio a healthy run produces. Beyond, exp would be inf, and inf times the zero
    gradient of a clipped branch is NaN; a plain clamp would hide the outlier from the gradient.
    """
    below = jnp.minimum(x, LARGEST_EXPONENT)
    return jnp.exp(below) * (1 + (x - below))


def log1mexp(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """log(1 - exp(x)) for x <= 0, the log-probability of "not that".

    Two branches that meet at -log 2 avoid cancellation (Mächler 2012). At x = 0, where the value
    is -inf, it is the value at -1e-7.
    """
    x = jnp.minimum(x, -1e-7)
    near = x > -jnp.log(2.0)
    return jnp.where(
        near,
        jnp.log(-jnp.expm1(jnp.where(near, x, -1.0))),
        jnp.log1p(-jnp.exp(jnp.where(near, -1.0, x))),
    )


def masked_mean(values: Float[Array, "*shape"], mask: Float[Array, "*shape"]) -> Float[Array, ""]:
    """Weighted mean; 0 if nothing counts; values of weight 0 may be anything."""
    mask = mask.astype(jnp.float32)
    total = jnp.sum(jnp.where(mask != 0, values, 0) * mask)
    count = jnp.sum(mask)
    return total / jnp.where(count == 0, 1, count)


def smoothed_logistic(
    logits: Float[Array, "*shape"], epsilon: float = 0.0
) -> Float[Array, "*shape"]:
    """-log σ(logits), and with probability ε of a wrong label -log σ(-logits)."""
    right, wrong = -jax.nn.log_sigmoid(logits), -jax.nn.log_sigmoid(-logits)
    return (1 - epsilon) * right + epsilon * wrong if epsilon else right
