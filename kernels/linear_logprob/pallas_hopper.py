"""Blocks of logits as Mosaic kernels for Hopper GPUs: a matmul with the softmax as its epilogue.

Both kernels multiply a tile of tokens with a tile of the vocabulary in one thread block. One
warpgroup fetches with the TMA engine, two multiply with ``wgmma``, each half of the tokens, and
keep float32 sums in registers. Forward reduces its tile to one softmax state per token
(`tile.update`) and writes only that; XLA merges the states of all tiles, as over devices. Backward
writes the gradient of the logits (`tile.dlogits`); the two products with it are XLA's (`blocked`).

Compiled for an H200 and never executed: no GPU was at hand. ``impl="auto"`` does not take it.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Bool, Float, Int

from aa_jax.kernels import hopper
from aa_jax.kernels.linear_logprob import blocked, tile, xla
from aa_jax.kernels.linear_logprob.spec import LogProbs, Spec

BLOCK = (2048, 4096)
"""Most tokens and vocabulary entries of a block of the backward pass."""

_COMPUTE = 2  # warpgroups that multiply, side by side along the tokens
_SLICE = 64  # columns of the epilogue at once: what fits beside the sums in registers


class Sizes(NamedTuple):
    """Tile sizes: tokens per warpgroup, vocabulary, depth of one fetch; and fetches in flight."""

    tokens: int = 64
    vocab: int = 256
    depth: int = 64
    stages: int = 4


SIZES = Sizes()


def linear_logprob(
    hidden: Float[Array, "N D"],
    head: Float[Array, "V D"],
    targets: Int[Array, "N"],
    mask: Bool[Array, "N"] | None,
    bias: Float[Array, "V"] | None,
    spec: Spec,
) -> LogProbs:
    """See `aa_jax.kernels.linear_logprob.api.linear_logprob`."""
    return call(hidden, head, targets, mask, bias, spec, ENGINE)


def call(hidden, head, targets, mask, bias, spec, engine):
    """`linear_logprob` by an engine."""
    tokens, vocab = targets.shape[0], head.shape[0]
    known = (targets >= 0) & (targets < vocab)
    counts = jnp.ones_like(known) if mask is None else mask
    most, width = BLOCK
    spec = spec._replace(
        chunk=xla.even_chunk(tokens, min(spec.chunk or most, most)),
        tile=_width(vocab, min(spec.tile or width, width)),
    )
    where = jnp.where(known & counts, targets, 0)
    outs = blocked.logprob(hidden, head, bias, where, mask, spec, engine)
    return LogProbs(jnp.where(known | ~counts, outs[0], jnp.nan), *outs[1:])


def _width(vocab, most):
    """Width of equal tiles: of whole slices, or of 8, or else the last is filled up (a copy)."""
    for unit in (_SLICE, 8):
        width = unit * blocked.tile_width(math.ceil(vocab / unit), most // unit)
        if vocab % width == 0:
            return width
    return _SLICE * math.ceil(vocab / _SLICE / math.ceil(vocab / most))


def _partials(hidden, targets, live, tiles, vocab, spec, *, sizes, interpret):
    """See `blocked.Engine`; the tiles of the head are neighbours, so it reads them whole."""
    blocks, chunk, depth = hidden.shape
    weight = tiles.weight.reshape(-1, depth)
    bias = None if tiles.bias is None else tiles.bias.reshape(-1).astype(jnp.float32)
    tokens = _COMPUTE * sizes.tokens
    padding = -chunk % tokens
    hidden = jnp.pad(hidden, ((0, 0), (0, padding), (0, 0))).reshape(-1, depth)
    targets = jnp.pad(targets, ((0, 0), (0, padding))).reshape(-1)
    columns = math.ceil(weight.shape[0] / sizes.vocab)
    alive = jnp.repeat(live.astype(jnp.int32), (chunk + padding) // tokens)
    kept = 4 if spec.need_entropy else 3

    def epilogue(acc, place, refs):
        targets_ref, bias_ref, out, staged = refs
        target = hopper.load(targets_ref.at[place.rows], hopper.PER_ROW)
        partial = _nothing(sizes.tokens, spec)
        for first in range(0, sizes.vocab, _SLICE):
            z, _, is_target, index = _slice(acc, first, place.first, bias_ref, target, spec)
            z = jnp.where(index < vocab, z, -jnp.inf)
            partial = tile.update(partial, z, is_target)
        for number, value in enumerate(x for x in partial if x is not None):
            staged[number] = value
        plgpu.commit_smem()
        for number in range(kept):
            where = out.at[number, place.column, place.rows]
            plgpu.copy_smem_to_gmem(staged.at[number], where, commit_group=False)
        plgpu.commit_smem_to_gmem_group()
        plgpu.wait_smem_to_gmem(0)

    out = _matmul(
        hidden, weight, epilogue, alive, (targets,), _padded(bias, columns * sizes.vocab),
        sizes, interpret,
        out=jax.ShapeDtypeStruct((kept, columns, hidden.shape[0]), jnp.float32),
        staged=plgpu.SMEM((_COMPUTE, kept, sizes.tokens), jnp.float32),
        name="linear_logprob_forward",
    )  # fmt: skip
    # Blocks that are not live were not written: whatever was there may not be NaN.
    out = out.reshape(kept, columns, blocks, -1)[..., :chunk, None]
    dead = jnp.array([0.0, 1.0, 0.0, 0.0])[:kept, None, None, None, None]
    out = jnp.where(live[None, None, :, None, None], out, dead)
    weighted = out[2] if spec.need_entropy else None
    return tile.merge(tile.Partial(out[0], out[1], weighted, out[-1]))


def _dlogits(hidden, targets, rows, weight, bias, first, vocab, spec, *, sizes, interpret):
    """See `blocked.Engine`."""
    chunk, width = hidden.shape[0], weight.shape[0]
    tokens = _COMPUTE * sizes.tokens
    padding = -chunk % tokens
    values = [jnp.zeros((chunk, 1)) if x is None else x for x in rows]
    values = jnp.pad(jnp.concatenate(values, 1).T, ((0, 0), (0, padding)))
    hidden, targets = (
        jnp.pad(x, [(0, padding)] + [(0, 0)] * (x.ndim - 1)) for x in (hidden, targets)
    )
    columns = math.ceil(width / sizes.vocab)
    alive = jnp.ones(hidden.shape[0] // tokens, jnp.int32)
    bias = None if bias is None else bias.reshape(-1).astype(jnp.float32)
    shape = (sizes.tokens, _SLICE)

    def epilogue(acc, place, refs):
        targets_ref, first_ref, values_ref, bias_ref, out, staged = refs
        load = functools.partial(hopper.load, layout=hopper.PER_ROW)
        target = load(targets_ref.at[place.rows]) - first_ref[0]
        rows = [load(values_ref.at[n, place.rows]) for n in range(len(blocked.Rows._fields))]
        for number, at in enumerate(range(0, sizes.vocab, _SLICE)):
            z, capped, is_target, index = _slice(acc, at, place.first, bias_ref, target, spec)
            dz = tile.dlogits(z, capped, is_target, *(tile.spread(x, shape) for x in rows), spec)
            # Both copies of this slot must have left before it is written again.
            plgpu.wait_smem_to_gmem(1, wait_read_only=True)
            slot = staged.at[number % 2]
            slot[...] = jnp.where(index + first_ref[0] < vocab, dz, 0.0).astype(out.dtype)
            plgpu.commit_smem()
            where = out.at[place.rows, pl.ds(place.first + at, _SLICE)]
            plgpu.copy_smem_to_gmem(slot, where)
        plgpu.wait_smem_to_gmem(0)

    out = _matmul(
        hidden, weight, epilogue, alive, (targets, first.reshape(1), values),
        _padded(bias, columns * sizes.vocab), sizes, interpret,
        # The engine stores whole slices; what is beyond the tile is cut off.
        out=jax.ShapeDtypeStruct((hidden.shape[0], width + -width % _SLICE), hidden.dtype),
        staged=plgpu.SMEM(
            (_COMPUTE, 2, *shape), hidden.dtype, transforms=hopper.transforms(_SLICE)
        ),
        name="linear_logprob_dlogits",
    )  # fmt: skip
    return out[:chunk, :width]


class _Place(NamedTuple):
    """Where a warpgroup works: its tokens, its tile of the vocabulary, the first entry of that."""

    rows: object
    column: Array
    first: Array


def _matmul(hidden, weight, epilogue, alive, extra, bias, sizes, interpret, *, out, staged, name):
    """``hidden @ weight.T`` in tiles, each given to ``epilogue(acc, place, refs)``.

    ``refs`` are those of ``extra``, the bias or None, the output and the warpgroup's part of
    ``staged``. Tiles of tokens with a zero in ``alive`` do nothing.
    """
    if hidden.shape[1] % sizes.depth:
        padding = (0, 0), (0, -hidden.shape[1] % sizes.depth)
        hidden, weight = jnp.pad(hidden, padding), jnp.pad(weight, padding)
    steps = hidden.shape[1] // sizes.depth
    tokens = _COMPUTE * sizes.tokens
    grid = hidden.shape[0] // tokens, math.ceil(weight.shape[0] / sizes.vocab)
    operands = [hidden, weight, alive, *extra] + ([] if bias is None else [bias])

    def body(h_ref, w_ref, alive_ref, *refs):
        refs, out_ref = refs[: len(operands) - 3], refs[len(operands) - 3]
        i, column = jax.lax.axis_index("tokens"), jax.lax.axis_index("vocab")
        group = jax.lax.axis_index("group")
        mine = pl.ds(group * sizes.tokens, sizes.tokens)
        first = column * sizes.vocab

        def pipeline(step, context):
            return plgpu.emit_pipeline_warp_specialized(
                step,
                grid=(steps,),
                memory_registers=40,
                in_specs=[
                    plgpu.BlockSpec(
                        (size, sizes.depth), lambda k: (0, k), delay_release=1,
                        transforms=hopper.transforms(sizes.depth),
                    )
                    for size in (tokens, sizes.vocab)
                ],
                wg_axis="group",
                num_compute_wgs=_COMPUTE,
                max_concurrent_steps=sizes.stages,
                compute_context=context,
            )  # fmt: skip

        @pl.when(alive_ref[i] > 0)
        def _():
            @functools.partial(pl.run_scoped, staged=staged, collective_axes="group")
            def _(staged):
                def compute(run):
                    @functools.partial(
                        pl.run_scoped, acc=plgpu.ACC((sizes.tokens, sizes.vocab), jnp.float32)
                    )
                    def _(acc):
                        run(acc)
                        place = _Place(
                            pl.ds(i * tokens + group * sizes.tokens, sizes.tokens), column, first
                        )
                        given = (*refs, None) if bias is None else refs
                        epilogue(acc[...], place, (*given, out_ref, staged.at[group]))

                def step(_, h, w, acc):
                    plgpu.wgmma(acc, h.at[mine], hopper.transposed(w))
                    plgpu.wgmma_wait(1)
                    return acc

                pipeline(step, compute)(
                    h_ref.at[pl.ds(i * tokens, tokens)], w_ref.at[pl.ds(first, sizes.vocab)]
                )

    return plgpu.kernel(
        body,
        out_type=out,
        grid=grid,
        grid_names=("tokens", "vocab"),
        num_threads=_COMPUTE + 1,
        thread_name="group",
        kernel_name=name,
        interpret=interpret,
        compiler_params=hopper.compiler_params(),
    )(*operands)


def _slice(acc, at, first, bias_ref, target, spec):
    """``_SLICE`` columns from ``at`` of a tile -> (z, capped, is_target, index in the operand)."""
    raw = acc[:, at : at + _SLICE]
    bias = None
    if bias_ref is not None:
        where = bias_ref.at[pl.ds(first + at, _SLICE)]
        bias = tile.spread(hopper.load(where, hopper.PER_COLUMN), raw.shape, 1)
    z, capped = tile.logits(raw, bias, spec)
    index = plgpu.broadcasted_iota(jnp.int32, raw.shape, 1, layout=plgpu.Layout.WGMMA)
    index = index + (first + at)
    return z, capped, index == tile.spread(target, raw.shape), index


def _nothing(tokens, spec):
    """`tile.nothing`, in registers."""
    low, zero = (hopper.full((tokens,), x, hopper.PER_ROW) for x in (tile.LOWEST, 0.0))
    return tile.Partial(low, zero, zero if spec.need_entropy else None, zero)


def _padded(bias, size):
    return None if bias is None else jnp.pad(bias, (0, size - bias.shape[0]))


def engine(sizes: Sizes = SIZES, interpret=None) -> blocked.Engine:
    """The kernels with these tile sizes; ``interpret`` as in ``plgpu.kernel``."""
    return blocked.Engine(
        functools.partial(_partials, sizes=sizes, interpret=interpret),
        functools.partial(_dlogits, sizes=sizes, interpret=interpret),
    )


ENGINE = engine()
