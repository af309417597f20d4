"""The VQGAN image tokenizer of Chameleon: an image as a grid of codebook indices, and back.

Esser et al., "Taming Transformers for High-Resolution Image Synthesis" (2021), as trained by
Gafni et al., "Make-A-Scene" (2022). Everything runs in fp32 at the highest matmul precision,
whatever the decoder computes in: an index is a decision, and a rounded distance decides otherwise.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from aa_jax.errors import MediaError
from aa_jax.models.config import Reader
from aa_jax.models.layers import normal

GROUPS = 32  # of every group norm; the architecture fixes it
EXACT = jax.lax.Precision.HIGHEST


@dataclasses.dataclass(frozen=True)
class VQConfig:
    """What of a `vq_config` decides the tokenizer; defaults are transformers' own.

    Attributes:
        embed_dim: size of a codebook vector.
        num_embeddings: vectors in the codebook.
        latent_channels: channels between the convolutions and the codebook's projections.
        resolution: edge of the images it was trained on, pixels.
        channel_multiplier: width of each level in units of `base_channels`; every level but the
            last halves the edge.
        attn_resolutions: edges at which a level's blocks are followed by self-attention.
        attention: whether there is any (`attn_type` "vanilla").
    """

    embed_dim: int
    num_embeddings: int
    latent_channels: int
    resolution: int
    in_channels: int
    out_channels: int
    base_channels: int
    channel_multiplier: tuple[int, ...]
    num_res_blocks: int
    attn_resolutions: tuple[int, ...]
    attention: bool

    @property
    def factor(self) -> int:
        """Pixels per token along an edge."""
        return 2 ** (len(self.channel_multiplier) - 1)

    @property
    def grid(self) -> int:
        """Tokens along an edge of an image of `resolution`."""
        return self.resolution // self.factor

    @property
    def tokens_per_image(self) -> int:
        """Tokens of an image of `resolution`."""
        return self.grid**2

    @classmethod
    def read(cls, reader: Reader) -> "VQConfig":
        """Takes the attributes out of ``reader``, which collects the problems."""
        if reader.flag("double_latent", False):
            # Its own quantiser projection reads half of what the encoder then writes.
            reader.problem("double_latent", "is true; only false is handled")
        config = cls(
            embed_dim=reader.size("embed_dim", 256),
            num_embeddings=reader.size("num_embeddings", 8192),
            latent_channels=reader.size("latent_channels", 256),
            resolution=reader.size("resolution", 512),
            in_channels=reader.size("in_channels", 3),
            out_channels=reader.size("out_channels", 3),
            base_channels=reader.size("base_channels", 128),
            channel_multiplier=_sizes(reader, "channel_multiplier", (1, 1, 2, 2, 4)),
            num_res_blocks=reader.size("num_res_blocks", 2),
            attn_resolutions=_sizes(reader, "attn_resolutions", ()),
            attention=reader.choice("attn_type", "vanilla", ("vanilla", "none")) == "vanilla",
        )
        for multiplier in (1, *config.channel_multiplier):
            if multiplier * config.base_channels % GROUPS:
                reader.problem(
                    "base_channels",
                    f"= {config.base_channels} times {multiplier} does not split into the "
                    f"{GROUPS} groups of a norm",
                )
        if config.resolution < config.factor:
            reader.problem("resolution", f"= {config.resolution} is less than one token's edge")
        # The quantiser's commitment weight is the training's; `initializer_range` is transformers'.
        reader.finish(inert=("beta", "initializer_range"))
        return config


def _sizes(reader: Reader, name: str, default: tuple[int, ...]) -> tuple[int, ...]:
    value = reader.get(name, default)
    whole = isinstance(value, list | tuple) and all(type(v) is int and v > 0 for v in value)
    if not whole or (default and not value):
        reader.problem(name, f"is {value!r}; it must be a list of positive whole numbers")
        return default
    return tuple(value)


class Conv(nnx.Module):
    """A convolution over [N, H, W, C] with bias; kernel [size, size, in, out]."""

    def __init__(self, n_in: int, n_out: int, size: int, *, rngs: nnx.Rngs, param_dtype: Any):
        # Standard deviation 1 / sqrt(fan in) keeps activations of order one from scratch.
        std = (n_in * size * size) ** -0.5
        self.kernel = normal(rngs, (size, size, n_in, n_out), std, param_dtype)
        self.bias = nnx.Param(jnp.zeros((n_out,), param_dtype))

    def __call__(
        self, x: Float[Array, "N H W C"], *, stride: int = 1, padding: Any = "SAME"
    ) -> Float[Array, "N H2 W2 C2"]:
        y = jax.lax.conv_general_dilated(
            x,
            self.kernel[...].astype(x.dtype),
            (stride, stride),
            padding,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            precision=EXACT,
        )
        return y + jnp.broadcast_to(self.bias[...].astype(x.dtype), y.shape)


class GroupNorm(nnx.Module):
    """Normalises each group of channels over the whole image (Wu & He, 2018)."""

    def __init__(self, channels: int, *, param_dtype: Any):
        self.scale = nnx.Param(jnp.ones((channels,), param_dtype))
        self.bias = nnx.Param(jnp.zeros((channels,), param_dtype))

    def __call__(self, x: Float[Array, "N H W C"]) -> Float[Array, "N H W C"]:
        grouped = x.reshape(*x.shape[:3], GROUPS, -1)
        grouped = grouped - jnp.mean(grouped, axis=(1, 2, 4), keepdims=True)
        variance = jnp.mean(grouped * grouped, axis=(1, 2, 4), keepdims=True)
        y = (grouped * jax.lax.rsqrt(variance + 1e-6)).reshape(x.shape)
        affine = (self.scale, self.bias)
        scale, bias = (jnp.broadcast_to(p[...].astype(x.dtype), x.shape) for p in affine)
        return y * scale + bias


class ResnetBlock(nnx.Module):
    """``x + conv(silu(norm(conv(silu(norm(x))))))``; a 1x1 convolution where the width changes."""

    def __init__(self, n_in: int, n_out: int, **kwargs: Any):
        self.norm1 = GroupNorm(n_in, param_dtype=kwargs["param_dtype"])
        self.conv1 = Conv(n_in, n_out, 3, **kwargs)
        self.norm2 = GroupNorm(n_out, param_dtype=kwargs["param_dtype"])
        self.conv2 = Conv(n_out, n_out, 3, **kwargs)
        self.shortcut = Conv(n_in, n_out, 1, **kwargs) if n_in != n_out else None

    def __call__(self, x: Float[Array, "N H W C"]) -> Float[Array, "N H W C2"]:
        y = self.conv1(jax.nn.silu(self.norm1(x)))
        y = self.conv2(jax.nn.silu(self.norm2(y)))
        return y + (x if self.shortcut is None else self.shortcut(x))


class AttnBlock(nnx.Module):
    """Single-head self-attention over the positions of the feature map, with a residual."""

    def __init__(self, channels: int, **kwargs: Any):
        self.norm = GroupNorm(channels, param_dtype=kwargs["param_dtype"])
        self.q = Conv(channels, channels, 1, **kwargs)
        self.k = Conv(channels, channels, 1, **kwargs)
        self.v = Conv(channels, channels, 1, **kwargs)
        self.proj_out = Conv(channels, channels, 1, **kwargs)

    def __call__(self, x: Float[Array, "N H W C"]) -> Float[Array, "N H W C"]:
        y = self.norm(x)
        flat = (x.shape[0], -1, x.shape[3])
        q, k, v = (conv(y).reshape(flat) for conv in (self.q, self.k, self.v))
        scores = jnp.einsum("nqc,nkc->nqk", q, k, precision=EXACT) * x.shape[3] ** -0.5
        y = jnp.einsum("nqk,nkc->nqc", jax.nn.softmax(scores, axis=-1), v, precision=EXACT)
        return x + self.proj_out(y.reshape(x.shape))


class Level(nnx.Module):
    """Residual blocks of one resolution, each followed by attention where the level has it."""

    def __init__(
        self, n_in: int, n_out: int, blocks: int, attention: bool, resample: bool, **kwargs: Any
    ):
        self.blocks, self.attention = blocks, attention
        for i in range(blocks):
            setattr(self, f"block_{i}", ResnetBlock(n_in if i == 0 else n_out, n_out, **kwargs))
            if attention:
                setattr(self, f"attn_{i}", AttnBlock(n_out, **kwargs))
        self.resample = Conv(n_out, n_out, 3, **kwargs) if resample else None

    def __call__(self, x: Float[Array, "N H W C"]) -> Float[Array, "N H W C2"]:
        for i in range(self.blocks):
            x = getattr(self, f"block_{i}")(x)
            if self.attention:
                x = getattr(self, f"attn_{i}")(x)
        return x


class Middle(nnx.Module):
    """Block, attention, block at the lowest resolution."""

    def __init__(self, channels: int, attention: bool, **kwargs: Any):
        self.block_1 = ResnetBlock(channels, channels, **kwargs)
        self.attn_1 = AttnBlock(channels, **kwargs) if attention else None
        self.block_2 = ResnetBlock(channels, channels, **kwargs)

    def __call__(self, x: Float[Array, "N H W C"]) -> Float[Array, "N H W C"]:
        x = self.block_1(x)
        x = x if self.attn_1 is None else self.attn_1(x)
        return self.block_2(x)


class Encoder(nnx.Module):
    """Pixels to latents; level 0 works at full resolution."""

    def __init__(self, config: VQConfig, **kwargs: Any):
        widths = [config.base_channels * m for m in (1, *config.channel_multiplier)]
        self.levels = len(config.channel_multiplier)
        self.conv_in = Conv(config.in_channels, config.base_channels, 3, **kwargs)
        edge = config.resolution
        for i in range(self.levels):
            last = i == self.levels - 1
            attends = config.attention and edge in config.attn_resolutions
            level = Level(
                widths[i], widths[i + 1], config.num_res_blocks, attends, not last, **kwargs
            )
            setattr(self, f"down_{i}", level)
            edge = edge if last else edge // 2
        self.mid = Middle(widths[-1], config.attention, **kwargs)
        self.norm_out = GroupNorm(widths[-1], param_dtype=kwargs["param_dtype"])
        self.conv_out = Conv(widths[-1], config.latent_channels, 3, **kwargs)

    def __call__(self, x: Float[Array, "N H W C"]) -> Float[Array, "N H2 W2 L"]:
        x = self.conv_in(x)
        for i in range(self.levels):
            level = getattr(self, f"down_{i}")
            x = level(x)
            if level.resample is not None:
                # One row and column of zeros on the far sides only, so that edges halve exactly.
                x = level.resample(x, stride=2, padding=((0, 1), (0, 1)))
        return self.conv_out(jax.nn.silu(self.norm_out(self.mid(x))))


class Decoder(nnx.Module):
    """Latents to pixels; levels are numbered as the encoder's, so the highest runs first."""

    def __init__(self, config: VQConfig, **kwargs: Any):
        widths = [config.base_channels * m for m in config.channel_multiplier]
        self.levels = len(widths)
        self.conv_in = Conv(config.latent_channels, widths[-1], 3, **kwargs)
        self.mid = Middle(widths[-1], config.attention, **kwargs)
        width, edge = widths[-1], config.grid
        for i in reversed(range(self.levels)):
            attends = config.attention and edge in config.attn_resolutions
            level = Level(width, widths[i], config.num_res_blocks + 1, attends, i > 0, **kwargs)
            setattr(self, f"up_{i}", level)
            width, edge = widths[i], edge * 2
        self.norm_out = GroupNorm(width, param_dtype=kwargs["param_dtype"])
        self.conv_out = Conv(width, config.out_channels, 3, **kwargs)

    def __call__(self, x: Float[Array, "N H W L"]) -> Float[Array, "N H2 W2 C"]:
        x = self.mid(self.conv_in(x))
        for i in reversed(range(self.levels)):
            level = getattr(self, f"up_{i}")
            x = level(x)
            if level.resample is not None:
                x = level.resample(jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2))
        return self.conv_out(jax.nn.silu(self.norm_out(x)))


class VQ(nnx.Module):
    """Encoder, codebook and (where the checkpoint has one) decoder."""

    def __init__(self, config: VQConfig, *, decoder: bool, rngs: nnx.Rngs, param_dtype: Any):
        kwargs = dict(rngs=rngs, param_dtype=param_dtype)
        self.encoder = Encoder(config, **kwargs)
        self.quant_conv = Conv(config.latent_channels, config.embed_dim, 1, **kwargs)
        std = config.embed_dim**-0.5
        self.codebook = normal(rngs, (config.num_embeddings, config.embed_dim), std, param_dtype)
        self.post_quant_conv = Conv(config.embed_dim, config.latent_channels, 1, **kwargs)
        self.decoder = Decoder(config, **kwargs) if decoder else None
        self.config = config

    def latents(self, pixels: Float[Array, "N C height width"]) -> Float[Array, "N h w E"]:
        """What the codebook is compared with, fp32."""
        factor, channels = self.config.factor, self.config.in_channels
        if pixels.shape[1] != channels or min(pixels.shape[2:]) < factor:
            raise MediaError(
                f"pixel_values hold images of shape {tuple(pixels.shape[1:])}, but the image "
                f"tokenizer reads {channels} channels and at least {factor} x {factor} pixels (it "
                f"was trained on {self.config.resolution}); prepare them with the checkpoint's "
                "preprocessor_config.json."
            )
        x = pixels.astype(jnp.float32).transpose(0, 2, 3, 1)
        return self.quant_conv(self.encoder(x))

    def nearest(self, latents: Float[Array, "N h w E"]) -> Int[Array, "N h w"]:
        """Index of the codebook vector at the smallest Euclidean distance; the first of equals."""
        codebook = self.codebook[...].astype(jnp.float32)
        flat = latents.reshape(-1, latents.shape[-1])
        squares = jnp.sum(flat**2, axis=1)[:, None], jnp.sum(codebook**2, axis=1)[None, :]
        shape = (flat.shape[0], codebook.shape[0])
        norms = jnp.broadcast_to(squares[0], shape) + jnp.broadcast_to(squares[1], shape)
        distances = norms - 2 * jnp.einsum("ne,ke->nk", flat, codebook, precision=EXACT)
        return jnp.argmin(distances, axis=1).astype(jnp.int32).reshape(latents.shape[:3])

    def lookup(self, indices: Int[Array, "N h w"]) -> Float[Array, "N h w E"]:
        """Codebook vectors, fp32; an index outside the codebook gives NaN, seen at once."""
        codebook = self.codebook[...].astype(jnp.float32)
        return jnp.take(codebook, indices, axis=0, mode="fill")

    def encode(self, pixels: Float[Array, "N C height width"]) -> Int[Array, "N h w"]:
        """Images to codebook indices, row by row."""
        return self.nearest(self.latents(pixels))

    def pixels(self, vectors: Float[Array, "N h w E"]) -> Float[Array, "N C height width"]:
        """Codebook vectors to pixels in the encoder's units (about [-1, 1])."""
        return self.decoder(self.post_quant_conv(vectors)).transpose(0, 3, 1, 2)

    def decode(self, indices: Int[Array, "N h w"]) -> Float[Array, "N C height width"]:
        """Codebook indices to pixels."""
        return self.pixels(self.lookup(indices))
