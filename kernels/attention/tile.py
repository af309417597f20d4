"""The mathematics of one tile of scores, in plain jnp.

A tile is ``[T, S]``, queries down, or for the gradients of keys and values ``[S, T]``. What a
query has is ``[T]`` in GPU kernels; on TPUs ``[T, 128]``, the same in every lane, or ``[1, T]``.
Scores are the plain products: the scale comes with the exponential, and is positive.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float32, Int

HIDDEN = -1e30
"""Score of a hidden key: finite, so that queries without keys stay free of NaN."""

LOWEST = 0.5 * HIDDEN
"""Where a maximum starts: so far above `HIDDEN` that hidden keys weigh exactly nothing, also for
queries that see none."""

LOG2E = 1.4426950408889634


def positive(q: Array, scale: float) -> tuple[Array, float]:
    """The same scores with a positive scale, so that the largest product is the largest score."""
    if scale == 0:
        return jnp.zeros_like(q), 1.0
    return (q, scale) if scale > 0 else (-q, -scale)


def power(scores: Array, scale: float) -> Array:
    """``exp(scale * scores)``: powers of two, as chips compute them, take one product less."""
    return jnp.exp2(scores * (scale * LOG2E))


def visible(
    intervals: Int[Array, "4 T"], first_key: Int[Array, ""] | int, keys: int
) -> Bool[Array, "S T"]:
    """Which of the keys ``first_key ...`` each query sees."""
    shape = keys, intervals.shape[1]
    s = jax.lax.broadcasted_iota(jnp.int32, shape, 0) + first_key
    return within(s, *(jnp.broadcast_to(intervals[i : i + 1], shape) for i in range(4)))


def within(s: Array, a0: Array, a1: Array, b0: Array, b1: Array) -> Bool[Array, "..."]:
    """Whether key ``s`` lies in one of the two intervals, entry by entry."""
    return ((s >= a0) & (s < a1)) | ((s >= b0) & (s < b1))


def spread(values: Array, shape: tuple[int, int], axis: int) -> Array:
    """``values`` along ``axis`` of a tile, the same along the other."""
    return jax.lax.broadcast_in_dim(values, shape, (axis,))


def touched(
    intervals: Int[Array, "R T 4"], queries: int, keys: int, key_tile: int
) -> Bool[Array, "R I J"]:
    """Whether any query of a tile of ``queries`` may see any key of a tile of ``key_tile``.

    Compares every query's two intervals with the tiles, so nothing a tile skips was visible and
    tiles between two intervals are skipped too.
    """
    rows, total, _ = intervals.shape
    first = jnp.arange(0, keys, key_tile, dtype=jnp.int32)
    bounds = intervals[:, :, None]  # [R, T, 1, 4]
    after = jnp.minimum(bounds[..., 1::2], (first + key_tile)[None, None, :, None])
    before = jnp.maximum(bounds[..., 0::2], first[None, None, :, None])
    any_key = (after > before).any(-1)
    return any_key.reshape(rows, total // queries, queries, -1).any(2)


def covered(
    intervals: Int[Array, "R T 4"], queries: int, keys: int, key_tile: int
) -> Bool[Array, "R I J"]:
    """Whether every query of a tile sees all of a tile's keys, in one of its two intervals."""
    rows, total, _ = intervals.shape
    first = jnp.arange(0, keys, key_tile, dtype=jnp.int32)[None, None, :, None]
    bounds = intervals[:, :, None]
    inside = (bounds[..., 0::2] <= first) & (bounds[..., 1::2] >= first + key_tile)
    return inside.any(-1).reshape(rows, total // queries, queries, -1).all(2)


def softmax_step(
    top: Float32[Array, "T"],
    total: Float32[Array, "T"],
    scores: Float32[Array, "T S"],
    seen: Bool[Array, "T S"],
    scale: float,
) -> tuple[Array, Array, Array, Array]:
    """Online softmax (Milakov & Gimelshein, 2018) over one more tile of unscaled scores.

    ``top`` starts at `LOWEST`; the TPU kernel takes the same steps between its own memory.

    Returns:
      (top, total, factor for what was accumulated so far, weights like the scores).
    """
    scores = jnp.where(seen, scores, HIDDEN)
    new = jnp.maximum(top, scores.max(1))
    factor = power(top - new, scale)
    weights = power(scores - spread(new, scores.shape, 0), scale)
    return new, total * factor + weights.sum(1), factor, weights


def softmax_end(
    top: Float32[Array, "..."], total: Float32[Array, "..."], scale: float
) -> tuple[Float32[Array, "..."], Float32[Array, "..."]]:
    """-> (factor that normalizes the accumulated values, log-sum-exp); no keys: (1, 0)."""
    safe = jnp.where(total > 0, total, 1.0)
    return 1.0 / safe, jnp.where(total > 0, scale * top + jnp.log(safe), 0.0)


def weights_again(
    scores: Float32[Array, "_ _"],
    log2_sum: Float32[Array, "_ _"],
    seen: Bool[Array, "_ _"] | None,
    scale: float,
) -> Float32[Array, "_ _"]:
    """The probabilities of unscaled scores, from the log-sum-exp of the forward pass times `LOG2E`;
    ``seen`` None: nothing is hidden, or is so already.
    """
    weights = jnp.exp2(scores * (scale * LOG2E) - log2_sum)
    return weights if seen is None else jnp.where(seen, weights, 0.0)
