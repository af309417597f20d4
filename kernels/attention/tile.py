"""The mathematics of one tile of scores, in plain jnp, keys down and queries across.

A tile is ``[S, T]``: with queries along the lanes everything that belongs to a query is a row
``[1, T]``, which vector units broadcast for free and reductions over keys produce directly. GPU
kernels also hold the transpose, keys along axis 1, and ``[T]`` for what belongs to a query.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float32, Int

HIDDEN = -1e30
"""Score of a hidden key: finite, so that queries without keys stay free of NaN."""


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
    top: Float32[Array, "*one T"],
    total: Float32[Array, "*one T"],
    scores: Float32[Array, "_ _"],
    seen: Bool[Array, "_ _"] | None,
    keys_axis: int = 0,
) -> tuple[Array, Array, Array, Array]:
    """Online softmax (Milakov & Gimelshein, 2018) over one more tile.

    ``top`` and ``total`` are [1, T], or [T] and the tile [T, S] with ``keys_axis`` 1. ``seen`` is
    None where everything is.

    Returns:
      (top, total, factor for what was accumulated so far, weights like the scores).
    """
    keep = top.ndim == 2
    if seen is not None:
        scores = jnp.where(seen, scores, HIDDEN)
    new = jnp.maximum(top, scores.max(keys_axis, keepdims=keep))
    factor = jnp.exp(top - new)
    shifted = scores - (new if keep else spread(new, scores.shape, 1 - keys_axis))
    weights = jnp.exp(shifted)
    if seen is not None:
        weights = jnp.where(seen, weights, 0.0)
    return new, total * factor + weights.sum(keys_axis, keepdims=keep), factor, weights


def softmax_end(
    top: Float32[Array, "*one T"], total: Float32[Array, "*one T"]
) -> tuple[Float32[Array, "*one T"], Float32[Array, "*one T"]]:
    """-> (factor that normalizes the accumulated values, log-sum-exp); no keys: (1, 0)."""
    safe = jnp.where(total > 0, total, 1.0)
    return 1.0 / safe, jnp.where(total > 0, top + jnp.log(safe), 0.0)


def weights_again(
    scores: Float32[Array, "S T"], lse: Float32[Array, "_ T"], seen: Bool[Array, "S T"] | None
) -> Float32[Array, "S T"]:
    """The probabilities, from the log-sum-exp of the forward pass; ``seen`` None: everything."""
    weights = jnp.exp(scores - lse)
    return weights if seen is None else jnp.where(seen, weights, 0.0)
