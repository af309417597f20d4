"""The mask model: a query sees the keys of at most two index intervals.

``[a0, a1) ∪ [b0, b1)`` covers causal, padded, packed, windowed and prefix-bidirectional rows, and
rows that share a prompt between several responses, in four integers per query instead of a
``[T, S]`` mask.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from aa_jax.errors import ConfigError


def visible(intervals: Int[Array, "B T 4"], keys: int) -> Bool[Array, "B T S"]:
    """The dense mask: True where query t may see key s, for ``S = keys``."""
    s = jnp.arange(keys, dtype=intervals.dtype)[None, None, :]
    a0, a1, b0, b1 = (intervals[..., i : i + 1] for i in range(4))
    return ((s >= a0) & (s < a1)) | ((s >= b0) & (s < b1))


def causal_intervals(length: int) -> Int[Array, "1 T 4"]:
    """Query t sees keys 0..t: ``[0, 0) ∪ [0, t + 1)``."""
    end = jnp.arange(1, length + 1, dtype=jnp.int32)
    zero = jnp.zeros_like(end)
    return jnp.stack([zero, zero, zero, end], axis=-1)[None]


def resolve(
    intervals: Int[Array, "_ T 4"] | None, causal: bool, queries: int, keys: int
) -> Int[Array, "_ T 4"] | None:
    """One description of the mask: what ``intervals`` allow and, if asked, causality too.

    Returns:
      Intervals with a leading axis of B or 1, clipped to ``[0, keys]``, or None for full attention.

    Raises:
      ConfigError: ``causal`` with unequal numbers of queries and keys, where "the past" is not
        defined: a cached step says what it may see with ``intervals``.
    """
    if causal and queries != keys:
        raise ConfigError(
            f"attention: causal=True needs as many keys as queries, got {queries} queries and "
            f"{keys} keys; pass intervals=[[0, 0, 0, length]] for queries that read a cache."
        )
    if intervals is None:
        return causal_intervals(queries) if causal else None
    intervals = jnp.clip(intervals.astype(jnp.int32), 0, keys)
    if causal:
        past = causal_intervals(queries)[..., 3:]
        ends = jnp.minimum(intervals[..., 1::2], past)
        intervals = jnp.stack(
            [intervals[..., 0], ends[..., 0], intervals[..., 2], ends[..., 1]], axis=-1
        )
    return intervals


def nonempty(intervals: Int[Array, "_ T 4"]) -> Bool[Array, "_ T"]:
    """True for queries that see at least one key (intervals already clipped to the keys)."""
    return (intervals[..., 1] > intervals[..., 0]) | (intervals[..., 3] > intervals[..., 2])
