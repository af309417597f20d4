"""The operator in plain XLA, the portable default: all logits, or one block at a time.

Small logits are formed at once, and XLA merges their recomputation in the backward pass with the
forward pass. Larger ones are cut into blocks: on one device along tokens and vocabulary, where
tokens that do not count are skipped (`blocked`); on several devices along the tokens only, every
n-th token in a block, so that tokens and vocabulary sharded over devices stay where they are.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from aa_jax.kernels.linear_logprob import blocked, tile
from aa_jax.kernels.linear_logprob.spec import LogProbs, Spec
from aa_jax.platforms import target

CHUNK_BYTES = {"cpu": 64 * 2**20}
"""Float32 logits of one block on several devices; accelerators take `DEFAULT_CHUNK_BYTES` each."""

DEFAULT_CHUNK_BYTES = 256 * 2**20

KEPT_BYTES = {"cpu": 16 * 2**20}
"""On one device, logits up to this size are kept for the backward pass instead of cut."""

DEFAULT_KEPT_BYTES = 128 * 2**20

BLOCK = {"cpu": (512, 4096)}
"""Most tokens and vocabulary entries of a block on one device: on a CPU it stays in the cache."""

DEFAULT_BLOCK = (2048, 4096)

_ROUND = 128  # blocks are multiples of this many tokens: no ragged matmul tiles


def linear_logprob(
    hidden: Float[Array, "N D"],
    head: Float[Array, "V D"],
    targets: Int[Array, "N"],
    mask: Bool[Array, "N"] | None,
    bias: Float[Array, "V"] | None,
    spec: Spec,
    platform: str | None = None,
) -> LogProbs:
    """See `aa_jax.kernels.linear_logprob.api.linear_logprob`.

    ``platform`` decides the size of blocks; None asks JAX for its default backend.
    """
    tokens, vocab = targets.shape[0], head.shape[0]
    known = (targets >= 0) & (targets < vocab)
    counts = jnp.ones_like(known) if mask is None else mask
    where = jnp.where(known & counts, targets, 0)
    platform = platform or target.backend()
    kept = 4 * tokens * vocab <= KEPT_BYTES.get(platform, DEFAULT_KEPT_BYTES)
    if target.device_count() > 1 or (spec.chunk or tokens) >= tokens and kept:
        chunk = min(spec.chunk or default_chunk(tokens, vocab), tokens)
        outs = _logprob(hidden, head, bias, where, counts, spec._replace(chunk=chunk))
    else:
        most, width = BLOCK.get(platform, DEFAULT_BLOCK)
        spec = spec._replace(
            chunk=even_chunk(tokens, min(spec.chunk or most, most)),
            tile=blocked.tile_width(vocab, width),
        )
        outs = blocked.logprob(hidden, head, bias, where, mask, spec, blocked.XLA)
    return LogProbs(jnp.where(known | ~counts, outs[0], jnp.nan), *outs[1:])


def default_chunk(tokens: int, vocab: int, platform: str | None = None) -> int:
    """Tokens per block: within the platform's budget, and blocks of nearly equal size."""
    platform = platform or target.backend()
    # Tokens are sharded over accelerators; CPU "devices" share one memory.
    budget = CHUNK_BYTES.get(platform) or DEFAULT_CHUNK_BYTES * target.device_count()
    return even_chunk(tokens, max(budget // (4 * vocab), 1))


def even_chunk(tokens: int, most: int) -> int:
    """Tokens per block, at most ``most``, so that blocks are of nearly equal size."""
    if tokens <= most:
        return tokens
    most = max(most // _ROUND * _ROUND, min(most, _ROUND))
    even = math.ceil(tokens / math.ceil(tokens / most))
    return min(math.ceil(even / _ROUND) * _ROUND, most)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _logprob(hidden, head, bias, targets, mask, spec):
    return _fwd(hidden, head, bias, targets, mask, spec)[0]


def _fwd(hidden, head, bias, targets, mask, spec):
    weight = head.astype(hidden.dtype)

    def block(carry, x):
        return carry, _forward_block(*x, weight, bias, spec)

    cut, join = _cutter(targets.shape[0], spec.chunk)
    _, outs = blocked.scan(block, None, (cut(hidden), cut(targets), cut(mask)))
    logps, entropy, lse = jax.tree.map(join, outs)
    return (logps, entropy, lse), (hidden, head, bias, targets, mask, entropy, lse)


def _bwd(spec, residuals, cotangents):
    hidden, head, bias, targets, mask, entropy, lse = residuals
    weight = head.astype(hidden.dtype)

    def block(carry, x):
        dhidden, dweight, dbias = _backward_block(*x, weight, bias, spec)
        return (carry[0] + dweight, None if bias is None else carry[1] + dbias), dhidden

    cut, join = _cutter(targets.shape[0], spec.chunk)
    xs = hidden, targets, mask, entropy, lse, *cotangents
    zero = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), (head, bias))
    (dweight, dbias), dhidden = blocked.scan(block, zero, jax.tree.map(cut, xs))
    if bias is not None:
        dbias = dbias.astype(bias.dtype)
    return join(dhidden), dweight.astype(head.dtype), dbias, None, None


_logprob.defvjp(_fwd, _bwd)


def _forward_block(hidden, targets, mask, weight, bias, spec):
    """[C, D] -> (logps [C], entropy [C] or None, lse [C])."""
    z, _, is_target = _logits(hidden, targets, weight, bias, spec)
    partial = tile.update(tile.nothing(hidden.shape[0], spec), z, is_target)
    return blocked.finish(partial, mask)


def _backward_block(
    hidden, targets, mask, entropy, lse, dlogps, dentropy, dlse, weight, bias, spec
):
    """-> (dhidden [C, D], dweight [V, D] float32, dbias [V] float32 or None)."""
    z, capped, is_target = _logits(hidden, targets, weight, bias, spec)
    rows = blocked.Rows(lse, entropy, dlogps, dentropy, dlse)
    dz = tile.dlogits(z, capped, is_target, *jax.tree.map(lambda x: x[:, None], rows), spec)
    # A where, not a product: hidden states and cotangents of masked tokens may be anything.
    dz = jnp.where(mask[:, None], dz, 0)
    hidden = jnp.where(mask[:, None], hidden, 0)
    low = dz.astype(hidden.dtype)
    dhidden = jnp.einsum("cv,vd->cd", low, weight, preferred_element_type=jnp.float32)
    dweight = jnp.einsum("cv,cd->vd", low, hidden, preferred_element_type=jnp.float32)
    return dhidden.astype(hidden.dtype), dweight, None if bias is None else dz.sum(0)


def _logits(hidden, targets, weight, bias, spec):
    raw = jnp.einsum("cd,vd->cv", hidden, weight, preferred_element_type=jnp.float32)
    z, capped = tile.logits(raw, None if bias is None else bias[None], spec)
    return z, capped, tile.columns(0, z.shape) == targets[:, None]


def _cutter(tokens, chunk):
    """-> (cut: [N, ...] -> [n, C, ...], join: its inverse). Padding rows are zeros: masked."""
    count = -(-tokens // chunk)
    padding = count * chunk - tokens

    def cut(x):
        x = jnp.pad(x, [(0, padding)] + [(0, 0)] * (x.ndim - 1))
        return x.reshape(chunk, count, *x.shape[1:]).swapaxes(0, 1)

    def join(x):
        return x.swapaxes(0, 1).reshape(count * chunk, *x.shape[2:])[:tokens]

    return cut, join
