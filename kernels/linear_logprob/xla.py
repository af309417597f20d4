"""Blocks of tokens against the whole vocabulary in plain XLA, with a recomputing backward.

A block holds all logits of ``C`` tokens. With one block this is the naive computation (XLA merges
the recomputation with the forward pass); with several, a ``lax.scan`` keeps one block alive. On a
single device tokens that count are gathered to the front first, and blocks that hold none are
skipped. On several devices a block takes every n-th token instead, so that tokens sharded over
devices stay where they are.

On a single CPU device blocks are cut along the vocabulary as well (`tiled`), because what is done
to a logit takes as long as the matmul there unless the logits stay in the cache.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from aa_jax.kernels.linear_logprob import tile, tiled
from aa_jax.kernels.linear_logprob.spec import LogProbs, Spec

CHUNK_BYTES = {"cpu": 64 * 2**20}
"""Float32 logits of one block, by platform; accelerators take `DEFAULT_CHUNK_BYTES` per device."""

DEFAULT_CHUNK_BYTES = 256 * 2**20

KEPT_BYTES = 16 * 2**20
"""On one CPU device, logits up to this size are kept for the backward pass instead of cut."""

TILED_TOKENS = 512
"""Most tokens of a block that is also cut along the vocabulary: skipping starts at this size."""

_ROUND = 128  # blocks are multiples of this many tokens: no ragged matmul tiles


def linear_logprob(
    hidden: Float[Array, "N D"],
    head: Float[Array, "V D"],
    targets: Int[Array, "N"],
    mask: Bool[Array, "N"] | None,
    bias: Float[Array, "V"] | None,
    spec: Spec,
) -> LogProbs:
    """See `aa_jax.kernels.linear_logprob.api.linear_logprob`."""
    tokens, vocab = targets.shape[0], head.shape[0]
    chunk = min(spec.chunk or default_chunk(tokens, vocab), tokens)
    width = vocab
    if _on_one_cpu() and (chunk < tokens or 4 * tokens * vocab > KEPT_BYTES):
        chunk, width = min(chunk, TILED_TOKENS), tiled.size(vocab)
    known = (targets >= 0) & (targets < vocab)
    counts = jnp.ones_like(known) if mask is None else mask
    order = None
    if mask is not None and chunk < tokens and jax.device_count() == 1:
        order = jnp.argsort(~mask, stable=True)
    logps, entropy, lse = _logprob(
        hidden,
        head,
        bias,
        jnp.where(known & counts, targets, 0),
        counts,
        order,
        spec._replace(chunk=chunk, tile=width),
    )
    return LogProbs(jnp.where(known | ~counts, logps, jnp.nan), entropy, lse)


def _on_one_cpu():
    return jax.default_backend() == "cpu" and jax.device_count() == 1


def default_chunk(tokens: int, vocab: int, platform: str | None = None) -> int:
    """Tokens per block: within the platform's budget, and blocks of nearly equal size."""
    platform = platform or jax.default_backend()
    # Tokens are sharded over accelerators; CPU "devices" share one memory.
    budget = CHUNK_BYTES.get(platform) or DEFAULT_CHUNK_BYTES * jax.device_count()
    most = max(budget // (4 * vocab), 1)
    if tokens <= most:
        return tokens
    most = max(most // _ROUND * _ROUND, min(most, _ROUND))
    even = math.ceil(tokens / math.ceil(tokens / most))
    return min(math.ceil(even / _ROUND) * _ROUND, most)


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def _logprob(hidden, head, bias, targets, mask, order, spec):
    return _fwd(hidden, head, bias, targets, mask, order, spec)[0]


def _fwd(hidden, head, bias, targets, mask, order, spec):
    weight = head.astype(hidden.dtype)
    vocab = head.shape[0]
    tiles = None if spec.tile == vocab else tiled.cut(weight, bias, spec)
    skip = _always if order is None else _if_any

    def compute(x):
        if tiles is None:
            return _forward_block(*x, weight, bias, spec)
        return tiled.forward(*x, tiles, vocab, spec)

    def block(carry, x):
        nothing = jnp.zeros(x[1].shape, jnp.float32)
        nothing = nothing, nothing if spec.need_entropy else None, nothing
        return carry, skip(x[2], lambda: compute(x), nothing)

    cut, join = _cutter(targets.shape[0], spec.chunk, order)
    _, outs = _scan(block, None, (cut(hidden), cut(targets), cut(mask)))
    logps, entropy, lse = jax.tree.map(join, outs)
    return (logps, entropy, lse), (hidden, head, bias, targets, mask, order, entropy, lse)


def _bwd(spec, residuals, cotangents):
    hidden, head, bias, targets, mask, order, entropy, lse = residuals
    weight = head.astype(hidden.dtype)
    vocab = head.shape[0]
    tiles = None if spec.tile == vocab else tiled.cut(weight, bias, spec)
    skip = _always if order is None else _if_any

    def compute(sums, x):
        if tiles is not None:
            dhidden, sums = tiled.backward(*x[:3], x[3:], tiles, sums, vocab, spec)
            return sums, dhidden
        dhidden, dweight, dbias = _backward_block(*x, weight, bias, spec)
        return (sums[0] + dweight, None if bias is None else sums[1] + dbias), dhidden

    def block(sums, x):
        return skip(x[2], lambda: compute(sums, x), (sums, jnp.zeros_like(x[0])))

    cut, join = _cutter(targets.shape[0], spec.chunk, order)
    xs = hidden, targets, mask, entropy, lse, *cotangents
    shaped = (weight, bias) if tiles is None else tiles[:2]
    zero = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), shaped)
    (dweight, dbias), dhidden = _scan(block, zero, jax.tree.map(cut, xs))
    if tiles is not None:
        dweight = tiled.join(dweight, vocab)
        dbias = None if bias is None else dbias.reshape(-1)[:vocab]
    if bias is not None:
        dbias = dbias.astype(bias.dtype)
    return join(dhidden), dweight.astype(head.dtype), dbias, None, None, None


_logprob.defvjp(_fwd, _bwd)


def _forward_block(hidden, targets, mask, weight, bias, spec):
    """[C, D] -> (logps [C], entropy [C] or None, lse [C])."""
    z, _ = _logits(hidden, weight, bias, spec)
    top = z.max(-1, keepdims=True)
    e = jnp.exp(z - top)
    total = e.sum(-1)
    log_total = jnp.log(total)
    z_target = jnp.take_along_axis(z, targets[:, None], axis=1, mode="clip")[:, 0]
    entropy = None
    if spec.need_entropy:
        entropy = log_total - (e * _finite(z - top)).sum(-1) / total
    # From the differences, not from z: a common offset of 1e4 would cancel badly.
    outs = (z_target - top[:, 0]) - log_total, entropy, top[:, 0] + log_total
    return jax.tree.map(lambda x: jnp.where(mask, x, 0), outs)


def _backward_block(
    hidden, targets, mask, entropy, lse, dlogps, dentropy, dlse, weight, bias, spec
):
    """-> (dhidden [C, D], dweight [V, D] float32, dbias [V] float32 or None)."""
    z, capped = _logits(hidden, weight, bias, spec)
    log_p = z - lse[:, None]
    dz = (dlse - dlogps)[:, None]
    if spec.need_entropy:
        dz = dz - dentropy[:, None] * (_finite(log_p) + entropy[:, None])
    is_target = jnp.arange(z.shape[1], dtype=targets.dtype)[None] == targets[:, None]
    dz = jnp.exp(log_p) * dz + jnp.where(is_target, dlogps[:, None], 0)
    if spec.softcap is not None:
        dz = dz * (1 - (capped / spec.softcap) ** 2)
    # A where, not a product: hidden states and cotangents of masked tokens may be anything.
    dz = jnp.where(mask[:, None], dz / spec.temperature, 0)
    hidden = jnp.where(mask[:, None], hidden, 0)
    low = dz.astype(hidden.dtype)
    dhidden = jnp.einsum("cv,vd->cd", low, weight, preferred_element_type=jnp.float32)
    dweight = jnp.einsum("cv,cd->vd", low, hidden, preferred_element_type=jnp.float32)
    return dhidden.astype(hidden.dtype), dweight, None if bias is None else dz.sum(0)


def _logits(hidden, weight, bias, spec):
    """-> (z [C, V], the capped logits before the temperature)."""
    z = jnp.einsum("cd,vd->cv", hidden, weight, preferred_element_type=jnp.float32)
    if bias is not None:
        z = z + bias.astype(jnp.float32)[None]
    if spec.softcap is not None:
        z = spec.softcap * jnp.tanh(z / spec.softcap)
    return z if spec.temperature == 1.0 else z / spec.temperature, z


def _finite(x):
    """-inf becomes a number that times any cotangent and 0 is 0."""
    return jnp.maximum(x, tile.LOWEST)


def _always(mask, compute, otherwise):
    return compute()


def _if_any(mask, compute, otherwise):
    """``compute()``, or what stands for it when nothing in the block counts."""
    return jax.lax.cond(mask.any(), compute, lambda: otherwise)


def _scan(block, carry, xs):
    """``lax.scan``, or a plain call for a single block: XLA may then merge what is repeated."""
    if jax.tree.leaves(xs)[0].shape[0] == 1:
        carry, out = block(carry, jax.tree.map(lambda x: x[0], xs))
        return carry, jax.tree.map(lambda x: x[None], out)
    return jax.lax.scan(block, carry, xs)


def _cutter(tokens, chunk, order):
    """-> (cut: [N, ...] -> [n, C, ...], join: its inverse). Padding rows are zeros: masked."""
    count = -(-tokens // chunk)
    padding = count * chunk - tokens

    def cut(x):
        if order is not None:
            x = x[order]
        x = jnp.pad(x, [(0, padding)] + [(0, 0)] * (x.ndim - 1))
        if order is not None or count == 1:
            return x.reshape(count, chunk, *x.shape[1:])
        return x.reshape(chunk, count, *x.shape[1:]).swapaxes(0, 1)

    def join(x):
        if order is None and count > 1:
            x = x.swapaxes(0, 1)
        x = x.reshape(count * chunk, *x.shape[2:])[:tokens]
        return x if order is None else jnp.zeros_like(x).at[order].set(x, unique_indices=True)

    return cut, join
