"""Building blocks shared by the families: NNX modules that hold only ``nnx.Param`` leaves.

Activations set the compute type: every module casts its own weights to ``x.dtype``, so parameters
may be stored in fp32 while the matmuls run in bf16. Norms, softmax and rotary angles are fp32.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from aa_jax.errors import ConfigError
from aa_jax.platforms import target

# Hugging Face's `hidden_act` names, spelt as its configs spell them.
ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_new": lambda x: jax.nn.gelu(x, approximate=True),
    "gelu_pytorch_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "relu": jax.nn.relu,
}

# What the backward pass of a layer may keep; the rest is recomputed from the layer's input.
REMAT_POLICIES: dict[str, Callable[[Callable], Callable]] = {
    "none": lambda body: body,
    "full": lambda body: jax.checkpoint(body, prevent_cse=False),
    "dots": lambda body: jax.checkpoint(
        body,
        prevent_cse=False,
        policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    ),
}


def normal(rngs: nnx.Rngs, shape: tuple[int, ...], std: float, dtype: Any) -> nnx.Param:
    """A parameter drawn from N(0, std²)."""
    # Drawn flat: XLA:CPU compiles a counter over one axis five times faster than over several.
    drawn = jax.random.normal(rngs.params(), (math.prod(shape),), dtype)
    return nnx.Param(std * drawn.reshape(shape))


def matmul(x: Float[Array, "*batch n_in"], kernel: Float[Array, "n_in n_out"]) -> Array:
    """``x @ kernel`` [*batch, n_out].

    XLA:CPU transposes both operands element by element for a weight gradient that sums over more
    than one axis; flattened to one, the gradient of an MLP is five times faster there. Elsewhere
    the axes stay apart, so that batch and sequence may be sharded separately.
    """
    if target.backend() != "cpu" or x.ndim < 3:
        return x @ kernel
    return (x.reshape(-1, x.shape[-1]) @ kernel).reshape(*x.shape[:-1], -1)


class Linear(nnx.Module):
    """``x @ kernel + bias``; kernel is [in, out], the transpose of torch's.

    `models.variants` may put an adapter beside the kernel and a quantised one in its place.
    """

    def __init__(
        self, n_in: int, n_out: int, *, bias: bool, std: float, rngs: nnx.Rngs, param_dtype: Any
    ):
        self.kernel = normal(rngs, (n_in, n_out), std, param_dtype)
        self.bias = nnx.Param(jnp.zeros((n_out,), param_dtype)) if bias else None
        self.lora: nnx.Module | None = None

    def __call__(self, x: Float[Array, "*batch n_in"]) -> Float[Array, "*batch n_out"]:
        quantized = isinstance(self.kernel, nnx.Module)
        y = self.kernel(x) if quantized else matmul(x, self.kernel[...].astype(x.dtype))
        if self.bias is not None:
            y = y + jnp.broadcast_to(self.bias[...].astype(x.dtype), y.shape)
        return y if self.lora is None else y + self.lora(x)


class Embedding(nnx.Module):
    """A table of ``num`` vectors."""

    def __init__(self, num: int, dim: int, *, std: float, rngs: nnx.Rngs, param_dtype: Any):
        self.weight = normal(rngs, (num, dim), std, param_dtype)

    def __call__(self, ids: Int[Array, "*batch"], dtype: Any) -> Float[Array, "*batch D"]:
        return jnp.take(self.weight[...], ids, axis=0).astype(dtype)


class RMSNorm(nnx.Module):
    """``x / rms(x) * scale`` in fp32 (Zhang & Sennrich, 2019, eq. 4)."""

    def __init__(self, dim: int, *, eps: float, param_dtype: Any):
        self.scale = nnx.Param(jnp.ones((dim,), param_dtype))
        self.eps = eps

    def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        wide = x.astype(jnp.float32)
        wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)
        return (wide * jnp.broadcast_to(self.scale[...], x.shape)).astype(x.dtype)


class LayerNorm(nnx.Module):
    """``(x - mean) / std * scale + bias`` in fp32 (Ba et al., 2016)."""

    def __init__(self, dim: int, *, eps: float, param_dtype: Any):
        self.scale = nnx.Param(jnp.ones((dim,), param_dtype))
        self.bias = nnx.Param(jnp.zeros((dim,), param_dtype))
        self.eps = eps

    def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        wide = x.astype(jnp.float32)
        wide = wide - jnp.mean(wide, axis=-1, keepdims=True)
        wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)
        scale, bias = (jnp.broadcast_to(p[...], x.shape) for p in (self.scale, self.bias))
        return (wide * scale + bias).astype(x.dtype)


class GatedMLP(nnx.Module):
    """``down(act(gate(x)) * up(x))``, SwiGLU when act is silu (Shazeer, 2020, eq. 6)."""

    def __init__(
        self,
        dim: int,
        hidden: int,
        *,
        act: str,
        bias: bool,
        std: float,
        rngs: nnx.Rngs,
        param_dtype: Any,
    ):
        kwargs = dict(bias=bias, std=std, rngs=rngs, param_dtype=param_dtype)
        self.gate = Linear(dim, hidden, **kwargs)
        self.up = Linear(dim, hidden, **kwargs)
        self.down = Linear(hidden, dim, **kwargs)
        self.act = ACTIVATIONS[act]

    def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        return self.down(self.act(self.gate(x)) * self.up(x))


def stacked(make: Callable[[nnx.Rngs], nnx.Module], num: int, rngs: nnx.Rngs) -> nnx.Module:
    """``num`` copies of one module, drawn independently, as one module with a leading layer axis.

    Args:
        make: builds one layer from its random stream.
        num: number of layers, at least 1.
        rngs: stream the layers' own keys are split from.

    Returns:
        A module of ``make``'s class whose every parameter is [num, ...]; run it with `scan_layers`.
    """

    def init(key: Array) -> tuple[Any, Any]:
        return nnx.split(make(nnx.Rngs(params=key)), nnx.Param)

    graphdef, state = jax.vmap(init)(jax.random.split(rngs.params(), num))
    return nnx.merge(graphdef, state)


def scan_layers(
    stack: nnx.Module,
    carry: Any,
    body: Callable[[Any, Any, Any], tuple[Any, Any]],
    *,
    start: int = 0,
    stop: int | None = None,
    remat: str = "none",
) -> tuple[Any, Any]:
    """Runs ``body`` over the layers ``start:stop`` of a stack, compiling one layer for all.

    Args:
        stack: module from `stacked`.
        carry: what one layer hands to the next.
        body: ``(layer, carry, index) -> (carry, y)``; index is the int32 number of the layer.
        start: first layer run.
        stop: one past the last layer run; None runs to the end.
        remat: key of `REMAT_POLICIES`.

    Returns:
        The last carry and the layers' ``y`` stacked on a leading axis.
    """
    graphdef, state = nnx.split(stack, nnx.Param)
    num = jax.tree.leaves(state)[0].shape[0]
    stop = num if stop is None else stop
    if (start, stop) != (0, num):
        state = jax.tree.map(lambda leaf: leaf[start:stop], state)

    def step(carry: Any, xs: Any) -> tuple[Any, Any]:
        layer, index = xs
        return body(nnx.merge(graphdef, layer), carry, index)

    indices = jnp.arange(start, stop, dtype=jnp.int32)
    return jax.lax.scan(REMAT_POLICIES[remat](step), carry, (state, indices))


def one_layer(stack: nnx.Module, index: int) -> nnx.Module:
    """Layer number ``index`` of a module from `stacked`."""
    graphdef, state = nnx.split(stack, nnx.Param)
    return nnx.merge(graphdef, jax.tree.map(lambda leaf: leaf[index], state))


def place_features(
    x: Float[Array, "B T D"],
    features: Float[Array, "B F D"],
    feature_index: Int[Array, "B T"],
) -> Float[Array, "B T D"]:
    """Puts media features where their tokens stand; -1 keeps the text embedding.

    An index past the row's last feature fills NaN, so a wrong batch is seen in the loss at once.
    """
    index = jnp.maximum(feature_index, 0)
    placed = jax.vmap(lambda f, i: jnp.take(f, i, axis=0, mode="fill"))(features, index)
    return jnp.where((feature_index >= 0)[..., None], placed.astype(x.dtype), x)


def check_choice(what: str, value: str, choices: dict[str, Any]) -> None:
    """Raises ConfigError naming the value received and what there is."""
    if value not in choices:
        raise ConfigError(f"{what} is {value!r}; it must be one of {', '.join(sorted(choices))}.")
