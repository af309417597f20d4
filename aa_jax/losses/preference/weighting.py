"""Weights of pairs that make off-policy data look like on-policy data."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from aa_jax.losses.base import counted


def wpo_weights(
    logps: Float[Array, "B S R"],
    log_sum_squares: Float[Array, "B S R"],
    mask: Float[Array, "B S R"],
) -> Float[Array, "B S"]:
    r"""Weighted preference optimisation (Zhou et al. 2024, arXiv:2406.11827, eq. 2).

    .. math:: w(x, y) = \exp\left(\frac{1}{|y|} \sum_t
      \log\frac{\pi(y_t)}{\sum_v \pi(v)^2}\right)

    the policy's own likelihood of a response, relative to what it expects of its own samples
    ("sampled alignment", the paper's default). A pair's weight is the product over its responses.
    No gradient. The same as TRL's ``use_weighting``.

    Args:
      logps: log π of every response token.
      log_sum_squares: log Σ_v π(v)² of the distribution it came from.
      mask: 0 on padding.

    Returns:
      Weights per sequence; 1 where a sequence is empty.
    """
    mask = mask.astype(jnp.float32)
    aligned = counted(logps, mask) - counted(log_sum_squares, mask)
    mean = jnp.sum(aligned * mask, -1) / jnp.maximum(jnp.sum(mask, -1), 1)
    return jax.lax.stop_gradient(jnp.exp(mean))
