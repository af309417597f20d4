"""Checksums of arrays where they lie: nothing is gathered, and any mesh gives the same."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from aa_jax.sharding.rules import on_device


def checksums(arrays: Sequence[jax.Array]) -> list[int]:
    """One uint32 per array, the same on any mesh; a change of any one value changes it."""
    groups: dict[Any, list[int]] = {}
    for i, x in enumerate(arrays):
        mesh = x.sharding.mesh if isinstance(x.sharding, NamedSharding) else None
        groups.setdefault(NamedSharding(mesh, P()) if mesh else x.sharding, []).append(i)
    sums = [0] * len(arrays)
    for place, members in groups.items():
        values = _checksum_program(place)(tuple(arrays[i] for i in members))
        for i, value in zip(members, np.asarray(values).tolist(), strict=True):
            sums[i] = value
    return sums


@functools.lru_cache(maxsize=8)
def _checksum_program(place: Any) -> Callable[..., jax.Array]:
    def program(arrays: tuple[jax.Array, ...]) -> jax.Array:
        return jnp.stack([_checksum(x) for x in on_device(arrays)])

    return jax.jit(program, out_shardings=place)


def _checksum(x: jax.Array) -> jax.Array:
    if x.dtype == jnp.bool_:
        x = x.astype(jnp.uint8)
    bits = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * min(x.dtype.itemsize, 4)}"))
    bits = bits.astype(jnp.uint32)
    # The position enters by elementwise iotas: a reshape would gather a sharded array.
    weight, stride = jnp.ones(bits.shape, jnp.uint32), 2
    for dim in reversed(range(bits.ndim)):
        iota = jax.lax.broadcasted_iota(jnp.uint32, bits.shape, dim)
        weight = weight + iota * jnp.uint32(stride % 2**32)
        stride *= bits.shape[dim]
    # Every weight is odd, so multiplying by it loses nothing modulo 2**32.
    return jnp.sum(bits * weight, dtype=jnp.uint32)
