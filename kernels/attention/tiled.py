"""Attention in plain XLA over those tiles of scores in which anything is visible.

FlashAttention-2 (Dao, 2023, algorithms 1 and 2) as one loop whose number of steps is known at run
time only: a table says which tile comes next, and tiles that nobody sees are not visited, forward
nor backward. Forward keeps the output and the log-sum-exp. All heads of a row are one step. Keys
and values that no query of a tile sees are zeros in it, so what they hold does not matter.

XLA cannot divide a loop of that kind over devices: given a mesh, rows and heads are divided
explicitly and every device walks through its own tiles.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AbstractMesh, Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from aa_jax.kernels.attention import tile
from aa_jax.kernels.attention.intervals import nonempty, visible

ROWS, HEADS = ("data", "fsdp"), "tensor"
"""Mesh axes that divide the rows and the heads, as the library's own sharding rules do."""


class Tiles(NamedTuple):
    """Queries and keys of a tile."""

    queries: int
    keys: int


def attention(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B S K D"],
    v: Float[Array, "B S K D"],
    intervals: Int[Array, "_ T 4"] | None,
    scale: float,
    tiles: Tiles,
    mesh: Mesh | AbstractMesh | None = None,
) -> Float[Array, "B T H D"]:
    """See `aa_jax.kernels.attention.api.attention`.

    Args:
      q: queries.
      k: keys.
      v: values.
      intervals: clipped to ``[0, S]``, leading axis B or 1; None for full attention.
      scale: multiplies the scores.
      tiles: sizes of a tile, any positive numbers.
      mesh: divides the rows over `ROWS` and the heads over `HEADS`; None on one device.
    """
    queries, keys = q.shape[1], k.shape[1]
    tiles = Tiles(min(tiles.queries, queries), min(tiles.keys, keys))
    if intervals is not None:  # rows that share a mask are not faster together
        intervals = jnp.broadcast_to(intervals, (q.shape[0], queries, 4))
    return _attention(q, k, v, intervals, scale, tiles, mesh)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _attention(q, k, v, intervals, scale, tiles, mesh):
    return _fwd(q, k, v, intervals, scale, tiles, mesh)[0]


def _fwd(q, k, v, intervals, scale, tiles, mesh):
    run = functools.partial(_forward, scale=scale, tiles=tiles)
    if mesh is not None:
        run = _divided(run, mesh, (_SPEC, _SPEC, _SPEC, _MASK), (_SPEC, _LSE))
    out, lse = run(q, k, v, intervals)
    # Named so that a remat policy can keep these two and skip the second forward pass.
    out, lse = checkpoint_name(out, "attention_out"), checkpoint_name(lse, "attention_lse")
    return out, (q, k, v, intervals, out, lse)


def _bwd(scale, tiles, mesh, residuals, dout):
    run = functools.partial(_backward, scale=scale, tiles=tiles)
    if mesh is not None:
        arguments = _SPEC, _SPEC, _SPEC, _MASK, _SPEC, _LSE, _SPEC
        run = _divided(run, mesh, arguments, (_SPEC, _SPEC, _SPEC))
    return *run(*residuals, dout), None


_attention.defvjp(_fwd, _bwd)

_SPEC, _MASK, _LSE = P(ROWS, None, HEADS), P(ROWS), P(ROWS, HEADS)


def _divided(function, mesh, specs, outs):
    return jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=outs, check_vma=False)


_dot = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


def _forward(q, k, v, intervals, *, scale, tiles):
    """-> (out [B, T, H, D], lse [B·I, K, G, queries of a tile, 1])."""
    cut = _Cut(q, k, intervals, tiles)
    qs, ks, vs = cut.queries(_without_empty(q, intervals)), cut.keys(k), cut.keys(v)
    lines = (*qs.shape[:2], cut.group, cut.tiles.queries, 1)

    def step(carry, i, j, seen):
        acc, top, total = (_at(x, i) for x in carry)
        keys, values = _seen_by_any(seen, _at(ks, j), _at(vs, j))
        scores = cut.unfold(_dot("krd,ksd->krs", _at(qs, i), keys)) * scale
        if seen is not None:
            scores = jnp.where(seen, scores, tile.HIDDEN)
        new = jnp.maximum(top, scores.max(-1, keepdims=True))
        weights, factor = jnp.exp(scores - new), jnp.exp(top - new)
        total = total * factor + weights.sum(-1, keepdims=True)
        acc = acc * cut.fold(factor)
        acc = acc + _dot("krs,ksd->krd", cut.fold(weights).astype(v.dtype), values)
        return tuple(_put(x, y, i) for x, y in zip(carry, (acc, new, total), strict=True))

    # Not below half of HIDDEN, or queries that see nothing would subtract it from itself.
    lowest = jnp.full(lines, 0.5 * tile.HIDDEN, jnp.float32)
    start = jnp.zeros(qs.shape, jnp.float32), lowest, jnp.zeros(lines, jnp.float32)
    acc, top, total = cut.visit(step, start)
    safe = jnp.where(total > 0, total, 1)
    out = acc / safe.reshape(*acc.shape[:3], 1)
    return cut.join_queries(out).astype(q.dtype), jnp.where(total > 0, top + jnp.log(safe), 0)


def _backward(q, k, v, intervals, out, lse, dout, *, scale, tiles):
    """-> gradients of q, k and v."""
    cut = _Cut(q, k, intervals, tiles)
    q, dout = _without_empty(q, intervals), _without_empty(dout, intervals)
    delta = (dout.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1, keepdims=True)
    qs, ks, vs, douts, deltas = (
        cut.queries(q), cut.keys(k), cut.keys(v), cut.queries(dout), cut.queries(delta)
    )  # fmt: skip

    def step(carry, i, j, seen):
        dq, dk, dv = carry
        rows, drows = _at(qs, i), _at(douts, i)
        keys, values = _seen_by_any(seen, _at(ks, j), _at(vs, j))
        scores = cut.unfold(_dot("krd,ksd->krs", rows, keys)) * scale
        weights = jnp.exp(scores - _at(lse, i))
        weights = cut.fold(weights if seen is None else jnp.where(seen, weights, 0))
        dscores = weights * (_dot("krd,ksd->krs", drows, values) - _at(deltas, i)) * scale
        dscores, weights = dscores.astype(q.dtype), weights.astype(q.dtype)
        dq = _add(dq, _dot("krs,ksd->krd", dscores, keys), i)
        # Written as [d, s]: the other order makes XLA's CPU matmul read a transposed [r, s].
        dk = _add(dk, _dot("krd,krs->kds", rows, dscores), j)
        return dq, dk, _add(dv, _dot("krd,krs->kds", drows, weights), j)

    zero = jnp.zeros((*ks.shape[:2], ks.shape[3], ks.shape[2]), jnp.float32)
    dq, dk, dv = cut.visit(step, (jnp.zeros(qs.shape, jnp.float32), zero, zero))
    return cut.join_queries(dq).astype(q.dtype), *(cut.join_keys(x, k.dtype) for x in (dk, dv))


class _Cut:
    """How arrays are cut into tiles, and the way through those in which anything is visible.

    ``I`` tiles of queries and ``J`` of keys per row, ``G`` query heads per key head. Tiles are
    [B·I, K, G·queries, D] and [B·J, K, keys, D].
    """

    def __init__(self, q, k, intervals, tiles):
        self.rows, self.length, self.heads, _ = q.shape
        self.key_length, self.kv_heads = k.shape[1:3]
        self.group = self.heads // self.kv_heads
        self.tiles, self.intervals = tiles, intervals
        self.across, self.down = -(-self.length // tiles.queries), -(-self.key_length // tiles.keys)

    def queries(self, x: Float[Array, "B T H D"]) -> Float[Array, "BI K r D"]:
        """Tiles of queries; what is added at the end sees nothing."""
        shape = -1, self.tiles.queries, self.kv_heads, self.group, x.shape[-1]
        x = _pad(x, self.tiles.queries).reshape(shape).transpose(0, 2, 3, 1, 4)
        return x.reshape(*x.shape[:2], -1, x.shape[-1])

    def join_queries(self, x: Float[Array, "BI K r D"]) -> Float[Array, "B T H D"]:
        """The inverse of `queries`."""
        x = x.reshape(-1, self.kv_heads, self.group, self.tiles.queries, x.shape[-1])
        x = x.transpose(0, 3, 1, 2, 4).reshape(self.rows, -1, self.heads, x.shape[-1])
        return x[:, : self.length]

    def keys(self, x: Float[Array, "B S K D"]) -> Float[Array, "BJ K s D"]:
        """Tiles of keys or values."""
        x = _pad(x, self.tiles.keys).reshape(-1, self.tiles.keys, *x.shape[2:])
        return x.transpose(0, 2, 1, 3)

    def join_keys(self, x: Float[Array, "BJ K D s"], dtype: Any) -> Float[Array, "B S K D"]:
        """The inverse of `keys` for gradients, whose matrices are transposed."""
        x = x.transpose(0, 3, 1, 2).reshape(self.rows, -1, *x.shape[1:3])
        return x[:, : self.key_length].astype(dtype)

    def fold(self, x):
        """[K, G, queries, ...] -> [K, G·queries, ...]."""
        return x.reshape(self.kv_heads, -1, x.shape[-1])

    def unfold(self, x):
        """The inverse of `fold`."""
        return x.reshape(self.kv_heads, self.group, self.tiles.queries, x.shape[-1])

    def visit(self, step: Callable, carry: Any) -> Any:
        """``step(carry, query tile, key tile, mask [queries, keys] or None)`` where needed."""
        steps, limits = self.rows * self.across * self.down, self.intervals
        if limits is None and self.key_length % self.tiles.keys:  # nobody sees the added keys
            limits = jnp.array([0, 0, 0, self.key_length], jnp.int32)
            limits = jnp.broadcast_to(limits, (self.rows, self.length, 4))
        live = jnp.ones((steps,), bool)
        if limits is not None:
            limits = _pad(limits, self.tiles.queries)
            padded = self.down * self.tiles.keys
            live = tile.touched(limits, self.tiles.queries, padded, self.tiles.keys).reshape(-1)
            limits = limits.reshape(-1, self.tiles.queries, 4)
        following = _next(live)

        def body(state):
            number, carry = state
            i, j = jax.lax.div(number, self.down), jax.lax.rem(number, self.down)
            row, seen = jax.lax.div(i, self.across), None
            if limits is not None:
                seen = visible((_at(limits, i) - j * self.tiles.keys)[None], self.tiles.keys)[0]
            return _at(following, number + 1), step(carry, i, row * self.down + j, seen)

        start = _at(following, 0), carry
        with jax.named_scope(at_most(steps)):
            return jax.lax.while_loop(lambda state: state[0] < steps, body, start)[1]


def at_most(rounds: int) -> str:
    """The name of a scope around a loop whose number of rounds is found at run time: whoever counts
    arithmetic (`aa_jax.training.flops`) takes this many."""
    return f"at_most_{rounds}"


def _next(live: Bool[Array, "L"]) -> Int[Array, "L+1"]:
    """The first live tile at or after each; L where there is none."""
    number = jnp.arange(live.shape[0], dtype=jnp.int32)
    found = jax.lax.cummin(jnp.where(live, number, live.shape[0]), reverse=True)
    return jnp.pad(found, (0, 1), constant_values=live.shape[0])


def _without_empty(x, intervals):
    """Zeros for queries that see nothing: 0 * NaN is NaN."""
    return x if intervals is None else jnp.where(nonempty(intervals)[:, :, None, None], x, 0)


def _seen_by_any(seen, keys, values):
    """Zeros for keys that no query of the tile sees."""
    if seen is None:
        return keys, values
    used = seen.any(0)[None, :, None]
    return jnp.where(used, keys, 0), jnp.where(used, values, 0)


def _pad(x, multiple):
    """Whole tiles along axis 1; zeros, which as intervals see nothing."""
    return jnp.pad(x, [(0, 0), (0, -x.shape[1] % multiple)] + [(0, 0)] * (x.ndim - 2))


def _at(x, i):
    return jax.lax.dynamic_index_in_dim(x, i, 0, keepdims=False)


def _put(x, y, i):
    return jax.lax.dynamic_update_index_in_dim(x, y, i, 0)


def _add(x, y, i):
    return _put(x, _at(x, i) + y, i)
