"""Graded labels: the 0-3 scores that annotators give on each dimension of a response."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from aa_jax.losses.base import Loss, counted, ratio, total_loss
from aa_jax.losses.stable import log1mexp


def ordered_thresholds(raw: Float[Array, "*dims C"]) -> Float[Array, "*dims C"]:
    """Free parameters as increasing thresholds: the first as it is, then positive steps.

    Args:
      raw: unconstrained; zeros give steps of log 2.
    """
    steps = jax.nn.softplus(raw[..., 1:].astype(jnp.float32))
    return jnp.cumsum(jnp.concatenate([raw[..., :1].astype(jnp.float32), steps], -1), -1)


def ordinal_logps(
    scores: Float[Array, "*batch"], thresholds: Float[Array, "C"]
) -> Float[Array, "*batch K"]:
    r"""log P(grade = k) of the proportional-odds model (McCullagh 1980).

    .. math:: P(y \le k) = \sigma(\theta_k - s), \qquad
      P(y = k) = \sigma(\theta_k - s)\,\sigma(s - \theta_{k-1})\,(1 - e^{\theta_{k-1} - \theta_k})

    The product form of the difference of two sigmoids keeps every logarithm finite.

    Args:
      scores: s, one number per response and dimension.
      thresholds: θ, increasing; C = K − 1, one less than there are grades.
    """
    thresholds = thresholds.astype(jnp.float32).reshape((1,) * scores.ndim + (-1,))
    gap = scores[..., None].astype(jnp.float32) - thresholds
    below, above = jax.nn.log_sigmoid(-gap), jax.nn.log_sigmoid(gap)
    between = (
        below[..., 1:] + above[..., :-1] + log1mexp(thresholds[..., :-1] - thresholds[..., 1:])
    )
    return jnp.concatenate([below[..., :1], between, above[..., -1:]], -1)


def ordinal_loss(
    scores: Float[Array, "N D"],
    grades: Int[Array, "N D"],
    thresholds: Float[Array, "D C"],
    mask: Float[Array, "N D"],
) -> Loss:
    r"""-log P(grade), averaged over all grades given.

    Align Anything (arXiv:2412.15838, appendix) grades each dimension of a response (prompt
    adherence, rule conformity, information richness, ...) from 0 to 3, so K = 4. One score per
    dimension explains the grade; its scale and the thresholds are shared by all responses.
    align-anything has no trainer that reads these columns.

    Args:
      scores: one per response and dimension.
      grades: in [0, K).
      thresholds: per dimension, see `ordered_thresholds`.
      mask: 0 where a dimension was not graded.

    Returns:
      The loss, and per-grade metrics ``loss``, ``accuracy`` (most likely grade) and
      ``absolute_error`` (of the expected grade).
    """
    scores = counted(scores, mask)
    kinds = thresholds.shape[-1] + 1
    logps = jax.vmap(ordinal_logps, in_axes=(1, 0), out_axes=1)(scores, thresholds)
    picked = jnp.where(mask != 0, grades, 0)
    taken = jnp.take_along_axis(logps, picked[..., None], -1)[..., 0]
    losses = ratio(-taken, mask)
    fixed = jax.lax.stop_gradient(logps)
    expected = jnp.sum(jnp.exp(fixed) * jnp.arange(kinds, dtype=jnp.float32)[None, None], -1)
    metrics = {
        "loss": losses,
        "accuracy": ratio((jnp.argmax(fixed, -1) == picked).astype(jnp.float32), mask),
        "absolute_error": ratio(jnp.abs(expected - picked.astype(jnp.float32)), mask),
    }
    return total_loss(losses), metrics
