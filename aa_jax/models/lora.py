"""Low-rank adapters: ``y = x W + s (x A) B`` with W frozen (Hu et al., 2021, section 4.1)."""

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from aa_jax.models.layers import matmul


@dataclasses.dataclass(frozen=True)
class Lora:
    """Which linear layers have an adapter, and of what size.

    Attributes:
        rank: r.
        alpha: says how strong the adapter's output is, see `scale`.
        layers: paths of the adapted layers.
        full: paths of further parameters, which train as they are.
        rslora: the strength does not fall with the rank (Kalajdzievski, 2023).
    """

    rank: int
    alpha: float
    layers: tuple[str, ...]
    full: tuple[str, ...] = ()
    rslora: bool = False

    @property
    def scale(self) -> float:
        """s, the factor of the adapter's output."""
        return self.alpha / (self.rank**0.5 if self.rslora else self.rank)


def bound(n_in: int) -> float:
    """A is drawn uniformly from ± this, as PEFT does: kaiming_uniform with a = sqrt(5)."""
    return n_in**-0.5


class Adapter(nnx.Module):
    """``scale · (x a) b`` in fp32 parameters; drawn as PEFT draws it, so that b = 0 at first."""

    def __init__(self, shape: Sequence[int], lora: Lora, rngs: nnx.Rngs):
        *stack, n_in, n_out = shape
        edge = bound(n_in)
        count = math.prod(stack) * n_in * lora.rank
        drawn = jax.random.uniform(rngs.params(), (count,), jnp.float32, -edge, edge)
        self.a = nnx.Param(drawn.reshape(*stack, n_in, lora.rank))
        self.b = nnx.Param(jnp.zeros((*stack, lora.rank, n_out), jnp.float32))
        self.scale = lora.scale

    def __call__(self, x: Float[Array, "*batch n_in"]) -> Float[Array, "*batch n_out"]:
        small = matmul(x, self.a[...].astype(x.dtype))
        return self.scale * matmul(small, self.b[...].astype(x.dtype))
