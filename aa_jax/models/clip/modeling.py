"""The vision tower of CLIP (Radford et al., 2021)."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from aa_jax.errors import MediaError
from aa_jax.models.attention import Attention
from aa_jax.models.config import Reader
from aa_jax.models.layers import (
    ACTIVATIONS,
    Embedding,
    LayerNorm,
    Linear,
    normal,
    scan_layers,
    stacked,
)
from aa_jax.sharding.rules import constrain


@dataclasses.dataclass(frozen=True)
class ClipVisionConfig:
    """What of a CLIP vision config decides the tower; defaults are transformers' own."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_channels: int
    image_size: int
    patch_size: int
    hidden_act: str
    norm_eps: float
    initializer_range: float
    initializer_factor: float

    @property
    def num_patches(self) -> int:
        """Patches per image; the rest of an uneven image is left out, as a strided conv does."""
        return (self.image_size // self.patch_size) ** 2

    @classmethod
    def read(cls, reader: Reader) -> "ClipVisionConfig":
        """Takes the attributes out of ``reader``, which collects the problems."""
        config = cls(
            hidden_size=reader.size("hidden_size", 768),
            intermediate_size=reader.size("intermediate_size", 3072),
            num_layers=reader.size("num_hidden_layers", 12),
            num_heads=reader.size("num_attention_heads", 12),
            num_channels=reader.size("num_channels", 3),
            image_size=reader.size("image_size", 224),
            patch_size=reader.size("patch_size", 32),
            hidden_act=reader.activation("hidden_act", "quick_gelu"),
            norm_eps=reader.number("layer_norm_eps", 1e-5),
            initializer_range=reader.number("initializer_range", 0.02),
            initializer_factor=reader.number("initializer_factor", 1.0),
        )
        if config.hidden_size % config.num_heads:
            heads = f"{config.num_heads} heads"
            reader.problem("hidden_size", f"= {config.hidden_size} does not split into {heads}")
        if config.patch_size > config.image_size:
            reader.problem("patch_size", f"= {config.patch_size} is larger than the image")
        # They belong to the text side and the contrastive head of CLIP, which the tower has not.
        reader.finish(inert=("projection_dim", "tie_word_embeddings", "vocab_size"))
        return config


class Block(nnx.Module):
    """One pre-norm encoder layer; initial scales are transformers' (depth-dependent)."""

    def __init__(self, config: ClipVisionConfig, *, rngs: nnx.Rngs, param_dtype: Any):
        dim = config.hidden_size
        kwargs = dict(rngs=rngs, param_dtype=param_dtype)
        width = dim**-0.5 * config.initializer_factor
        shallow = width * (2 * config.num_layers) ** -0.5
        norm = dict(eps=config.norm_eps, param_dtype=param_dtype)
        self.attn_norm = LayerNorm(dim, **norm)
        self.attn = Attention(
            dim,
            heads=config.num_heads,
            kv_heads=config.num_heads,
            head_dim=dim // config.num_heads,
            qkv_bias=True,
            out_bias=True,
            std=shallow,
            out_std=width,
            **kwargs,
        )
        self.mlp_norm = LayerNorm(dim, **norm)
        fc1_std = (2 * dim) ** -0.5 * config.initializer_factor
        self.fc1 = Linear(dim, config.intermediate_size, bias=True, std=fc1_std, **kwargs)
        self.fc2 = Linear(config.intermediate_size, dim, bias=True, std=shallow, **kwargs)
        self.act = ACTIVATIONS[config.hidden_act]

    def __call__(self, x: Float[Array, "N P D"]) -> Float[Array, "N P D"]:
        x = constrain(x, "batch", None, None)  # whole images stay on their row's device
        x = x + self.attn(self.attn_norm(x), None, None)[0]
        x = x + self.fc2(self.act(self.fc1(self.mlp_norm(x))))
        return constrain(x, "batch", None, None)


class ClipVision(nnx.Module):
    """Patches, class token and encoder layers; returns the hidden states asked for."""

    def __init__(
        self,
        config: ClipVisionConfig,
        *,
        rngs: nnx.Rngs,
        dtype: Any,
        param_dtype: Any,
        remat: str,
    ):
        dim = config.hidden_size
        kwargs = dict(rngs=rngs, param_dtype=param_dtype)
        std = config.initializer_range * config.initializer_factor
        self.class_embedding = normal(
            rngs, (dim,), dim**-0.5 * config.initializer_factor, param_dtype
        )
        pixels = config.num_channels * config.patch_size**2
        self.patch = Linear(pixels, dim, bias=False, std=std, **kwargs)
        self.position = Embedding(config.num_patches + 1, dim, std=std, **kwargs)
        norm = dict(eps=config.norm_eps, param_dtype=param_dtype)
        self.pre_norm = LayerNorm(dim, **norm)
        self.layers = stacked(
            lambda rngs: Block(config, rngs=rngs, param_dtype=param_dtype), config.num_layers, rngs
        )
        # CLIP pools with it; a tower's features come before it. It is kept for the round trip.
        self.post_norm = LayerNorm(dim, **norm)
        self.config, self.dtype, self.remat = config, dtype, remat

    def embed(self, pixels: Float[Array, "N C height width"]) -> Float[Array, "N P1 D"]:
        """Class token and patch embeddings with positions; the conv is a reshape and a matmul."""
        size, patch = self.config.image_size, self.config.patch_size
        expected = (self.config.num_channels, size, size)
        if pixels.shape[1:] != expected:
            raise MediaError(
                f"pixel_values hold images of shape {tuple(pixels.shape[1:])}, but this vision "
                f"tower reads (channels, height, width) = {expected}; resize the images to it "
                "(the checkpoint's preprocessor_config.json does)."
            )
        grid = size // patch
        x = pixels[:, :, : grid * patch, : grid * patch].astype(self.dtype)
        x = x.reshape(x.shape[0], expected[0], grid, patch, grid, patch)
        x = x.transpose(0, 2, 4, 1, 3, 5).reshape(x.shape[0], grid * grid, -1)
        x = self.patch(x)
        first = jnp.broadcast_to(
            self.class_embedding[...].astype(x.dtype), (x.shape[0], 1, x.shape[2])
        )
        x = jnp.concatenate([first, x], axis=1)
        return x + self.position.weight[...].astype(x.dtype)[None]

    def __call__(
        self, pixels: Float[Array, "N C height width"], select: tuple[int, ...]
    ) -> list[Float[Array, "N P1 D"]]:
        """Hidden states by index: 0 is the input of the first layer, i the output of layer i.

        Layers above the highest index asked for are not run.
        """
        x = self.pre_norm(self.embed(pixels))
        states = {0: x}
        done = 0
        for index in sorted(set(select) - {0}):
            x, _ = scan_layers(
                self.layers,
                x,
                lambda block, x, _: (block(x), None),
                start=done,
                stop=index,
                remat=self.remat,
            )
            states[index], done = x, index
        return [states[index] for index in select]
