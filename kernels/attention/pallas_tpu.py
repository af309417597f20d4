"""FlashAttention with two key intervals per query as Mosaic kernels for TPUs.

Three kernels (Dao, "FlashAttention-2", 2023, algorithms 1 and 2): forward over (query tile, key
tile), the gradient of the queries likewise, and the gradient of keys and values over (key tile,
query head of the group and query tile), so that nothing is accumulated in memory. A table of the
tiles in which anything is visible is computed beforehand; the others fetch and compute nothing,
and those in which everything is visible compare nothing.

A tile is computed in two halves, which overlap: matrix units work on one while vector units are
busy with the other. Scores are written to vector memory between two uses: registers that hold them
until the maximum of a row is known are registers the compiler has to spill. Queries lie down the
rows, so that no product needs a transpose, and what belongs to a query is held in every lane of its
row; in the last kernel it is keys that lie down the rows.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from aa_jax.kernels import tuning
from aa_jax.kernels.attention import tile
from aa_jax.kernels.attention.intervals import nonempty
from aa_jax.kernels.attention.intervals import visible as dense

_LANES = 128  # width of a vector register


class Sizes(NamedTuple):
    """Tile sizes, multiples of 128: queries and keys."""

    queries: int
    keys: int


def attention(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B S K D"],
    v: Float[Array, "B S K D"],
    intervals: Int[Array, "_ T 4"] | None,
    scale: float,
    sizes: Sizes | None = None,
    interpret=False,
) -> Float[Array, "B T H D"]:
    """See `aa_jax.kernels.attention.api.attention`; ``interpret`` as in ``pallas_call``.

    ``sizes`` None: those of `aa_jax.kernels.tuning`.
    """
    q, scale = tile.positive(q, scale)
    queries, keys = q.shape[1], k.shape[1]
    sizes = sizes or Sizes(*tuning.sizes("attention", q.dtype, q.shape[3]))
    tiles = Sizes(_fit(sizes.queries, queries), _fit(sizes.keys, keys))
    if intervals is None:
        intervals = jnp.tile(jnp.array([0, 0, 0, keys], jnp.int32), (1, queries, 1))
    # 0 * NaN is NaN: what nobody sees is removed before it can meet a zero.
    seen = dense(intervals, keys).any(1)[:, :, None, None]
    q = jnp.where(nonempty(intervals)[:, :, None, None], q, 0)
    k, v = jnp.where(seen, k, 0), jnp.where(seen, v, 0)
    q, k, v = (x.transpose(0, 2, 1, 3) for x in (q, k, v))
    q, intervals = _pad(q, 2, tiles.queries), _pad(intervals, 1, tiles.queries)
    k, v = _pad(k, 2, tiles.keys), _pad(v, 2, tiles.keys)
    out = _attention(q, k, v, intervals, scale, tiles, interpret)
    return out[:, :, :queries].transpose(0, 2, 1, 3)


def _fit(most, length):
    return min(most, -(-length // 128) * 128)


def _pad(x, axis, multiple):
    widths = [(0, 0)] * x.ndim
    widths[axis] = 0, -x.shape[axis] % multiple
    return jnp.pad(x, widths)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _attention(q, k, v, intervals, scale, tiles, interpret):
    return _fwd(q, k, v, intervals, scale, tiles, interpret)[0]


def _fwd(q, k, v, intervals, scale, tiles, interpret):
    plan = _Plan(q, k, intervals, tiles)
    out, lse = plan.call(
        functools.partial(_forward_kernel, scale=scale),
        "attention_forward",
        inputs=[(q, "q"), (k, "k"), (v, "k"), (plan.intervals, "i")],
        outputs=[(q, "q"), (plan.row, "r")],
        scratch=[plan.bounds(), *[plan.column()] * 2, plan.matrix(), plan.scores()],
        interpret=interpret,
    )
    out, lse = checkpoint_name(out, "attention_out"), checkpoint_name(lse, "attention_lse")
    return out, (q, k, v, intervals, out, lse)


def _bwd(scale, tiles, interpret, residuals, dout):
    q, k, v, intervals, out, lse = residuals
    plan = _Plan(q, k, intervals, tiles)
    dout = jnp.where(nonempty(intervals)[:, None, :, None], dout, 0)
    delta = (dout.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1)[:, :, None]
    lse = lse * tile.LOG2E
    inputs = [
        (q, "q"), (k, "k"), (v, "k"), (dout, "q"), (lse, "r"), (delta, "r"), (plan.intervals, "i"),
    ]  # fmt: skip
    (dq,) = plan.call(
        functools.partial(_dq_kernel, scale=scale),
        "attention_dq",
        inputs=inputs,
        outputs=[(q, "q")],
        scratch=[plan.bounds(), *[plan.column()] * 2, plan.matrix(), *[plan.scores()] * 2],
        interpret=interpret,
    )
    dk, dv = plan.call(
        functools.partial(_dkv_kernel, scale=scale),
        "attention_dkv",
        inputs=inputs,
        outputs=[(k, "k"), (v, "k")],
        scratch=[plan.matrix(by_keys=True)] * 2 + [plan.scores(by_keys=True)] * 2,
        interpret=interpret,
        by_keys=True,
    )
    return dq, dk, dv, None


_attention.defvjp(_fwd, _bwd)


class _Plan:
    """Grids, block specs and the table of tiles, for arrays [B, heads, length, D]."""

    def __init__(self, q, k, intervals, tiles):
        self.rows, heads, queries, depth = q.shape
        self.kv_heads, keys = k.shape[1:3]
        self.group, self.heads = heads // self.kv_heads, heads
        self.tiles, self.depth = tiles, depth
        self.across, self.down = queries // tiles.queries, keys // tiles.keys
        self.shared = intervals.shape[0] == 1
        self.intervals = intervals.transpose(0, 2, 1)
        self.row = jax.ShapeDtypeStruct((self.rows, heads, 1, queries), jnp.float32)
        where = intervals, tiles.queries, keys, tiles.keys
        # How a tile is computed: 0 not at all, 1 with its mask, 2 without.
        self.ways = tile.touched(*where).astype(jnp.int32) + tile.covered(*where)
        # What is skipped is known at run time only: the estimate is of everything.
        self.cost = pl.CostEstimate(
            flops=4 * self.rows * heads * queries * keys * depth,
            transcendentals=self.rows * heads * queries * keys,
            bytes_accessed=2 * (q.nbytes + 2 * k.nbytes),
        )

    def column(self):
        """Memory for a number per query of a tile, in every lane of its row."""
        return pltpu.VMEM((self.tiles.queries, _LANES), jnp.float32)

    def bounds(self):
        """The same for the limits of the intervals."""
        return pltpu.VMEM((4, self.tiles.queries, _LANES), jnp.int32)

    def matrix(self, by_keys=False):
        """Memory for what is summed up for a tile of queries, or of keys."""
        return pltpu.VMEM((self.tiles[by_keys], self.depth), jnp.float32)

    def scores(self, by_keys=False):
        """Memory for the scores of a tile."""
        shape = self.tiles[::-1] if by_keys else self.tiles
        return pltpu.VMEM(tuple(shape), jnp.float32)

    def call(self, kernel, name, *, inputs, outputs, scratch, interpret, by_keys=False):
        """Runs a kernel over the tiles, keys inside or (``by_keys``) queries inside."""
        ways = self.ways.swapaxes(1, 2) if by_keys else self.ways
        steps = ways.shape[2]
        # A skipped step names the tile of the last one that was not: nothing is fetched for it.
        index = jnp.where(ways > 0, jnp.arange(steps, dtype=jnp.int32)[None, None], 0)
        fetch = jax.lax.cummax(index, axis=2)
        inner = steps * (self.group if by_keys else 1)
        outer = self.down if by_keys else self.across

        def place(ref, b, o, n):
            return ref[((0 if self.shared else b) * outer + o) * steps + _split(n, steps)[1]]

        def where(kind):
            def index_map(b, h, o, n, ways, fetch):
                if by_keys:
                    head, kv_head = h * self.group + _split(n, steps)[0], h
                else:
                    head, kv_head = h, _split(h, self.group)[0]
                moving = place(fetch, b, o, n)
                i, j = (moving, o) if by_keys else (o, moving)
                return {
                    "q": (b, head, i, 0),
                    "k": (b, kv_head, j, 0),
                    "r": (b, head, 0, i),
                    "i": (0 if self.shared else b, 0, i),
                }[kind]

            shape = {
                "q": (1, 1, self.tiles.queries, self.depth),
                "k": (1, 1, self.tiles.keys, self.depth),
                "r": (1, 1, 1, self.tiles.queries),
                "i": (1, 4, self.tiles.queries),
            }[kind]
            return pl.BlockSpec(shape, index_map)

        def body(ways, fetch, *refs):
            b, o, n = pl.program_id(0), pl.program_id(2), pl.program_id(3)
            first_key = (o if by_keys else n) * self.tiles.keys
            kernel(place(ways, b, o, n), n == 0, n == inner - 1, first_key, *refs)

        return pl.pallas_call(
            body,
            out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x, _ in outputs],
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=2,
                grid=(self.rows, self.kv_heads if by_keys else self.heads, outer, inner),
                in_specs=[where(kind) for _, kind in inputs],
                out_specs=[where(kind) for _, kind in outputs],
                scratch_shapes=scratch,
            ),
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel", "parallel", "parallel", "arbitrary")
            ),
            cost_estimate=self.cost,
            interpret=interpret,
            name=name,
        )(ways.reshape(-1), fetch.reshape(-1), *(x for x, _ in inputs))


def _split(number, size):
    """Quotient and remainder; ``//`` asks for a sign, which not every TPU computes alike."""
    size = np.int32(size)
    return jax.lax.div(number, size), jax.lax.rem(number, size)


def _dot(a, b, contract):
    """``a`` and ``b`` contracted over one axis each, accumulated in float32."""
    return jax.lax.dot_general(
        a,
        b,
        (((contract[0],), (contract[1],)), ((), ())),
        preferred_element_type=jnp.float32,
        precision=jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None,
    )


def _either_way(way, seen, step):
    """``step(seen)``, or ``step(None)`` where everything is visible."""

    @pl.when(way == 1)
    def _():
        step(seen)

    @pl.when(way == 2)
    def _():
        step(None)


def _hide(scores, seen, at):
    return scores if seen is None else jnp.where(seen(at), scores, tile.HIDDEN)


def _halves(rows):
    half = -(-rows // 256) * 128
    return [slice(0, half), slice(half, rows)] if half < rows else [slice(0, rows)]


def _columns(row):
    """[1, T] -> [T, 128], in every lane the same."""
    return jnp.broadcast_to(row, (_LANES, row.shape[1])).T


def _across(column, width):
    """The values of `_columns` in ``width`` lanes."""
    return jnp.tile(column, (1, -(-width // _LANES)))[:, :width]


def _seen_by(bounds, first_key, keys):
    """Mask of a strip of queries, from the columns of their intervals."""

    def seen(at):
        limits = [_across(bounds[n, at, :], keys) for n in range(4)]
        s = jax.lax.broadcasted_iota(jnp.int32, limits[0].shape, 1) + first_key
        return tile.within(s, *limits)

    return seen


def _forward_kernel(
    way, first, last, first_key, q, k, v, intervals, out, lse,
    bounds, top, total, acc, scores, *, scale,
):  # fmt: skip
    keys, depth = k.shape[2:]

    @pl.when(first)
    def _():
        for n in range(4):
            bounds[n] = _columns(intervals[0, n : n + 1])
        top[...] = jnp.full_like(top, tile.LOWEST)
        total[...] = jnp.zeros_like(total)
        acc[...] = jnp.zeros_like(acc)

    def step(seen):
        for at in _halves(q.shape[2]):
            found = _hide(_dot(q[0, 0, at, :], k[0, 0], (1, 1)), seen, at)
            scores[at, :] = found
            new = jnp.maximum(top[at, :], found.max(1, keepdims=True))
            factor = tile.power(top[at, :] - new, scale)
            top[at, :] = new
            weights = tile.power(scores[at, :] - _across(new, keys), scale)
            sums = sum(weights[:, n : n + _LANES] for n in range(0, keys, _LANES))
            total[at, :] = total[at, :] * factor + sums
            more = _dot(weights.astype(v.dtype), v[0, 0], (1, 0))
            acc[at, :] = acc[at, :] * _across(factor, depth) + more

    _either_way(way, _seen_by(bounds, first_key, keys), step)

    @pl.when(last)
    def _():
        sums = jnp.broadcast_to(total[...].sum(1, keepdims=True), total.shape)
        norm, log_sum = tile.softmax_end(top[...], sums, scale)
        out[0, 0] = (acc[...] * _across(norm, depth)).astype(out.dtype)
        lse[0, 0] = log_sum.T[:1]


def _dq_kernel(
    way, first, last, first_key, q, k, v, dout, lse, delta, intervals, dq,
    bounds, sums, deltas, acc, scores, dscores, *, scale,
):  # fmt: skip
    keys = k.shape[2]

    @pl.when(first)
    def _():
        for n in range(4):
            bounds[n] = _columns(intervals[0, n : n + 1])
        sums[...], deltas[...] = _columns(lse[0, 0]), _columns(delta[0, 0])
        acc[...] = jnp.zeros_like(acc)

    def step(seen):
        for at in _halves(q.shape[2]):
            scores[at, :] = _hide(_dot(q[0, 0, at, :], k[0, 0], (1, 1)), seen, at)
            dscores[at, :] = _dot(dout[0, 0, at, :], v[0, 0], (1, 1))
            weights = tile.weights_again(scores[at, :], _across(sums[at, :], keys), None, scale)
            got = weights * (dscores[at, :] - _across(deltas[at, :], keys))
            acc[at, :] += _dot(got.astype(k.dtype), k[0, 0], (1, 0))

    _either_way(way, _seen_by(bounds, first_key, keys), step)

    @pl.when(last)
    def _():
        dq[0, 0] = (acc[...] * scale).astype(dq.dtype)


def _dkv_kernel(
    way, first, last, first_key, q, k, v, dout, lse, delta, intervals, dk, dv,
    dk_acc, dv_acc, scores, dscores, *, scale,
):  # fmt: skip
    @pl.when(first)
    def _():
        dk_acc[...] = jnp.zeros_like(dk_acc)
        dv_acc[...] = jnp.zeros_like(dv_acc)

    def seen(at):
        return tile.visible(intervals[0], first_key + at.start, at.stop - at.start)

    def step(seen):
        for at in _halves(k.shape[2]):
            scores[at, :] = _hide(_dot(k[0, 0, at, :], q[0, 0], (1, 1)), seen, at)
            dscores[at, :] = _dot(v[0, 0, at, :], dout[0, 0], (1, 1))
            weights = tile.weights_again(scores[at, :], lse[0, 0], None, scale)
            scores[at, :] = weights
            dv_acc[at, :] += _dot(weights.astype(q.dtype), dout[0, 0], (1, 0))
            got = scores[at, :] * (dscores[at, :] - delta[0, 0])
            dk_acc[at, :] += _dot(got.astype(q.dtype), q[0, 0], (1, 0))

    _either_way(way, seen, step)

    @pl.when(last)
    def _():
        dk[0, 0], dv[0, 0] = (dk_acc[...] * scale).astype(dk.dtype), dv_acc[...].astype(dv.dtype)
