"""How a decode loop holds the keys and values: all layers in one array, or an array per layer."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from aa_jax.platforms import target

# An entry of a cache: [L,...], or a tuple of L arrays.
Entry = Any
_LAYERED = ("prompt_k", "prompt_v", "k", "v")


def for_loop(cache: dict[str, Any]) -> dict[str, Any]:
    """The cache as a loop around `Model.decode` should carry it.

    XLA:CPU reads one layer of a stacked cache by copying it, in every layer of every step, which
    took half the time of a small model's step. There every layer gets an array of its own, and
    `Model.decode` runs the layers one by one. Elsewhere the slice is read where it stands, and the
    cache stays stacked, which compiles one layer for all.
    """
    if target.backend() != "cpu":
        return cache
    return {
        name: tuple(value[i] for i in range(value.shape[0])) if name in _LAYERED else value
        for name, value in cache.items()
    }


def of_layer(entry: Float[Array, "*layer B K S Dh"], layer: Int[Array, ""] | None) -> Array:
    """One layer's keys or values [B,K,S,Dh]; layer None: the entry is one layer's already."""
    return entry if layer is None else entry[layer]


def write(
    entry: Float[Array, "*layer B K S Dh"],
    layer: Int[Array, ""] | None,
    spot: Int[Array, "B"],
    new: Float[Array, "B K Dh"],
) -> Array:
    """The entry with every row's new key or value at its spot; beyond S nothing is written.

    Rows are batch dimensions of the scatter: with row numbers as indices, devices that share the
    rows would send each other all that is new.
    """
    at, outer = spot[:, None], entry.ndim - 4  # the axis of rows
    if layer is not None:
        at = jnp.concatenate([jnp.full_like(at, layer), at], axis=1)
    indexed = (*range(outer), outer + 2)
    dims = jax.lax.ScatterDimensionNumbers(
        update_window_dims=(1, 2), inserted_window_dims=indexed,
        scatter_dims_to_operand_dims=indexed, operand_batching_dims=(outer,),
        scatter_indices_batching_dims=(0,),
    )  # fmt: skip
    return jax.lax.scatter(
        entry, at, new.astype(entry.dtype), dims, unique_indices=True, mode="drop"
    )
