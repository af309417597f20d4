"""One block of tokens, cut along the vocabulary: logits that never leave the cache of a CPU.

Beside the residuals of the tokens, forward needs one tile ``[C, W]`` and backward two.
"""

import math

import jax
import jax.numpy as jnp

from aa_jax.kernels.linear_logprob import tile

WIDTH = 4096
"""Most vocabulary entries of a tile."""


def size(vocab: int) -> int:
    """Width of equal tiles, the last one filled up."""
    return math.ceil(vocab / math.ceil(vocab / WIDTH))


def cut(weight, bias, spec):
    """[V, D] and [V] -> tiles [n, W, D] and [n, 1, W], filled up with entries of logit -inf."""
    vocab, width = weight.shape[0], spec.tile
    count = math.ceil(vocab / width)
    padding = count * width - vocab
    weight = jnp.pad(weight, ((0, padding), (0, 0))).reshape(count, width, -1)
    if bias is not None:
        bias = jnp.pad(bias, (0, padding)).reshape(count, 1, width)
    return weight, bias, jnp.arange(count, dtype=jnp.int32) * width


def join(tiles, vocab):
    """[n, W, D] -> [V, D]."""
    return tiles.reshape(-1, tiles.shape[2])[:vocab]


def forward(hidden, targets, mask, tiles, vocab, spec):
    """[C, D] -> (logps [C], entropy [C] or None, lse [C])."""

    def step(partial, x):
        z, _, is_target = _logits(hidden, targets, *x, vocab, spec)
        return tile.update(partial, z, is_target), None

    partial, _ = jax.lax.scan(step, tile.nothing(hidden.shape[0], spec), tiles)
    return jax.tree.map(lambda x: jnp.where(mask, x[:, 0], 0), tile.finish(partial))


def backward(hidden, targets, mask, rows, tiles, sums, vocab, spec):
    """Adds a block's gradients to those of the head and the bias.

    Args:
      hidden: [C, D].
      targets: [C].
      mask: [C].
      rows: entropy, lse and the cotangents of logps, entropy and lse, [C] each or None.
      tiles: what `cut` returns.
      sums: float32 gradients of the tiles so far: [n, W, D] and [n, 1, W] or None.
      vocab: number of entries that are not filling.
      spec: see `Spec`.

    Returns:
      (dhidden [C, D], the new sums).
    """
    hidden = jnp.where(mask[:, None], hidden, 0)
    entropy, lse, dlogps, dentropy, dlse = jax.tree.map(lambda x: x[:, None], rows)

    def step(dhidden, x):
        tiles, (dweight, dbias) = x
        z, capped, is_target = _logits(hidden, targets, *tiles, vocab, spec)
        dz = tile.dlogits(z, capped, is_target, lse, entropy, dlogps, dentropy, dlse, spec)
        # A where, not a product: cotangents of masked tokens may be anything.
        dz = jnp.where(mask[:, None], dz, 0)
        low = dz.astype(hidden.dtype)
        dhidden = dhidden + _dot("cw,wd->cd", low, tiles[0])
        dweight = dweight + _dot("cw,cd->wd", low, hidden)
        return dhidden, (dweight, None if dbias is None else dbias + dz.sum(0)[None])

    zero = jnp.zeros(hidden.shape, jnp.float32)
    dhidden, sums = jax.lax.scan(step, zero, (tiles, sums))
    return dhidden.astype(hidden.dtype), sums


def _dot(how, a, b):
    return jnp.einsum(how, a, b, preferred_element_type=jnp.float32)


def _logits(hidden, targets, weight, bias, first, vocab, spec):
    """-> (z [C, W], capped [C, W], is_target [C, W])."""
    z, capped = tile.logits(_dot("cd,wd->cw", hidden, weight), bias, spec)
    index = tile.columns(first, z.shape)
    if vocab % spec.tile:
        z = jnp.where(index < vocab, z, -jnp.inf)
    return z, capped, index == targets[:, None]
