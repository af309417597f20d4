"""Attention in plain XLA: recomputing backward, dense when small, in tiles or blocks when large.

Forward keeps only the output and the log-sum-exp; backward forms the probabilities again
(FlashAttention, Dao et al. 2022), so nothing of size ``[T, S]`` outlives a layer.
Small scores are formed at once, larger ones tile by tile, without the tiles that nobody sees
(`tiled`). Where XLA must divide the loop over devices by itself, or an accelerator would have
nothing to skip, both directions run over all queries at once while ``[B, H, T, S]`` floats fit
`DENSE_BYTES`, and over blocks of queries under ``lax.scan`` beyond. Layouts are those that XLA's
CPU matmuls run without a transposed operand, which is worth a factor of two to four there.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from aa_jax.kernels.attention import tiled
from aa_jax.kernels.attention.intervals import nonempty, visible
from aa_jax.kernels.dispatch import divides, undivided
from aa_jax.platforms import target

DENSE_BYTES = 128 * 2**20
"""Scores up to this size, per device, are formed at once."""

BLOCK_BYTES = 64 * 2**20
"""Size of one block or tile of scores when they are not."""

TILED_ON_CPU = {"intervals": 256, "full": 512}
"""From so many queries and keys on, tiles are faster on a CPU: with the last, nothing is skipped,
but a tile stays in the cache."""

_HIDDEN = -1e30  # added to hidden scores: finite, so that rows without keys stay free of NaN
_WIDE_HEAD = 64


def attention(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B S K D"],
    v: Float[Array, "B S K D"],
    intervals: Int[Array, "_ T 4"] | None,
    scale: float,
    block: int | None = None,
    tiles: tiled.Tiles | None = None,
) -> Float[Array, "B T H D"]:
    """See `aa_jax.kernels.attention.api.attention`.

    Args:
      q: queries.
      k: keys.
      v: values.
      intervals: clipped to ``[0, S]``, leading axis B or 1; None for full attention.
      scale: multiplies the scores.
      block: queries per block, without tiles; None decides from the size of the scores.
      tiles: sizes of tiles; None decides.
    """
    rows, queries, heads, _ = q.shape
    alone = undivided()
    # On several devices a loop of its own for each, where the mesh says how.
    reason = divides(rows, k.shape[2], rows=tiled.ROWS, parts=tiled.HEADS)
    mesh = None if alone or reason else jax.sharding.get_abstract_mesh()
    if tiles is None and block is None and (alone or mesh is not None):
        tiles = tiles_for(q, k, intervals)
    if tiles is not None:
        return tiled.attention(q, k, v, intervals, scale, tiles, mesh)
    if block is None:
        per_query = max(rows * heads * k.shape[1] * 4 // _pieces(), 1)
        dense = per_query * queries <= DENSE_BYTES
        block = queries if dense else max(BLOCK_BYTES // per_query, 16)
    return _attention(q, k, v, intervals, scale, min(block, queries))


def tiles_for(
    q: Float[Array, "B T H D"], k: Float[Array, "B S K D"], intervals: Int[Array, "_ T 4"] | None
) -> tiled.Tiles | None:
    """Sizes of the tiles the scores are cut into, or None where tiles do not pay."""
    (rows, queries, heads, _), keys = q.shape, k.shape[1]
    if target.backend() == "cpu":
        shorter = min(queries, keys)
        if shorter < TILED_ON_CPU["full" if intervals is None else "intervals"]:
            return None
        most = 128 if shorter < 1024 else 256
        return tiled.Tiles(*(_even(length, most) for length in (queries, keys)))
    if intervals is None or 4 * rows * heads * queries * keys // _pieces() <= DENSE_BYTES:
        return None
    # As many bytes per step as a block has, in the shape that matmuls like better.
    scores = BLOCK_BYTES // (4 * heads)
    side = 2 ** int(math.log2(scores) / 2)
    return tiled.Tiles(min(side, 1024), min(2 * side, 1024))


def _even(length: int, most: int) -> int:
    """Side of nearly equal tiles that fill ``length``, a multiple of 4."""
    return 4 * math.ceil(length / math.ceil(length / most) / 4)


def _pieces() -> int:
    """Devices the rows and heads of the scores are divided over; CPU "devices" share one memory."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or target.backend() == "cpu":
        return 1
    axes = zip(mesh.axis_sizes, mesh.axis_types, strict=True)
    return math.prod(size for size, kind in axes if kind != jax.sharding.AxisType.Manual)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _attention(q, k, v, intervals, scale, block):
    return _forward(q, k, v, intervals, scale, block)[0]


def _fwd(q, k, v, intervals, scale, block):
    out, lse = _forward(q, k, v, intervals, scale, block)
    # Named so that a remat policy can keep these two and skip the second forward pass.
    out, lse = checkpoint_name(out, "attention_out"), checkpoint_name(lse, "attention_lse")
    return out, (q, k, v, intervals, out, lse)


def _forward(q, k, v, intervals, scale, block):
    """-> (out [B, T, H, D], lse [B, K, G, T, 1] or its blocks [n, B, K, G, block, 1])."""
    queries, kv_heads = q.shape[1], k.shape[2]
    if queries == 1 and q.shape[-1] >= _WIDE_HEAD:
        return _forward_one(q, k, v, intervals, scale)
    q, k, v = _without_hidden(q, k, v, intervals)
    kt, vt = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)

    def one(qb, ib):
        scores = _scores(_to_rows(qb, kv_heads), kt, ib, scale, qb.shape[1])
        weights, total, lse = _softmax_parts(scores, axis=-1)
        out = _dot("bkrs,bksd->bkrd", _fold(weights).astype(v.dtype), vt) / _fold(total)
        return _from_rows(out.astype(q.dtype), qb.shape[1]), lse

    if block == queries:
        return one(q, intervals)
    xs = _blocks(q, block), _blocks(intervals, block)
    _, (out, lse) = jax.lax.scan(lambda c, x: (c, one(*x)), None, xs)
    return _unblocks(out, queries), lse


def _forward_one(q, k, v, intervals, scale):
    """One query per row: a matrix-vector product, bound by reading the cache once.

    A batched matmul would first transpose the whole cache; products and sums fuse instead.
    """
    rows, _, heads, depth = q.shape
    keys, kv_heads = k.shape[1:3]
    qr = q.astype(jnp.float32).reshape(rows, 1, kv_heads, heads // kv_heads, depth)
    scores = scale * (qr * k.astype(jnp.float32)[:, :, :, None]).sum(-1)  # [B, S, K, G]
    if intervals is not None:
        mask = visible(intervals, keys)[:, 0, :, None, None]  # [B, S, 1, 1]
        scores = jnp.where(mask, scores, _HIDDEN)
        v = jnp.where(mask, v, 0)
    weights, total, lse = _softmax_parts(scores, axis=1)
    out = ((weights / total)[..., None] * v.astype(jnp.float32)[:, :, :, None]).sum(1)
    return out.reshape(q.shape).astype(q.dtype), lse[:, 0, :, :, None, None]


def _bwd(scale, block, residuals, dout):
    q, k, v, intervals, out, lse = residuals
    queries, kv_heads = q.shape[1], k.shape[2]
    q, k, v = _without_hidden(q, k, v, intervals)
    kt, vt = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)
    if intervals is not None:
        dout = jnp.where(nonempty(intervals)[:, :, None, None], dout, 0)

    def one(qb, ib, outb, lseb, doutb):
        qr, doutr = _to_rows(qb, kv_heads), _to_rows(doutb, kv_heads)
        delta = (doutr.astype(jnp.float32) * _to_rows(outb, kv_heads)).sum(-1, keepdims=True)
        weights = jnp.exp(_scores(qr, kt, ib, scale, qb.shape[1]) - lseb)
        dweights = _dot("bkrd,bksd->bkrs", doutr, vt).reshape(weights.shape)
        dscores = weights * (dweights - delta.reshape(lseb.shape)) * scale
        dscores = _fold(dscores).astype(q.dtype)
        dq = _dot("bkrs,bksd->bkrd", dscores, kt)
        # Written as [d, s]: the other order makes XLA's CPU matmul read a transposed [r, s].
        dk = _dot("bkrd,bkrs->bkds", qr, dscores)
        dv = _dot("bkrd,bkrs->bkds", doutr, _fold(weights).astype(q.dtype))
        return _from_rows(dq.astype(q.dtype), qb.shape[1]), dk, dv

    if block == queries:
        dq, dk, dv = one(q, intervals, out, lse, dout)
    else:

        def step(carry, x):
            dqb, dkb, dvb = one(*x)
            return (carry[0] + dkb, carry[1] + dvb), dqb

        zero = jnp.zeros((*kt.shape[:2], kt.shape[3], kt.shape[2]), jnp.float32)
        xs = _blocks(q, block), _blocks(intervals, block), _blocks(out, block), lse
        (dk, dv), dq = jax.lax.scan(step, (zero, zero), (*xs, _blocks(dout, block)))
        dq = _unblocks(dq, queries)
    dk, dv = (x.transpose(0, 3, 1, 2).astype(k.dtype) for x in (dk, dv))
    return dq, dk, dv, None


_attention.defvjp(_fwd, _bwd)

_dot = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


def _without_hidden(q, k, v, intervals):
    """Zeros where nobody looks: 0 * NaN is NaN, so masking the scores would come too late."""
    if intervals is None:
        return q, k, v
    seen = visible(intervals, k.shape[1]).any(1)[:, :, None, None]
    q = jnp.where(nonempty(intervals)[:, :, None, None], q, 0)
    return q, jnp.where(seen, k, 0), jnp.where(seen, v, 0)


def _scores(q, k, intervals, scale, queries):
    """Scaled scores [B, K, G, T, S] with hidden keys pushed to -1e30."""
    rows, kv_heads, folded, _ = q.shape
    keys = k.shape[2]
    scores = _dot("bkrd,bksd->bkrs", q, k) * scale
    scores = scores.reshape(rows, kv_heads, folded // queries, queries, keys)
    if intervals is None:
        return scores
    return scores + jnp.where(visible(intervals, keys), 0.0, _HIDDEN)[:, None, None]


def _softmax_parts(scores, axis):
    """-> (exp(scores - max), their sum, log-sum-exp); rows without keys: (0, 1, 0)."""
    # Not below half of _HIDDEN, or rows without keys would subtract it from itself.
    top = jnp.maximum(scores.max(axis, keepdims=True), 0.5 * _HIDDEN)
    weights = jnp.exp(scores - top)
    total = weights.sum(axis, keepdims=True)
    safe = jnp.where(total > 0, total, 1)
    return weights, safe, jnp.where(total > 0, top + jnp.log(safe), 0)


def _fold(x):
    """[B, K, G, T, S] -> [B, K, G·T, S]."""
    return x.reshape(*x.shape[:2], -1, x.shape[-1])


def _to_rows(x, kv_heads):
    """[B, T, H, D] -> [B, K, G·T, D]: the query heads of a group are more rows of one matmul."""
    rows, queries, heads, depth = x.shape
    group = heads // kv_heads
    x = x.reshape(rows, queries, kv_heads, group, depth).transpose(0, 2, 3, 1, 4)
    return x.reshape(rows, kv_heads, group * queries, depth)


def _from_rows(x, queries):
    """[B, K, G·T, D] -> [B, T, H, D]."""
    rows, kv_heads, folded, depth = x.shape
    x = x.reshape(rows, kv_heads, folded // queries, queries, depth).transpose(0, 3, 1, 2, 4)
    return x.reshape(rows, queries, -1, depth)


def _blocks(x, block):
    """[B, T, ...] -> [n, B, block, ...], padded with zeros: as intervals, rows without keys."""
    if x is None:
        return None
    rows, queries = x.shape[:2]
    count = -(-queries // block)
    x = jnp.pad(x, [(0, 0), (0, count * block - queries)] + [(0, 0)] * (x.ndim - 2))
    return jnp.moveaxis(x.reshape(rows, count, block, *x.shape[2:]), 1, 0)


def _unblocks(x, queries):
    """[n, B, block, ...] -> [B, T, ...]."""
    x = jnp.moveaxis(x, 0, 1)
    return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :queries]
