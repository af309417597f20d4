"""The operator in blocks of tokens × vocabulary on one device, whatever multiplies the blocks.

Forward keeps ``lse`` (and the entropy) of every token. Backward goes over the vocabulary outside
and the tokens inside: a tile of the head's gradient is complete when it is left, so it is summed
in float32 yet written once in the head's own type, and only the hidden states' gradient ``[N, D]``
is carried. Tokens that count are gathered to the front and blocks that hold none are skipped.

An `Engine` is what differs between platforms: how a block of logits is multiplied out and reduced.
The two products with the gradient of the logits are plain matmuls on every platform, and separate,
so that the one of a frozen head disappears from the program.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from aa_jax.kernels.linear_logprob import tile
from aa_jax.kernels.linear_logprob.spec import Spec


class Tiles(NamedTuple):
    """The head cut along the vocabulary: [n, W, D], bias [n, 1, W] or None, first index [n]."""

    weight: jax.Array
    bias: jax.Array | None
    first: jax.Array


class Engine(NamedTuple):
    """How one platform does a block.

    Attributes:
      partials: ``(hidden [n, C, D], targets [n, C], live [n], tiles, vocab, spec) -> Partial`` of
        [n, C, 1]; blocks that are not live may hold anything finite.
      dlogits: ``(hidden [C, D], targets [C], rows [C] each, weight [W, D], bias, first, vocab,
        spec) -> dz [C, W]`` in the type of hidden, 0 outside the vocabulary.
    """

    partials: Callable
    dlogits: Callable


class Rows(NamedTuple):
    """What the gradient of the logits needs of every token, as columns [..., 1]."""

    lse: jax.Array
    entropy: jax.Array | None
    dlogps: jax.Array
    dentropy: jax.Array | None
    dlse: jax.Array


def tile_width(vocab: int, most: int) -> int:
    """Width of equal tiles: a divisor of the vocabulary if there is one near ``most``.

    Filling up the last tile would copy the head.
    """
    count = math.ceil(vocab / most)
    even = next((n for n in range(count, 2 * count + 1) if vocab % n == 0), count)
    return math.ceil(vocab / even)


def logprob(hidden, head, bias, targets, mask, spec: Spec, engine: Engine):
    """-> (logps, entropy or None, lse), [N] each; ``targets`` are in range where they count."""
    order = None if mask is None else jnp.argsort(~mask, stable=True)
    mask = jnp.ones(targets.shape, bool) if mask is None else mask
    return _logprob(hidden, head, bias, targets, mask, order, spec, engine)


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7))
def _logprob(hidden, head, bias, targets, mask, order, spec, engine):
    return _fwd(hidden, head, bias, targets, mask, order, spec, engine)[0]


def _fwd(hidden, head, bias, targets, mask, order, spec, engine):
    outs = finish(partials(hidden, head, bias, targets, mask, order, spec, engine), mask)
    return outs, (hidden, head, bias, targets, mask, order, *outs[1:])


def _bwd(spec, engine, residuals, cotangents):
    hidden, head, bias, targets, mask, order, entropy, lse = residuals
    rows = Rows(lse, entropy, *cotangents)
    dhidden, dhead, dbias = gradients(hidden, head, bias, targets, mask, order, rows, spec, engine)
    return dhidden.astype(hidden.dtype), dhead, dbias, None, None, None


_logprob.defvjp(_fwd, _bwd)


def partials(hidden, head, bias, targets, mask, order, spec, engine) -> tile.Partial:
    """What this part of the vocabulary says about every token, [N, 1] each."""
    tiles = _tiles(head.astype(hidden.dtype), bias, spec)
    cut, join = _cutter(targets.shape[0], spec.chunk, order)
    live = cut(mask).any(1)
    parts = engine.partials(cut(hidden), cut(targets), live, tiles, head.shape[0], spec)
    return jax.tree.map(join, parts)


def finish(partial: tile.Partial, mask):
    """-> (logps, entropy or None, lse), [N] each, 0 where the mask is."""
    return jax.tree.map(lambda x: jnp.where(mask, x[:, 0], 0), tile.finish(partial))


def gradients(hidden, head, bias, targets, mask, order, rows: Rows, spec, engine):
    """-> (dhidden [N, D] float32, dhead [V, D] and dbias [V] in their own types)."""
    tiles = _tiles(head.astype(hidden.dtype), bias, spec)
    # A where, not a product: hidden states and cotangents of masked tokens may be anything.
    hidden = jnp.where(mask[:, None], hidden, 0)
    rows = jax.tree.map(lambda x: jnp.where(mask, x, 0)[:, None], rows)
    # Their logits are the bias, and its exponential may be inf, unless the sum is larger still.
    most = -tile.LOWEST
    lse = jnp.where(mask[:, None], rows.lse, most)
    cut, join = _cutter(targets.shape[0], spec.chunk, order)
    rows = jax.tree.map(cut, rows)._replace(lse=cut(lse, most))
    blocks = cut(hidden), cut(targets), rows
    live = cut(mask).any(1)

    def over_vocabulary(dhidden, one):
        def over_tokens(sums, x):
            (h, t, r), dh, alive = x

            def compute():
                dz = engine.dlogits(h, t, r, *one, head.shape[0], spec)
                dweight = sums[0] + _dot("cw,cd->wd", dz, h)
                dbias = None if bias is None else sums[1] + dz.astype(jnp.float32).sum(0)
                return (dweight, dbias), dh + _dot("cw,wd->cd", dz, one.weight)

            return if_live(order, alive, compute, (sums, dh))

        zero = jnp.zeros(one.weight.shape, jnp.float32)
        zero = zero, None if bias is None else jnp.zeros(spec.tile, jnp.float32)
        (dweight, dbias), dhidden = scan(over_tokens, zero, (blocks, dhidden, live))
        return dhidden, (
            dweight.astype(head.dtype), None if bias is None else dbias.astype(bias.dtype)
        )  # fmt: skip

    dhidden = jnp.zeros(blocks[0].shape, jnp.float32)
    dhidden, (dhead, dbias) = scan(over_vocabulary, dhidden, tiles)
    dhead = dhead.reshape(-1, head.shape[1])[: head.shape[0]]
    return join(dhidden), dhead, None if bias is None else dbias.reshape(-1)[: head.shape[0]]


def if_live(order, alive, compute, otherwise):
    """``compute()``, or what stands for it when nothing in the block counts."""
    return compute() if order is None else jax.lax.cond(alive, compute, lambda: otherwise)


def scan(step, carry, xs):
    """``lax.scan``, or a plain call for a single step."""
    if jax.tree.leaves(xs)[0].shape[0] == 1:
        carry, out = step(carry, jax.tree.map(lambda x: x[0], xs))
        return carry, jax.tree.map(lambda x: x[None], out)
    return jax.lax.scan(step, carry, xs)


def _tiles(weight, bias, spec) -> Tiles:
    vocab, width = weight.shape[0], spec.tile
    count = math.ceil(vocab / width)
    padding = count * width - vocab
    if padding:
        weight = jnp.pad(weight, ((0, padding), (0, 0)))
        bias = None if bias is None else jnp.pad(bias, (0, padding))
    return Tiles(
        weight.reshape(count, width, -1),
        None if bias is None else bias.reshape(count, 1, width),
        jnp.arange(count, dtype=jnp.int32) * width,
    )


def _cutter(tokens, chunk, order):
    """-> (cut: [N, ...] -> [n, C, ...], join: its inverse). Padding rows, zeros, are masked."""
    count = -(-tokens // chunk)
    padding = count * chunk - tokens

    def cut(x, fill=0):
        x = x if order is None else x[order]
        x = jnp.pad(x, [(0, padding)] + [(0, 0)] * (x.ndim - 1), constant_values=fill)
        return x.reshape(count, chunk, *x.shape[1:])

    def join(x):
        x = x.reshape(count * chunk, *x.shape[2:])[:tokens]
        return x if order is None else jnp.zeros_like(x).at[order].set(x, unique_indices=True)

    return cut, join


def _dot(how, a, b):
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jnp.einsum(how, a, b, preferred_element_type=jnp.float32, precision=precision)


# The engine of plain XLA.


def _xla_logits(hidden, targets, weight, bias, first, vocab, spec):
    """-> (z [C, W], capped [C, W], is_target [C, W])."""
    z, capped = tile.logits(_dot("cd,wd->cw", hidden, weight), bias, spec)
    index = tile.columns(first, z.shape)
    if vocab % spec.tile:
        z = jnp.where(index < vocab, z, -jnp.inf)
    return z, capped, index == targets[:, None]


def _xla_partials(hidden, targets, live, tiles, vocab, spec):
    def block(_, x):
        h, t, alive = x

        def step(partial, one):
            z, _, is_target = _xla_logits(h, t, *one, vocab, spec)
            return tile.update(partial, z, is_target), None

        nothing = tile.nothing(h.shape[0], spec)
        return None, jax.lax.cond(alive, lambda: scan(step, nothing, tiles)[0], lambda: nothing)

    return scan(block, None, (hidden, targets, live))[1]


def _xla_dlogits(hidden, targets, rows, weight, bias, first, vocab, spec):
    z, capped, is_target = _xla_logits(hidden, targets, weight, bias, first, vocab, spec)
    return tile.dlogits(z, capped, is_target, *rows, spec).astype(hidden.dtype)


XLA = Engine(_xla_partials, _xla_dlogits)
