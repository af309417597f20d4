"""What the Mosaic kernels for Hopper GPUs have in common."""

import inspect

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

PER_ROW = plgpu.Layout.WGMMA.reduce(1)
"""One value per row of what ``wgmma`` computes, each in the threads that hold the row."""

PER_COLUMN = plgpu.Layout.WGMMA.reduce(0)
"""One value per column likewise."""

# JAX below 0.11 takes an index too.
_INDEX = ((),) if "idx" in inspect.signature(plgpu.load).parameters else ()


def load(ref, layout) -> jax.Array:
    """The values behind a reference, in registers."""
    return plgpu.load(ref, *_INDEX, layout=layout, optimized=False)


def transposed(ref):
    """A matrix in shared memory as the other kind of operand."""
    return plgpu.transpose_ref(ref, (1, 0)) if _INDEX else ref.transpose((1, 0))


def full(shape: tuple[int, ...], value: float, layout) -> jax.Array:
    """Float32 registers of one value."""
    return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)


def transforms(columns: int) -> tuple:
    """How shared memory holds tiles of two bytes per entry for ``wgmma``: swizzled, 8 rows each."""
    swizzle = plgpu.find_swizzle(columns * 16)
    return plgpu.TilingTransform((8, swizzle // 2)), plgpu.SwizzleTransform(swizzle)


def compiler_params(**kwargs) -> plgpu.CompilerParams:
    """Layouts are chosen by the kernels, not inferred: the default before JAX 0.11."""
    return plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane, **kwargs)
