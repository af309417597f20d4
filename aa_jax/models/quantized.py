"""Weights of frozen linear layers in 4 or 8 bits, made wide again inside the layer.

NF4 (Dettmers et al., 2023, "QLoRA", section 3): the sixteen quantiles of a normal distribution, one
scale per block of input features. int8: 127 even steps either way, one scale per output feature.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int8, UInt8

from aa_jax.errors import ConfigError
from aa_jax.models.layers import check_choice, matmul
from aa_jax.models.names import Axes
from aa_jax.sharding.rules import whole

# QLoRA, appendix E.
NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)

KINDS = ("nf4", "int8")

Codes = UInt8[Array, "*layers in_or_half n_out"] | Int8[Array, "*layers in_or_half n_out"]
Scales = Float[Array, "*layers blocks n_out"]
Kernel = Float[Array, "*layers n_in n_out"]


@dataclasses.dataclass(frozen=True)
class Quantization:
    """How kernels are stored.

    Attributes:
        kind: "nf4" or "int8".
        block: input features that share a scale (nf4); a kernel they do not divide takes the
            largest block below that does.
    """

    kind: str = "nf4"
    block: int = 64

    def __post_init__(self):
        check_choice("quantize.kind", self.kind, dict.fromkeys((*KINDS, "none")))
        if self.block < 1:
            raise ConfigError(f"quantize.block is {self.block}; it must be at least 1.")

    def blocks(self, n_in: int) -> int:
        """Scales per output feature of a kernel with ``n_in`` input features."""
        if self.kind == "int8":
            return 1
        largest = min(self.block, n_in)
        return n_in // next(size for size in range(largest, 0, -1) if n_in % size == 0)


def quantize(kernel: Kernel, how: Quantization) -> tuple[Codes, Scales]:
    """The codes and scales nearest to a kernel.

    Args:
        kernel: of any floating type.
        how: kind and block.

    Returns:
        nf4: uint8 [..., in / 2, out], the feature of even number in the high half of a byte, as
        bitsandbytes packs them; int8: int8 [..., in, out]. Scales are fp32.

    Raises:
        ConfigError: nf4 of an odd number of input features.
    """
    wide = kernel.astype(jnp.float32)
    *layers, n_in, n_out = wide.shape
    if how.kind == "nf4" and n_in % 2:
        raise ConfigError(
            f"A kernel with {n_in} input features cannot be stored as nf4, which packs two in a "
            "byte; leave its layer out of quantize.targets, or use int8."
        )
    blocks = how.blocks(n_in)
    wide = wide.reshape(*layers, blocks, n_in // blocks, n_out)
    scales = jnp.max(jnp.abs(wide), axis=-2)
    unit = wide / jnp.where(scales == 0, 1.0, scales)[..., None, :]
    unit = unit.reshape(*layers, n_in, n_out)
    if how.kind == "int8":
        return jnp.round(127.0 * unit).astype(jnp.int8), scales
    table = np.asarray(NF4, np.float32)
    nearest = sum((unit > middle).astype(jnp.uint8) for middle in (table[1:] + table[:-1]) / 2)
    pairs = nearest.reshape(*layers, n_in // 2, 2, n_out)
    return pairs[..., 0, :] << 4 | pairs[..., 1, :], scales


def dequantize(codes: Codes, scales: Scales) -> Kernel:
    """The kernel that codes and scales stand for, fp32; the codes' type says which kind.

    Scales are multiplied with what is the same for all kernels (steps, the table) before either
    meets a kernel: a number broadcast to a kernel's size by itself is one that a loop over layers
    keeps in memory from its start to its end.
    """
    nf4 = codes.dtype == jnp.uint8
    if nf4:
        codes = jnp.stack([codes >> 4, codes & 15], axis=-2)
        codes = codes.reshape(*codes.shape[:-3], -1, codes.shape[-1])
    *layers, n_in, n_out = codes.shape
    codes = codes.reshape(*layers, scales.shape[-2], -1, n_out)
    scales = scales[..., None, :]
    wide = _nf4(codes, scales) if nf4 else codes.astype(jnp.float32) * (scales / 127.0)
    return wide.reshape(*layers, n_in, n_out)


def _nf4(codes: Array, scales: Array) -> Array:
    """Table value times scale, by selecting on one bit after another: a lookup is slow on every
    platform."""
    values = [value * scales for value in NF4]
    for bit in range(4):
        chosen = (codes >> bit) & 1 == 1
        values = [
            jnp.where(chosen, odd, even)
            for even, odd in zip(values[::2], values[1::2], strict=True)
        ]
    return values[0]


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def multiply(
    x: Float[Array, "*batch n_in"], codes: Codes, scales: Scales, axes: Axes = (None, None)
) -> Array:
    """``x @ kernel`` [*batch, n_out] in x's type.

    The backward pass makes the kernel again: kept from the forward pass, the kernels of all layers
    would lie in memory in full width. Codes and scales have no gradient.

    Args:
        x: activations.
        codes: of one layer.
        scales: of one layer.
        axes: logical axis names of the kernel. On a mesh the codes are gathered, not the kernel.
    """
    return matmul(x, _kernel(codes, scales, axes).astype(x.dtype))


def _kernel(codes: Any, scales: Any, axes: Axes) -> Kernel:
    n_in, n_out = axes
    scales = whole(scales, None if scales.shape[-2] == 1 else n_in, n_out)
    return dequantize(whole(codes, n_in, n_out), scales)


def _forward(x: Any, codes: Any, scales: Any, axes: Axes) -> tuple[Array, tuple[Any, Any]]:
    return multiply(x, codes, scales, axes), (codes, scales)


def _backward(axes: Axes, kept: tuple[Any, Any], dy: Any) -> tuple[Array, Any, Any]:
    codes, scales = kept
    dx = matmul(dy, _kernel(codes, scales, axes).astype(dy.dtype).T)
    return dx, np.zeros(codes.shape, jax.dtypes.float0), jnp.zeros_like(scales)


multiply.defvjp(_forward, _backward)


class QuantizedKernel(nnx.Module):
    """What takes the place of a `Linear`'s kernel."""

    def __init__(self, kernel: Kernel, how: Quantization, axes: Axes):
        codes, scales = quantize(kernel, how)
        self.codes, self.scales = nnx.Param(codes), nnx.Param(scales)
        self.axes = axes

    def __call__(self, x: Float[Array, "*batch n_in"]) -> Float[Array, "*batch n_out"]:
        return multiply(x, self.codes[...], self.scales[...], self.axes)


@functools.partial(jax.jit, static_argnums=1)
def quantize_on_device(kernel: Kernel, how: Quantization) -> tuple[Codes, Scales]:
    """`quantize`, compiled once per shape."""
    return quantize(kernel, how)
