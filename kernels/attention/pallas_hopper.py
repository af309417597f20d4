"""FlashAttention with two key intervals per query as Mosaic kernels for Hopper GPUs.

Three kernels as on TPUs (Dao, "FlashAttention-2", 2023, algorithms 1 and 2): forward and the
gradient of the queries go over the keys, the gradient of keys and values over the query heads of
its group and their queries, so that nothing is accumulated in memory. In each, one warpgroup
fetches with the TMA engine and two multiply with ``wgmma``, 64 rows each. A table computed before
lists the tiles in which anything is visible; the others are neither fetched nor computed.

Compiled for an H200 and never executed: no GPU was at hand. ``impl="auto"`` does not take it.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from aa_jax.kernels import hopper
from aa_jax.kernels.attention import tile
from aa_jax.kernels.attention.intervals import nonempty
from aa_jax.kernels.attention.intervals import visible as dense

_COMPUTE = 2  # warpgroups that multiply
_ROWS = 64  # queries or keys of each of them


class Sizes(NamedTuple):
    """Keys per step forward, keys or queries per step backward, and fetches in flight."""

    forward: int = 128
    backward: int = 64
    stages: int = 2


SIZES = Sizes()


def attention(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B S K D"],
    v: Float[Array, "B S K D"],
    intervals: Int[Array, "_ T 4"] | None,
    scale: float,
    sizes: Sizes = SIZES,
    interpret=None,
) -> Float[Array, "B T H D"]:
    """See `aa_jax.kernels.attention.api.attention`; ``interpret`` as in ``plgpu.kernel``."""
    q, scale = tile.positive(q, scale)
    queries, keys = q.shape[1], k.shape[1]
    if intervals is None:
        intervals = jnp.tile(jnp.array([0, 0, 0, keys], jnp.int32), (1, queries, 1))
    # 0 * NaN is NaN: what nobody sees is removed before it can meet a zero.
    seen = dense(intervals, keys).any(1)[:, :, None, None]
    q = jnp.where(nonempty(intervals)[:, :, None, None], q, 0)
    k, v = jnp.where(seen, k, 0), jnp.where(seen, v, 0)
    q, k, v, intervals = (_pad(x) for x in (q, k, v, intervals))
    return _attention(q, k, v, intervals, scale, sizes, interpret)[:, :queries]


def _pad(x):
    """Whole tiles along axis 1."""
    return jnp.pad(x, [(0, 0), (0, -x.shape[1] % (_COMPUTE * _ROWS))] + [(0, 0)] * (x.ndim - 2))


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _attention(q, k, v, intervals, scale, sizes, interpret):
    return _fwd(q, k, v, intervals, scale, sizes, interpret)[0]


def _fwd(q, k, v, intervals, scale, sizes, interpret):
    out, lse = _forward(q, k, v, intervals, scale, sizes, interpret)
    out, lse = checkpoint_name(out, "attention_out"), checkpoint_name(lse, "attention_lse")
    return out, (q, k, v, intervals, out, lse)


def _bwd(scale, sizes, interpret, residuals, dout):
    q, k, v, intervals, out, lse = residuals
    dout = jnp.where(nonempty(intervals)[:, :, None, None], dout, 0)
    delta = jnp.einsum("bthd,bthd->bht", dout.astype(jnp.float32), out.astype(jnp.float32))
    inputs = q, k, v, dout, lse * tile.LOG2E, delta, intervals, scale, sizes, interpret
    return _dq(*inputs), *_dkv(*inputs), None


_attention.defvjp(_fwd, _bwd)


class _Plan:
    """What the three kernels share: who computes which tile, and the table of tiles.

    ``held`` are the rows every warpgroup holds, queries or keys; ``width`` of the others are
    streamed at a time.
    """

    def __init__(self, q, k, intervals, held, width, sizes, interpret):
        self.rows, self.queries, self.heads, self.depth = q.shape
        self.keys, self.kv_heads = k.shape[1:3]
        self.group = self.heads // self.kv_heads
        self.dtype, self.width, self.stages, self.interpret = (
            q.dtype,
            width,
            sizes.stages,
            interpret,
        )
        self.shared = intervals.shape[0] == 1
        self.by_keys = held == "keys"
        block = _COMPUTE * _ROWS
        if self.by_keys:
            touched = tile.touched(intervals, width, self.keys, block).swapaxes(1, 2)
        else:
            touched = tile.touched(intervals, block, self.keys, width)
        # The tiles in which anything is visible first, and how many they are.
        order = jnp.argsort(~touched, axis=2, stable=True).astype(jnp.int32)
        self.tables = order, touched.sum(2, dtype=jnp.int32)
        self.grid = (
            self.kv_heads if self.by_keys else self.heads,
            (self.keys if self.by_keys else self.queries) // block,
            self.rows,
        )
        self.transforms = hopper.transforms(self.depth)
        self.matrix = plgpu.SMEM((_COMPUTE, _ROWS, self.depth), q.dtype, transforms=self.transforms)
        self.line = plgpu.SMEM((_COMPUTE, _ROWS), jnp.float32)

    def call(self, body, name, operands, out, scratch, loads):
        """Runs ``body(place, *refs of operands, *refs of out, *scratch, barrier)``."""
        tables = self.tables

        def entry(*refs):
            count, order, *refs = refs[1], refs[0], *refs[2:]
            body(_Place(self, order, count), *refs)

        return plgpu.kernel(
            entry,
            out_type=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in out],
            scratch_types=[
                *scratch, plgpu.Barrier(num_barriers=_COMPUTE, num_arrivals=loads)
            ],
            grid=self.grid,
            grid_names=("heads", "tiles", "rows"),
            num_threads=_COMPUTE + 1,
            thread_name="group",
            kernel_name=name,
            interpret=self.interpret,
            compiler_params=hopper.compiler_params(approx_math=True),
        )(*tables, *operands)  # fmt: skip

    def matrices(self, index_map):
        """Block spec of the streamed tiles of one head."""
        return plgpu.BlockSpec((self.width, self.depth), index_map, transforms=self.transforms)

    def pipeline(self, step, context, grid, specs):
        """Streams blocks through ``step``; ``context`` is what surrounds the loop."""
        return plgpu.emit_pipeline_warp_specialized(
            step,
            grid=grid,
            in_specs=specs,
            memory_registers=40,
            wg_axis="group",
            num_compute_wgs=_COMPUTE,
            max_concurrent_steps=self.stages,
            compute_context=context,
            manual_consumed_barriers=True,
        )


class _Place:
    """Where a thread block and a warpgroup of it work."""

    def __init__(self, plan, order, count):
        index = jax.lax.axis_index
        self.row, self.head, outer = index("rows"), index("heads"), index("tiles")
        self.mask_row = 0 if plan.shared else self.row
        self.warpgroup = index("group")
        self.mine = pl.ds((outer * _COMPUTE + self.warpgroup) * _ROWS, _ROWS)
        self.first = (outer * _COMPUTE + self.warpgroup) * _ROWS
        self.count = count[self.mask_row, outer]
        self.order = order.at[self.mask_row, outer]
        if not plan.by_keys:
            self.kv_head = jax.lax.div(self.head, jnp.int32(plan.group))


def _dot(plan, a, b, into):
    """``into + a @ b`` by ``wgmma``; ``into`` may be the shape of zeros.

    The interpreter takes operands from shared memory only: values in registers, which are all that
    is added to something, are multiplied there in jnp.
    """
    if isinstance(into, tuple):

        def fresh(acc):
            plgpu.wgmma(acc, a, b)
            return acc[...]

        return pl.run_scoped(fresh, plgpu.ACC(into, jnp.float32))

    if plan.interpret is not None:
        return into + jnp.dot(a, b[...], preferred_element_type=jnp.float32)

    def more(acc):
        plgpu.wgmma(acc, a, b)

    return pl.run_state(more)(plgpu.ACC.init(into))


def _zeros(plan):
    return hopper.full((_ROWS, plan.depth), 0.0, plgpu.Layout.WGMMA)


def _seen(bounds, first, shape, keys_axis):
    """`tile.visible` in registers; ``bounds`` are the four values of every query."""
    s = plgpu.broadcasted_iota(jnp.int32, shape, keys_axis, layout=plgpu.Layout.WGMMA) + first
    return tile.within(s, *(tile.spread(x, shape, 1 - keys_axis) for x in bounds))


def _store(pairs):
    """Copies buffers of a warpgroup to where they belong."""
    plgpu.commit_smem()
    for buffer, where in pairs:
        plgpu.copy_smem_to_gmem(buffer, where, commit_group=False)
    plgpu.commit_smem_to_gmem_group()
    plgpu.wait_smem_to_gmem(0)


def _forward(q, k, v, intervals, scale, sizes, interpret):
    """-> (out [B, T, H, D], lse [B, H, T])."""
    plan = _Plan(q, k, intervals, "queries", sizes.forward, sizes, interpret)
    shape = _ROWS, plan.width
    lse = jax.ShapeDtypeStruct((plan.rows, plan.heads, plan.queries), jnp.float32)

    def body(at, q, k, v, bounds, out, lse, q_buffer, lse_buffer, loaded):
        here = at.row, at.mine, at.head

        def step(index, keys, values, keys_done, values_done, carry):
            acc, top, total, bounds = carry
            first = at.order[index[0]] * plan.width
            scores = _dot(plan, q_buffer.at[at.warpgroup], hopper.transposed(keys), shape)
            plgpu.barrier_arrive(keys_done)
            seen = _seen(bounds, first, shape, 1)
            top, total, factor, weights = tile.softmax_step(top, total, scores, seen, scale)
            acc = _dot(
                plan, weights.astype(q.dtype), values, acc * tile.spread(factor, acc.shape, 0)
            )
            plgpu.barrier_arrive(values_done)
            return acc, top, total, bounds

        def context(run):
            queries, loads = q_buffer.at[at.warpgroup], loaded.at[at.warpgroup]
            plgpu.copy_gmem_to_smem(q.at[here], queries, loads)
            plgpu.barrier_wait(loads)
            low, zero = (hopper.full((_ROWS,), x, hopper.PER_ROW) for x in (tile.LOWEST, 0.0))
            limits = _bounds(bounds, at)
            acc, top, total, _ = run((_zeros(plan), low, zero, limits))
            norm, log_sum = tile.softmax_end(top, total, scale)
            queries[...] = (acc * tile.spread(norm, acc.shape, 0)).astype(out.dtype)
            lse_buffer[at.warpgroup] = log_sum
            _store([
                (queries, out.at[here]),
                (lse_buffer.at[at.warpgroup], lse.at[at.row, at.head, at.mine]),
            ])  # fmt: skip

        spec = plan.matrices(lambda n: (at.order[n], 0))
        heads = (x.at[at.row, :, at.kv_head] for x in (k, v))
        plan.pipeline(step, context, (at.count,), [spec, spec])(*heads)

    return plan.call(
        body, "attention_forward", (q, k, v, intervals.transpose(0, 2, 1)), (q, lse),
        [plan.matrix, plan.line], 1,
    )  # fmt: skip


def _bounds(ref, at):
    """The four limits of this warpgroup's queries, in registers."""
    return tuple(hopper.load(ref.at[at.mask_row, n, at.mine], hopper.PER_ROW) for n in range(4))


def _dq(q, k, v, dout, lse, delta, intervals, scale, sizes, interpret):
    plan = _Plan(q, k, intervals, "queries", sizes.backward, sizes, interpret)
    shape = _ROWS, plan.width

    def body(at, q, k, v, dout, lse, delta, bounds, dq, q_buffer, dout_buffer, loaded):
        here = at.row, at.mine, at.head

        def step(index, keys, values, keys_done, values_done, carry):
            acc, sums, deltas, bounds = carry
            first = at.order[index[0]] * plan.width
            scores = _dot(plan, q_buffer.at[at.warpgroup], hopper.transposed(keys), shape)
            seen = _seen(bounds, first, shape, 1)
            weights = tile.weights_again(scores, tile.spread(sums, shape, 0), seen, scale)
            dweights = _dot(plan, dout_buffer.at[at.warpgroup], hopper.transposed(values), shape)
            plgpu.barrier_arrive(values_done)
            dscores = weights * (dweights - tile.spread(deltas, shape, 0)) * scale
            acc = _dot(plan, dscores.astype(q.dtype), keys, acc)
            plgpu.barrier_arrive(keys_done)
            return acc, sums, deltas, bounds

        def context(run):
            loads = loaded.at[at.warpgroup]
            for source, buffer in ((q, q_buffer), (dout, dout_buffer)):
                plgpu.copy_gmem_to_smem(source.at[here], buffer.at[at.warpgroup], loads)
            plgpu.barrier_wait(loads)
            sums, deltas = (
                hopper.load(x.at[at.row, at.head, at.mine], hopper.PER_ROW) for x in (lse, delta)
            )
            acc, *_ = run((_zeros(plan), sums, deltas, _bounds(bounds, at)))
            q_buffer[at.warpgroup] = acc.astype(dq.dtype)
            _store([(q_buffer.at[at.warpgroup], dq.at[here])])

        spec = plan.matrices(lambda n: (at.order[n], 0))
        heads = (x.at[at.row, :, at.kv_head] for x in (k, v))
        plan.pipeline(step, context, (at.count,), [spec, spec])(*heads)

    (out,) = plan.call(
        body, "attention_dq", (q, k, v, dout, lse, delta, intervals.transpose(0, 2, 1)), (q,),
        [plan.matrix] * 2, 2,
    )  # fmt: skip
    return out


def _dkv(q, k, v, dout, lse, delta, intervals, scale, sizes, interpret):
    plan = _Plan(q, k, intervals, "keys", sizes.backward, sizes, interpret)
    shape = _ROWS, plan.width

    def body(at, q, k, v, dout, lse, delta, bounds, dk, dv, k_buffer, v_buffer, loaded):
        here = at.row, at.mine, at.head

        def step(_, q, dout, lse, delta, limits, q_done, dout_done, lse_done, delta_done,
                 limits_done, carry):  # fmt: skip
            dk, dv = carry
            scores = _dot(plan, k_buffer.at[at.warpgroup], hopper.transposed(q), shape)
            # Read late: one value per column takes as many registers as a quarter of the scores.
            bounds = (hopper.load(limits.at[n], hopper.PER_COLUMN) for n in range(4))
            seen = _seen(bounds, at.first, shape, 0)
            sums = tile.spread(hopper.load(lse, hopper.PER_COLUMN), shape, 1)
            weights = tile.weights_again(scores, sums, seen, scale)
            dv = _dot(plan, weights.astype(q.dtype), dout, dv)
            dweights = _dot(plan, v_buffer.at[at.warpgroup], hopper.transposed(dout), shape)
            plgpu.barrier_arrive(dout_done)
            deltas = tile.spread(hopper.load(delta, hopper.PER_COLUMN), shape, 1)
            for done in (lse_done, delta_done, limits_done):
                plgpu.barrier_arrive(done)
            dscores = weights * (dweights - deltas) * scale
            dk = _dot(plan, dscores.astype(q.dtype), q, dk)
            plgpu.barrier_arrive(q_done)
            return dk, dv

        def context(run):
            loads = loaded.at[at.warpgroup]
            for source, buffer in ((k, k_buffer), (v, v_buffer)):
                plgpu.copy_gmem_to_smem(source.at[here], buffer.at[at.warpgroup], loads)
            plgpu.barrier_wait(loads)
            sums = run((_zeros(plan), _zeros(plan)))
            pairs = []
            for value, buffer, out in zip(sums, (k_buffer, v_buffer), (dk, dv), strict=True):
                buffer[at.warpgroup] = value.astype(out.dtype)
                pairs.append((buffer.at[at.warpgroup], out.at[here]))
            _store(pairs)

        def member(g):
            return at.head * plan.group + g

        matrix = plgpu.BlockSpec(
            (plan.width, None, plan.depth), lambda g, n: (at.order[n], member(g), 0),
            transforms=plan.transforms,
        )  # fmt: skip
        line = plgpu.BlockSpec((None, plan.width), lambda g, n: (member(g), at.order[n]))
        limits = plgpu.BlockSpec((4, plan.width), lambda g, n: (0, at.order[n]))
        plan.pipeline(
            step, context, (plan.group, at.count), [matrix, matrix, line, line, limits]
        )(*(x.at[at.row] for x in (q, dout, lse, delta)), bounds.at[at.mask_row])  # fmt: skip

    return plan.call(
        body, "attention_dkv", (q, k, v, dout, lse, delta, intervals.transpose(0, 2, 1)), (k, v),
        [plan.matrix] * 2, 2,
    )  # fmt: skip
