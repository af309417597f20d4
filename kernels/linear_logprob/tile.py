"""The mathematics of one tile of logits, in plain jnp: shared by every blocked implementation.

A tile is ``[C, W]``: C tokens, W neighbouring entries of the vocabulary. Values that belong to a
token are columns ``[C, 1]``, the layout vector units like best, or ``[C]`` where registers hold a
value each. Nothing here depends on how a tile was made or where it goes, so the kernels of all
platforms compute the same and one test covers them.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float32, Int

from aa_jax.kernels.linear_logprob.spec import Spec

LOWEST = -1e30
"""Stands for -inf: a product with 0 or a difference of two is finite, also after scaling."""


class Partial(NamedTuple):
    """What is known of the softmax after some tiles of the vocabulary.

    Attributes:
      top: largest logit so far.
      total: ``Σ exp(z - top)``.
      weighted: ``Σ exp(z - top) (z - top)``; None if entropies are not wanted.
      target: logit of the target, 0 while its tile was not seen.
    """

    top: Float32[Array, "C 1"]
    total: Float32[Array, "C 1"]
    weighted: Float32[Array, "C 1"] | None
    target: Float32[Array, "C 1"]


def nothing(tokens: int, spec: Spec) -> Partial:
    """Before the first tile."""
    zero = jnp.zeros((tokens, 1), jnp.float32)
    return Partial(jnp.full((tokens, 1), LOWEST), zero, zero if spec.need_entropy else None, zero)


def logits(
    raw: Float32[Array, "C W"], bias: Array | None, spec: Spec
) -> tuple[Float32[Array, "C W"], Float32[Array, "C W"]]:
    """``h Wᵀ`` to (logits, the capped logits before the temperature); bias is [1, W]."""
    z = raw if bias is None else raw + jnp.broadcast_to(bias.astype(jnp.float32), raw.shape)
    if spec.softcap is not None:
        z = spec.softcap * jnp.tanh(z * (1 / spec.softcap))
    return z if spec.temperature == 1.0 else z * (1 / spec.temperature), z


def columns(first: Int[Array, ""] | int, shape: tuple[int, int]) -> Int[Array, "C W"]:
    """The vocabulary index of every entry of a tile that begins at ``first``."""
    return jax.lax.broadcasted_iota(jnp.int32, shape, 1) + first


def update(partial: Partial, z: Float32[Array, "C W"], is_target: Bool[Array, "C W"]) -> Partial:
    """Adds a tile of logits; -inf has no weight. The partial's values are [C, 1] or [C]."""
    keep = partial.top.ndim == 2
    top = jnp.maximum(partial.top, z.max(1, keepdims=keep))
    old = jnp.exp(partial.top - top)
    shifted = z - (top if keep else spread(top, z.shape))
    e = jnp.exp(shifted)
    total = partial.total * old + e.sum(1, keepdims=keep)
    target = partial.target + jnp.where(is_target, z, 0.0).sum(1, keepdims=keep)
    weighted = partial.weighted
    if weighted is not None:
        weighted = old * (weighted + (partial.top - top) * partial.total)
        weighted = weighted + (e * jnp.maximum(shifted, LOWEST)).sum(1, keepdims=keep)
    return Partial(top, total, weighted, target)


def spread(values: Array, shape: tuple[int, int], axis: int = 0) -> Array:
    """One value per token (``axis`` 0) or vocabulary entry (1) over a whole tile."""
    return jax.lax.broadcast_in_dim(values, shape, (axis,))


def merge(parts: Partial, axis: int = 0) -> Partial:
    """Combines partial results of disjoint parts of the vocabulary, stacked along ``axis``."""
    top = parts.top.max(axis, keepdims=True)
    scale = jnp.exp(parts.top - top)
    weighted = parts.weighted
    if weighted is not None:
        weighted = scale * (weighted + jnp.maximum(parts.top - top, LOWEST) * parts.total)
        weighted = weighted.sum(axis)
    return Partial(
        top.squeeze(axis), (parts.total * scale).sum(axis), weighted, parts.target.sum(axis)
    )


def finish(partial: Partial) -> tuple[Array, Array | None, Array]:
    """-> (logps, entropy or None, lse), each [C, 1]."""
    log_total = jnp.log(partial.total)
    entropy = None
    if partial.weighted is not None:
        entropy = log_total - partial.weighted / partial.total
    # From the differences, not from z: a common offset of 1e4 would cancel badly.
    return (partial.target - partial.top) - log_total, entropy, partial.top + log_total


def dlogits(
    z: Float32[Array, "C W"],
    capped: Float32[Array, "C W"],
    is_target: Bool[Array, "C W"],
    lse: Float32[Array, "C _"],
    entropy: Float32[Array, "C _"] | None,
    dlogps: Float32[Array, "C _"],
    dentropy: Float32[Array, "C _"] | None,
    dlse: Float32[Array, "C _"],
    spec: Spec,
) -> Float32[Array, "C W"]:
    r"""Gradient with respect to ``h Wᵀ + b`` (before cap and temperature).

    .. math::
      dz_v = g_{lp} (1[v = y] - p_v) + g_{lse} p_v - g_H p_v (\log p_v + H)
    """
    log_p = z - lse
    dz = dlse - dlogps
    if spec.need_entropy:
        dz = dz - dentropy * (jnp.maximum(log_p, LOWEST) + entropy)
    dz = jnp.exp(log_p) * dz + jnp.where(is_target, dlogps, 0.0)
    if spec.softcap is not None:
        ratio = capped * (1 / spec.softcap)
        dz = dz * (1 - ratio * ratio)
    return dz if spec.temperature == 1.0 else dz * (1 / spec.temperature)
