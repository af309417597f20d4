"""Self-attention of the families: projections, rotary, and the key-value cache of one token."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from aa_jax.kernels.attention import attention
from aa_jax.models import caches
from aa_jax.models.layers import Linear, RMSNorm
from aa_jax.models.rope import rotate

Angles = tuple[Array, Array]


class HeadNorm(nnx.Module):
    """LayerNorm of each head with its own scale and bias [heads, Dh] (Chameleon, 2024, 2.3)."""

    def __init__(self, heads: int, dim: int, *, eps: float, param_dtype: Any):
        self.scale = nnx.Param(jnp.ones((heads, dim), param_dtype))
        self.bias = nnx.Param(jnp.zeros((heads, dim), param_dtype))
        self.eps = eps

    def __call__(self, x: Float[Array, "*batch heads Dh"]) -> Float[Array, "*batch heads Dh"]:
        wide = x.astype(jnp.float32)
        wide = wide - jnp.mean(wide, axis=-1, keepdims=True)
        wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)
        scale, bias = (jnp.broadcast_to(p[...], x.shape) for p in (self.scale, self.bias))
        return (wide * scale + bias).astype(x.dtype)


# What may be done to queries and keys by head, before they are rotated:
# name -> (heads, head_dim, eps of the model's norms, parameter type) -> module.
QK_NORMS: dict[str, Callable[[int, int, float, Any], nnx.Module | None]] = {
    "none": lambda heads, dim, eps, dtype: None,
    "rms": lambda heads, dim, eps, dtype: RMSNorm(dim, eps=eps, param_dtype=dtype),
    # Chameleon's epsilon is torch's default, whatever the config says of the other norms.
    "layer": lambda heads, dim, eps, dtype: HeadNorm(heads, dim, eps=1e-5, param_dtype=dtype),
}


# Tokens a query sees of its row, itself included; an array where the layers of a stack differ.
Window = int | Int[Array, ""] | None


def windowed(intervals: Int[Array, "B T 4"], window: Window) -> Int[Array, "B T 4"]:
    """The last ``window`` keys of what each query may see; None: all of it.

    A sliding window (Beltagy et al., 2020, section 3.1; Mistral, Jiang et al., 2023, section 2)
    counts the query's own token. Of two intervals [a0, a1) and [b0, b1) the first ends where the
    second goes on, as a shared prompt does before a response, wherever in the row they stand.
    """
    if window is None:
        return intervals
    a0, a1, b0, b1 = (intervals[..., i] for i in range(4))
    left = jnp.maximum(window - (b1 - b0), 0)
    return jnp.stack([jnp.maximum(a0, a1 - left), a1, jnp.maximum(b0, b1 - window), b1], axis=-1)


def within(keys: Int[Array, "S"], query: Int[Array, "*batch 1"], window: Window) -> Array:
    """Which keys, by position, a query at a position may see: bool [*batch, S]."""
    keys = keys.reshape((1,) * (query.ndim - 1) + (-1,))
    seen = keys <= query
    return seen if window is None else seen & (keys > query - window)


class Attention(nnx.Module):
    """Grouped-query attention (Ainslie et al., 2023): H query heads share K key-value heads."""

    def __init__(
        self,
        dim: int,
        *,
        heads: int,
        kv_heads: int,
        head_dim: int,
        qkv_bias: bool,
        out_bias: bool,
        std: float,
        out_std: float,
        rngs: nnx.Rngs,
        param_dtype: Any,
        qk_norm: str = "none",
        norm_eps: float = 1e-6,
    ):
        kwargs = dict(rngs=rngs, param_dtype=param_dtype)
        self.q = Linear(dim, heads * head_dim, bias=qkv_bias, std=std, **kwargs)
        self.k = Linear(dim, kv_heads * head_dim, bias=qkv_bias, std=std, **kwargs)
        self.v = Linear(dim, kv_heads * head_dim, bias=qkv_bias, std=std, **kwargs)
        self.o = Linear(heads * head_dim, dim, bias=out_bias, std=out_std, **kwargs)
        self.q_norm = QK_NORMS[qk_norm](heads, head_dim, norm_eps, param_dtype)
        self.k_norm = QK_NORMS[qk_norm](kv_heads, head_dim, norm_eps, param_dtype)
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, head_dim

    def qkv(
        self, x: Float[Array, "*batch D"], angles: Angles | None
    ) -> tuple[
        Float[Array, "*batch H Dh"], Float[Array, "*batch K Dh"], Float[Array, "*batch K Dh"]
    ]:
        """Queries, keys and values by head; the first two normed, and rotated given angles."""
        shape = (*x.shape[:-1], -1, self.head_dim)
        q, k, v = self.q(x).reshape(shape), self.k(x).reshape(shape), self.v(x).reshape(shape)
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if angles is not None:
            q, k = rotate(q, *angles), rotate(k, *angles)
        return q, k, v

    def __call__(
        self,
        x: Float[Array, "B T D"],
        angles: Angles | None,
        intervals: Int[Array, "B T 4"] | None,
    ) -> tuple[Float[Array, "B T D"], tuple[Float[Array, "B T K Dh"], Float[Array, "B T K Dh"]]]:
        """Attends over the row; intervals None means every key (towers).

        Returns:
            The output, and the keys and values for a cache.
        """
        q, k, v = self.qkv(x, angles)
        y = attention(q, k, v, intervals=intervals, causal=False)
        return self.o(y.reshape(*x.shape[:-1], -1)), (k, v)

    def decode(
        self,
        x: Float[Array, "B D"],
        angles: Angles,
        keys: Float[Array, "*L B K S Dh"],
        values: Float[Array, "*L B K S Dh"],
        layer: Int[Array, ""] | None,
        length: Int[Array, "B"],
        window: Window = None,
    ) -> tuple[Float[Array, "B D"], Float[Array, "*L B K S Dh"], Float[Array, "*L B K S Dh"]]:
        """One token per row, written at its row's own length and attending to all before it.

        The whole cache travels as a carry and only [B, K, Dh] of it is written, so no layer
        copies it. Heads stand before slots: each head's keys are then one matrix in memory, which
        the products below read without a transposed copy. A row whose length has reached S writes
        nothing.
        """
        q, k, v = self.qkv(x, angles)
        keys = caches.write(keys, layer, length, k)
        values = caches.write(values, layer, length, v)
        q = q.reshape(x.shape[0], self.kv_heads, -1, self.head_dim) * self.head_dim**-0.5
        mine = caches.of_layer(keys, layer)
        scores = jnp.einsum("bkgd,bksd->bkgs", q, mine, preferred_element_type=jnp.float32)
        seen = within(jnp.arange(mine.shape[2], dtype=jnp.int32), length[:, None], window)
        scores = jnp.where(seen[:, None, None, :], scores, jnp.finfo(jnp.float32).min)
        weights = jax.nn.softmax(scores, axis=-1).astype(x.dtype)
        mine = caches.of_layer(values, layer)
        y = jnp.einsum("bkgs,bksd->bkgd", weights, mine.astype(x.dtype))
        return self.o(y.reshape(x.shape[0], -1)), keys, values

    def decode_behind(
        self,
        x: Float[Array, "B D"],
        angles: Angles,
        prompts: tuple[Array, Array, Array],
        keys: Float[Array, "*L B K R Dh"],
        values: Float[Array, "*L B K R Dh"],
        layer: Int[Array, ""] | None,
        spot: Int[Array, "B"],
        window: Window = None,
    ) -> tuple[Float[Array, "B D"], Float[Array, "*L B K R Dh"], Float[Array, "*L B K R Dh"]]:
        """As `decode`, behind prompts that rows share: nothing of a prompt is copied per row.

        ``prompts`` are keys and values [L,P,K,S,Dh] and lengths [P]; the W = B / P rows of a prompt
        stand together. ``keys`` and ``values`` hold responses only: a row's token is written at its
        spot (R: nowhere), and sees the prompt and the response up to itself.
        """
        q, k, v = self.qkv(x, angles)
        keys, values = caches.write(keys, layer, spot, k), caches.write(values, layer, spot, v)
        shared_keys, shared_values = (caches.of_layer(entry, layer) for entry in prompts[:2])
        mine, lengths = caches.of_layer(keys, layer), prompts[2]
        count, room = shared_keys.shape[0], shared_keys.shape[2]
        q = q.reshape(x.shape[0], self.kv_heads, -1, self.head_dim) * self.head_dim**-0.5
        grouped = q.reshape(count, -1, *q.shape[1:])
        wide = dict(preferred_element_type=jnp.float32)
        before = jnp.einsum("pwkgd,pksd->pwkgs", grouped, shared_keys, **wide)
        own = jnp.einsum("bkgd,bkrd->bkgr", q, mine, **wide)
        slots = jnp.arange(room, dtype=jnp.int32)
        seen = (slots[None, :] < lengths[:, None])[:, None, :]
        query = lengths[:, None] + spot.reshape(count, -1)
        seen = seen & within(slots, query[..., None], window)
        lowest = jnp.finfo(jnp.float32).min
        before = jnp.where(seen[:, :, None, None, :], before, lowest)
        seen = within(jnp.arange(mine.shape[2], dtype=jnp.int32), spot[:, None], window)
        own = jnp.where(seen[:, None, None, :], own, lowest)
        scores = jnp.concatenate([before.reshape(*own.shape[:3], room), own], axis=-1)
        weights = jax.nn.softmax(scores, axis=-1).astype(x.dtype)
        left = weights[..., :room].reshape(before.shape)
        y = jnp.einsum("pwkgs,pksd->pwkgd", left, shared_values.astype(x.dtype))
        y = y.reshape(q.shape) + jnp.einsum(
            "bkgr,bkrd->bkgd", weights[..., room:], caches.of_layer(values, layer).astype(x.dtype)
        )
        return self.o(y.reshape(x.shape[0], -1)), keys, values
