"""Blocks of logits as Mosaic kernels for TPUs: a matmul whose result never leaves VMEM.

Forward is one kernel over (token tile, vocabulary tile, depth tile): products accumulate in VMEM,
the softmax state of a token tile stays there until its last vocabulary tile. Token tiles that hold
nothing that counts fetch and compute nothing. Backward has one kernel, logits again with their
gradient as epilogue; the two products with it are XLA's (`blocked`).

Values that belong to a token travel as the lanes of one array ``[N, 8]``.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Bool, Float, Int

from aa_jax.kernels import tuning
from aa_jax.kernels.linear_logprob import blocked, tile, xla
from aa_jax.kernels.linear_logprob.spec import LogProbs, Spec

BLOCK = (2048, 8192)
"""Most tokens and vocabulary entries of a block of the backward pass."""

_LANES = 8
_LOW = 128  # width of a vector register: scratch columns are broadcast to it
_STRIP = 16  # tokens at a time after a product: what belongs to them stays in registers


class Sizes(NamedTuple):
    """Tile sizes of a kernel: tokens, vocabulary, depth."""

    tokens: int
    vocab: int
    depth: int


def linear_logprob(
    hidden: Float[Array, "N D"],
    head: Float[Array, "V D"],
    targets: Int[Array, "N"],
    mask: Bool[Array, "N"] | None,
    bias: Float[Array, "V"] | None,
    spec: Spec,
) -> LogProbs:
    """See `aa_jax.kernels.linear_logprob.api.linear_logprob`."""
    return _call(hidden, head, targets, mask, bias, spec, ENGINE)


def _call(hidden, head, targets, mask, bias, spec, engine):
    tokens, vocab = targets.shape[0], head.shape[0]
    known = (targets >= 0) & (targets < vocab)
    counts = jnp.ones_like(known) if mask is None else mask
    most, width = BLOCK
    spec = spec._replace(
        chunk=xla.even_chunk(tokens, min(spec.chunk or most, most)),
        tile=blocked.tile_width(vocab, min(spec.tile or width, width)),
    )
    where = jnp.where(known & counts, targets, 0)
    outs = blocked.logprob(hidden, head, bias, where, mask, spec, engine)
    return LogProbs(jnp.where(known | ~counts, outs[0], jnp.nan), *outs[1:])


def engine(sizes: Sizes | None = None, interpret=False) -> blocked.Engine:
    """The kernels with these tile sizes; ``interpret`` as in ``pallas_call``.

    ``sizes`` None: those of `aa_jax.kernels.tuning`.
    """
    return blocked.Engine(
        functools.partial(_partials, sizes=sizes, interpret=interpret),
        functools.partial(_dlogits, sizes=sizes, interpret=interpret),
    )


def _partials(hidden, targets, live, tiles, vocab, spec, *, sizes, interpret):
    """See `blocked.Engine`; the tiles of the head are neighbours, so it reads them whole."""
    blocks, chunk, depth = hidden.shape
    sizes = sizes or Sizes(*tuning.sizes("linear_logprob_forward", hidden.dtype, depth))
    weight = tiles.weight.reshape(-1, depth)
    bias = None if tiles.bias is None else tiles.bias.reshape(1, -1)
    tokens = _fit(sizes.tokens, chunk, 16)
    per_block = math.ceil(chunk / tokens)
    hidden, targets = (
        jnp.pad(x, [(0, 0), (0, per_block * tokens - chunk)] + [(0, 0)] * (x.ndim - 2))
        for x in (hidden, targets)
    )
    hidden = hidden.reshape(-1, depth)
    grid, specs, hidden, weight = _grid(hidden, weight, bias, tokens, sizes, live=True)
    operands = [hidden, weight] + ([] if bias is None else [bias]) + [targets.reshape(-1, 1)]
    column = pltpu.VMEM((tokens, _LOW), jnp.float32)
    kernel = functools.partial(_forward_kernel, spec=spec, vocab=vocab, biased=bias is not None)
    out = pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((hidden.shape[0], _LANES), jnp.float32),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=grid,
            in_specs=specs + [pl.BlockSpec((tokens, 1), lambda i, j, k, live: (i, 0))],
            out_specs=pl.BlockSpec((tokens, _LANES), lambda i, j, k, live: (i, 0)),
            scratch_shapes=[pltpu.VMEM((tokens, specs[1].block_shape[0]), jnp.float32)]
            + [column] * 4,
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary")
        ),
        cost_estimate=_cost(hidden, weight, out_bytes=4 * _LANES * hidden.shape[0]),
        interpret=interpret,
        name="linear_logprob_forward",
    )(jnp.repeat(live.astype(jnp.int32), per_block), *operands)
    out = out.reshape(blocks, -1, _LANES)[:, :chunk]
    top, total, weighted, target = (out[..., i : i + 1] for i in range(4))
    # Tiles that are not live hold nothing: a total of 1 keeps their logarithm finite.
    total = jnp.where(live[:, None, None], total, 1.0)
    return tile.Partial(top, total, weighted if spec.need_entropy else None, target)


def _dlogits(hidden, targets, rows, weight, bias, first, vocab, spec, *, sizes, interpret):
    """See `blocked.Engine`."""
    (chunk, depth), width = hidden.shape, weight.shape[0]
    sizes = sizes or Sizes(*tuning.sizes("linear_logprob_dlogits", hidden.dtype, depth))
    tokens = _fit(sizes.tokens, chunk, 16)
    packed = [jnp.zeros((chunk, 1)) if x is None else x for x in rows]
    packed = jnp.concatenate(packed + [jnp.zeros((chunk, _LANES - len(packed)))], axis=1)
    padding = (0, math.ceil(chunk / tokens) * tokens - chunk), (0, 0)
    hidden, targets, packed = (jnp.pad(x, padding) for x in (hidden, targets[:, None], packed))
    grid, specs, hidden, weight = _grid(hidden, weight, bias, tokens, sizes, live=False)
    operands = [hidden, weight] + ([] if bias is None else [bias]) + [targets, packed]
    columns = specs[1].block_shape[0]
    out = pl.pallas_call(
        functools.partial(_dlogits_kernel, spec=spec, vocab=vocab, biased=bias is not None),
        out_shape=jax.ShapeDtypeStruct((hidden.shape[0], width), hidden.dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=grid,
            in_specs=specs
            + [pl.BlockSpec((tokens, n), lambda i, j, k, first: (i, 0)) for n in (1, _LANES)],
            out_specs=pl.BlockSpec((tokens, columns), lambda i, j, k, first: (i, j)),
            scratch_shapes=[pltpu.VMEM((tokens, columns), jnp.float32)],
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary")
        ),
        cost_estimate=_cost(hidden, weight, out_bytes=hidden.shape[0] * width * 2),
        interpret=interpret,
        name="linear_logprob_dlogits",
    )(first.reshape(1), *operands)
    return out[:chunk]


def _grid(hidden, weight, bias, tokens, sizes, *, live):
    """-> (grid, block specs of hidden, weight and bias, the two arrays with an even depth)."""
    depth = next((d for d in (sizes.depth, 512, 384, 256, 128) if hidden.shape[1] % d == 0), 0)
    if not depth:
        depth = min(sizes.depth, 128)
        padding = (0, 0), (0, -hidden.shape[1] % depth)
        hidden, weight = jnp.pad(hidden, padding), jnp.pad(weight, padding)
    columns = _fit(sizes.vocab, weight.shape[0], _LOW)

    def alive(i, scalars):
        # What does not count reads the block that is there already: nothing is fetched.
        return scalars[i] if live else 1

    specs = [
        pl.BlockSpec((tokens, depth), lambda i, j, k, s: (i * alive(i, s), k * alive(i, s))),
        pl.BlockSpec((columns, depth), lambda i, j, k, s: (j * alive(i, s), k * alive(i, s))),
    ]
    if bias is not None:
        specs.append(pl.BlockSpec((1, columns), lambda i, j, k, s: (0, j * alive(i, s))))
    grid = (
        hidden.shape[0] // tokens,
        math.ceil(weight.shape[0] / columns),
        hidden.shape[1] // depth,
    )
    return grid, specs, hidden, weight


def _fit(most: int, size: int, unit: int) -> int:
    """A tile of at most ``most`` for ``size`` elements, a multiple of ``unit``."""
    return min(most, math.ceil(size / unit) * unit)


def _cost(hidden, weight, out_bytes):
    (tokens, depth), vocab = hidden.shape, weight.shape[0]
    return pl.CostEstimate(
        flops=2 * tokens * vocab * depth,
        transcendentals=tokens * vocab,
        bytes_accessed=hidden.nbytes + weight.nbytes + out_bytes,
    )


def _accumulate(h_ref, w_ref, acc_ref, k):
    @pl.when(k == 0)
    def _():
        acc_ref[...] = jnp.zeros_like(acc_ref)

    full = h_ref.dtype == jnp.float32
    acc_ref[...] += jax.lax.dot_general(
        h_ref[...],
        w_ref[...],
        (((1,), (1,)), ((), ())),
        preferred_element_type=jnp.float32,
        precision=jax.lax.Precision.HIGHEST if full else None,
    )


def _strips(tokens, body):
    """``body(rows)`` for a few rows at a time; a whole tile at once would not fit the registers."""

    @pl.loop(0, tokens, step=_STRIP)
    def _(first):
        body(pl.ds(pl.multiple_of(first, _STRIP), _STRIP))


def _forward_kernel(live_ref, h_ref, w_ref, *refs, spec, vocab, biased):
    b_ref = refs[0] if biased else None
    t_ref, out_ref, acc_ref, *state = refs[biased:]
    i, j, k = (pl.program_id(axis) for axis in range(3))
    deep = k == pl.num_programs(2) - 1
    last = deep & (j == pl.num_programs(1) - 1)
    alive = live_ref[i] > 0

    @pl.when(alive)
    def _():
        _accumulate(h_ref, w_ref, acc_ref, k)

    @pl.when(alive & (j == 0) & (k == 0))
    def _():
        state[0][...] = jnp.full_like(state[0], tile.LOWEST)
        for ref in state[1:]:
            ref[...] = jnp.zeros_like(ref)

    def reduce(rows):
        z, _ = tile.logits(acc_ref[rows], None if b_ref is None else b_ref[...], spec)
        index = tile.columns(j * z.shape[1], z.shape)
        z = jnp.where(index < vocab, z, -jnp.inf)
        top, total, weighted, target = (ref[rows, :1] for ref in state)
        partial = tile.Partial(top, total, weighted if spec.need_entropy else None, target)
        partial = tile.update(partial, z, index == t_ref[rows])
        for ref, value in zip(state, partial, strict=True):
            if value is not None:
                ref[rows] = jnp.broadcast_to(value, (_STRIP, _LOW))

    @pl.when(alive & deep)
    def _():
        _strips(acc_ref.shape[0], reduce)

    @pl.when(alive & last)
    def _():
        lane = jax.lax.broadcasted_iota(jnp.int32, out_ref.shape, 1)
        out = jnp.zeros(out_ref.shape, jnp.float32)
        for number, ref in enumerate(state):
            out = jnp.where(lane == number, ref[:, :_LANES], out)
        out_ref[...] = out

    @pl.when(~alive & last)
    def _():
        out_ref[...] = jnp.zeros_like(out_ref)


def _dlogits_kernel(first_ref, h_ref, w_ref, *refs, spec, vocab, biased):
    b_ref = refs[0] if biased else None
    t_ref, rows_ref, out_ref, acc_ref = refs[biased:]
    # Asked here: the interpreter does not know the grid inside a branch.
    j, k = pl.program_id(1), pl.program_id(2)
    _accumulate(h_ref, w_ref, acc_ref, k)

    def gradient(rows):
        z, capped = tile.logits(acc_ref[rows], None if b_ref is None else b_ref[...], spec)
        index = tile.columns(first_ref[0] + j * z.shape[1], z.shape)
        values = rows_ref[rows]
        values = blocked.Rows(*(values[:, n : n + 1] for n in range(len(blocked.Rows._fields))))
        dz = tile.dlogits(z, capped, index == t_ref[rows], *values, spec)
        out_ref[rows] = jnp.where(index < vocab, dz, 0.0).astype(out_ref.dtype)

    @pl.when(k == pl.num_programs(2) - 1)
    def _():
        _strips(acc_ref.shape[0], gradient)


ENGINE = engine()
