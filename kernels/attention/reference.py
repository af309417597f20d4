"""The oracle: dense float32 attention with repeated heads, written to be read."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from aa_jax.kernels.attention.intervals import visible


def attention(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B S K D"],
    v: Float[Array, "B S K D"],
    intervals: Int[Array, "_ T 4"] | None,
    scale: float,
) -> Float[Array, "B T H D"]:
    """See `aa_jax.kernels.attention.api.attention`; holds ``[B, H, T, S]`` several times."""
    rows, queries, heads, _ = q.shape
    keys, kv_heads = k.shape[1:3]
    dtype = q.dtype
    q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
    if intervals is None:
        mask = jnp.ones((rows, queries, keys), bool)
    else:
        mask = jnp.broadcast_to(visible(intervals, keys), (rows, queries, keys))
    # 0 * NaN is NaN, so what nobody sees is removed before any product.
    seen = mask.any(1)[:, :, None, None]
    sees = mask.any(2)[:, :, None, None]
    q = jnp.where(sees, q, 0)
    k, v = (jnp.repeat(jnp.where(seen, x, 0), heads // kv_heads, axis=2) for x in (k, v))
    highest = jax.lax.Precision.HIGHEST
    scores = scale * jnp.einsum("bthd,bshd->bhts", q, k, precision=highest)
    # A finite stand-in for -inf keeps rows without keys free of NaN; they are zeroed below.
    weights = jax.nn.softmax(jnp.where(mask[:, None], scores, -1e30), axis=-1)
    out = jnp.einsum("bhts,bshd->bthd", weights, v, precision=highest)
    return jnp.where(sees, out, 0).astype(dtype)
