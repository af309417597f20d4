"""The vision towers of Qwen2-VL (Wang et al., 2024) and Qwen2.5-VL (Bai et al., 2025)."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from aa_jax.errors import MediaError
from aa_jax.kernels.attention import attention
from aa_jax.models.layers import (
    ACTIVATIONS,
    GatedMLP,
    LayerNorm,
    Linear,
    RMSNorm,
    scan_layers,
    stacked,
)
from aa_jax.models.qwen2_vl import grid as grids
from aa_jax.models.qwen2_vl.config import VisionConfig
from aa_jax.models.rope import rotate
from aa_jax.sharding.rules import constrain

NORM_EPS = 1e-6  # no config names it


class Attention(nnx.Module):
    """Self-attention with one projection for queries, keys and values, as checkpoints store it."""

    def __init__(self, dim: int, heads: int, *, std: float, rngs: nnx.Rngs, param_dtype: Any):
        kwargs = dict(bias=True, std=std, rngs=rngs, param_dtype=param_dtype)
        self.qkv = Linear(dim, 3 * dim, **kwargs)
        self.o = Linear(dim, dim, **kwargs)
        self.heads = heads

    def __call__(
        self,
        x: Float[Array, "B P D"],
        angles: tuple[Array, Array],
        intervals: Int[Array, "B P 4"],
    ) -> Float[Array, "B P D"]:
        q, k, v = jnp.moveaxis(
            self.qkv(x).reshape(*x.shape[:2], 3, self.heads, x.shape[2] // self.heads), 2, 0
        )
        y = attention(rotate(q, *angles), rotate(k, *angles), v, intervals=intervals)
        return self.o(y.reshape(x.shape))


class MLP(nnx.Module):
    """``fc2(act(fc1(x)))``."""

    def __init__(self, dim: int, hidden: int, *, act: str, **kwargs: Any):
        self.fc1 = Linear(dim, hidden, **kwargs)
        self.fc2 = Linear(hidden, dim, **kwargs)
        self.act = ACTIVATIONS[act]

    def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        return self.fc2(self.act(self.fc1(x)))


def norm(config: VisionConfig, param_dtype: Any) -> nnx.Module:
    """A norm of the tower's width, of the generation's kind."""
    kind = RMSNorm if config.gated else LayerNorm
    return kind(config.hidden_size, eps=NORM_EPS, param_dtype=param_dtype)


class Block(nnx.Module):
    """One pre-norm encoder layer."""

    def __init__(self, config: VisionConfig, *, rngs: nnx.Rngs, param_dtype: Any):
        kwargs = dict(std=config.initializer_range, rngs=rngs, param_dtype=param_dtype)
        self.attn_norm = norm(config, param_dtype)
        self.attn = Attention(config.hidden_size, config.num_heads, **kwargs)
        self.mlp_norm = norm(config, param_dtype)
        mlp = GatedMLP if config.gated else MLP
        self.mlp = mlp(
            config.hidden_size,
            config.intermediate_size,
            act=config.hidden_act,
            bias=True,
            **kwargs,
        )

    def __call__(
        self,
        x: Float[Array, "B P D"],
        angles: tuple[Array, Array],
        intervals: Int[Array, "B P 4"],
    ) -> Float[Array, "B P D"]:
        x = constrain(x, "batch", None, None)
        x = x + self.attn(self.attn_norm(x), angles, intervals)
        return constrain(x + self.mlp(self.mlp_norm(x)), "batch", None, None)


class VisionTower(nnx.Module):
    """Packed patches of images and videos of any size to one vector per patch."""

    def __init__(
        self,
        config: VisionConfig,
        *,
        rngs: nnx.Rngs,
        dtype: Any,
        param_dtype: Any,
        remat: str,
    ):
        # The checkpoint's 3-D convolution has stride = kernel: a matmul over each patch's numbers.
        self.patch = Linear(
            config.patch_numbers,
            config.hidden_size,
            bias=False,
            std=config.initializer_range,
            rngs=rngs,
            param_dtype=param_dtype,
        )
        self.layers = stacked(
            lambda rngs: Block(config, rngs=rngs, param_dtype=param_dtype), config.num_layers, rngs
        )
        self.config, self.dtype, self.remat = config, dtype, remat

    def angles(self, at: grids.Layout) -> tuple[Array, Array]:
        """cos and sin [B, P, Dh / 2]: half of the angles turn with the row, half with the column
        (section 2.1 of the Qwen2-VL report), at the same frequencies."""
        quarter = self.config.hidden_size // self.config.num_heads // 4
        exponents = np.arange(quarter, dtype=np.float32) / np.float32(quarter)
        frequencies = 1.0 / np.power(np.float32(self.config.rope_theta), exponents)
        turned = jnp.concatenate(
            [
                place[..., None].astype(jnp.float32) * frequencies.astype(np.float32)[None, None, :]
                for place in (at.row, at.column)
            ],
            axis=-1,
        )
        return jnp.cos(turned), jnp.sin(turned)

    def __call__(
        self, pixels: Float[Array, "B P K"], grid: Int[Array, "B I 3"]
    ) -> Float[Array, "B P1 Dv"]:
        """One vector per patch, in the order of the pixels; P is rounded up to whole features.

        A patch sees its own frame; with windows, in most layers, its own window of the frame.

        Raises:
            MediaError: the pixels are not this tower's patches.
        """
        config = self.config
        if pixels.shape[2] != config.patch_numbers:
            raise MediaError(
                f"pixel_values are {list(pixels.shape)}; this vision tower reads [rows, patches, "
                f"{config.patch_numbers}] ({config.num_channels} channels x "
                f"{config.frames_per_patch} frames x {config.patch_size} x {config.patch_size} "
                "pixels). Prepare the images with the checkpoint's own preprocessor_config.json."
            )
        # Whole features, also of padding.
        pixels = jnp.pad(pixels, ((0, 0), (0, -pixels.shape[1] % config.merge_size**2), (0, 0)))
        at = grids.layout(grid, pixels.shape[1], config.merge_size)
        cos, sin = self.angles(at)
        frame = local = grids.intervals(at.start, at.stop)
        x = self.patch(pixels.astype(self.dtype))
        cut = None
        if config.window is not None:
            cut = grids.windows(at, config.merge_size, config.window)
            local = grids.intervals(cut.start, cut.stop)
            # A frame keeps its slots in the new order, so only the windows' intervals are new.
            x, cos, sin = (_take(a, cut.order) for a in (x, cos, sin))
        full = jnp.isin(jnp.arange(config.num_layers), jnp.asarray(config.full_layers, jnp.int32))

        def body(block: Block, x: Array, index: Array) -> tuple[Array, None]:
            seen = frame if cut is None else jnp.where(full[index], frame, local)
            return block(x, (cos, sin), seen), None

        x, _ = scan_layers(self.layers, x, body, remat=self.remat)
        return x if cut is None else _take(x, cut.place)


def _take(values: Float[Array, "B P n"], order: Int[Array, "B P"]) -> Float[Array, "B P n"]:
    return jnp.take_along_axis(values, order[..., None], axis=1)


class Merger(nnx.Module):
    """A square of neighbouring patches to one feature of the decoder's width."""

    def __init__(self, config: VisionConfig, *, rngs: nnx.Rngs, param_dtype: Any):
        kwargs = dict(bias=True, std=config.initializer_range, rngs=rngs, param_dtype=param_dtype)
        wide = config.hidden_size * config.merge_size**2
        self.norm = norm(config, param_dtype)
        self.linear_1 = Linear(wide, wide, **kwargs)
        self.linear_2 = Linear(wide, config.out_size, **kwargs)
        self.act = ACTIVATIONS["gelu"]
        self.unit = config.merge_size**2

    def __call__(self, x: Float[Array, "B P Dv"]) -> Float[Array, "B F D"]:
        x = self.norm(x).reshape(x.shape[0], x.shape[1] // self.unit, -1)
        return self.linear_2(self.act(self.linear_1(x)))
