"""The audio encoder of Whisper (Radford et al., 2022) as Qwen2-Audio uses it (Chu et al., 2024).

Two convolutions halve the log-mel frames, transformer layers follow, and a pooling over pairs
halves the sequence once more: one feature for 40 ms of sound.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

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


@dataclasses.dataclass(frozen=True)
class AudioEncoderConfig:
    """What of a `qwen2_audio_encoder` config decides the tower; defaults are transformers' own.

    Attributes:
        num_mel_bins: mel bands of a frame.
        max_positions: positions after the convolutions; clips are up to twice as many frames.
    """

    num_mel_bins: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    max_positions: int
    hidden_act: str
    initializer_range: float

    @classmethod
    def read(cls, reader: Reader) -> "AudioEncoderConfig":
        """Takes the attributes out of ``reader``, which collects the problems."""
        config = cls(
            num_mel_bins=reader.size("num_mel_bins", 128),
            hidden_size=reader.size("d_model", 1280),
            intermediate_size=reader.size("encoder_ffn_dim", 5120),
            num_layers=reader.size("encoder_layers", 32),
            num_heads=reader.size("encoder_attention_heads", 20),
            max_positions=reader.size("max_source_positions", 1500),
            hidden_act=reader.activation("activation_function", "gelu"),
            initializer_range=reader.number("initializer_range", 0.02),
        )
        if config.hidden_size % config.num_heads:
            heads = f"{config.num_heads} heads"
            reader.problem("d_model", f"= {config.hidden_size} does not split into {heads}")
        for name in ("activation_dropout", "encoder_layerdrop"):
            if reader.number(name, 0.0):
                reader.problem(name, "is not 0; nothing is dropped at random here")
        restated = (("num_hidden_layers", config.num_layers), ("hidden_size", config.hidden_size))
        for name, value in restated:
            if reader.size(name, value) != value:
                reader.problem(name, f"is {reader.raw[name]}, but the encoder's own is {value}")
        # The reference computes the scale of `scale_embedding` and never applies it.
        reader.finish(inert=("scale_embedding", "init_std"))
        return config


class Block(nnx.Module):
    """One pre-norm encoder layer; keys have no bias."""

    def __init__(self, config: AudioEncoderConfig, *, rngs: nnx.Rngs, param_dtype: Any):
        dim, std = config.hidden_size, config.initializer_range
        kwargs = dict(std=std, rngs=rngs, param_dtype=param_dtype)
        self.attn_norm = LayerNorm(dim, eps=1e-5, param_dtype=param_dtype)
        self.attn = Attention(
            dim,
            heads=config.num_heads,
            kv_heads=config.num_heads,
            head_dim=dim // config.num_heads,
            qkv_bias=True,
            out_bias=True,
            out_std=std,
            **kwargs,
        )
        self.attn.k = Linear(dim, dim, bias=False, **kwargs)
        self.mlp_norm = LayerNorm(dim, eps=1e-5, param_dtype=param_dtype)
        self.fc1 = Linear(dim, config.intermediate_size, bias=True, **kwargs)
        self.fc2 = Linear(config.intermediate_size, dim, bias=True, **kwargs)
        self.act = ACTIVATIONS[config.hidden_act]

    def __call__(
        self, x: Float[Array, "N P D"], intervals: Int[Array, "N P 4"]
    ) -> Float[Array, "N P D"]:
        x = x + self.attn(self.attn_norm(x), None, intervals)[0]
        return x + self.fc2(self.act(self.fc1(self.mlp_norm(x))))


class Conv1d(nnx.Module):
    """A convolution over [N, T, C], three frames wide; kernel [3, in, out]."""

    def __init__(self, n_in: int, n_out: int, *, std: float, rngs: nnx.Rngs, param_dtype: Any):
        self.kernel = normal(rngs, (3, n_in, n_out), std, param_dtype)
        self.bias = nnx.Param(jnp.zeros((n_out,), param_dtype))

    def __call__(self, x: Float[Array, "N T C"], *, stride: int) -> Float[Array, "N T2 C2"]:
        y = jax.lax.conv_general_dilated(
            x,
            self.kernel[...].astype(x.dtype),
            (stride,),
            ((1, 1),),
            dimension_numbers=("NWC", "WIO", "NWC"),
        )
        return y + jnp.broadcast_to(self.bias[...].astype(x.dtype), y.shape)


class AudioEncoder(nnx.Module):
    """Log-mel frames to pooled, normed features."""

    def __init__(
        self,
        config: AudioEncoderConfig,
        *,
        rngs: nnx.Rngs,
        dtype: Any,
        param_dtype: Any,
        remat: str,
    ):
        dim = config.hidden_size
        kwargs = dict(std=config.initializer_range, rngs=rngs, param_dtype=param_dtype)
        self.conv1 = Conv1d(config.num_mel_bins, dim, **kwargs)
        self.conv2 = Conv1d(dim, dim, **kwargs)
        self.position = Embedding(config.max_positions, dim, **kwargs)
        self.layers = stacked(
            lambda rngs: Block(config, rngs=rngs, param_dtype=param_dtype), config.num_layers, rngs
        )
        self.norm = LayerNorm(dim, eps=1e-5, param_dtype=param_dtype)
        self.config, self.dtype, self.remat = config, dtype, remat

    def __call__(
        self, features: Float[Array, "N mels frames"], lengths: Int[Array, "N"]
    ) -> Float[Array, "N F D"]:
        """Encodes clips.

        Args:
            features: log-mel spectrograms padded to a common, even number of frames, at most
                ``2 * max_positions``. A clip that is not as long as the chunk it was made for
                needs two frames of its padding: the convolutions read them.
            lengths: frames of each clip that are not padding; 0 for an empty slot.

        Returns:
            F = frames // 4 features per clip, of which the first `pooled_length` mean something.
        """
        mels, frames = self.config.num_mel_bins, features.shape[2]
        if features.shape[1] != mels or frames % 2 or frames > 2 * self.config.max_positions:
            raise MediaError(
                f"input_features hold clips of shape {tuple(features.shape[1:])}, but this audio "
                f"tower reads {mels} mel bands and up to {2 * self.config.max_positions} frames, "
                "an even number; prepare them with the checkpoint's preprocessor_config.json."
            )
        # The reference fixes the exact gelu here, whatever the layers use.
        gelu = ACTIVATIONS["gelu"]
        x = features.astype(self.dtype).transpose(0, 2, 1)
        x = gelu(self.conv2(gelu(self.conv1(x, stride=1)), stride=2))
        # Sinusoids in the published weights: stored, but never trained.
        table = jax.lax.stop_gradient(self.position.weight[...])[: x.shape[1]]
        x = x + jnp.broadcast_to(table.astype(x.dtype), x.shape)
        heard = (lengths - 1) // 2 + 1
        steps = jnp.arange(x.shape[1], dtype=jnp.int32)
        ends = jnp.where(steps[None, :] < heard[:, None], heard[:, None], 0)
        intervals = jnp.stack([jnp.zeros_like(ends)] * 3 + [ends], axis=-1)

        def body(block: Block, x: Array, index: Array) -> tuple[Array, None]:
            return block(x, intervals), None

        x, _ = scan_layers(self.layers, x, body, remat=self.remat)
        pairs = x.shape[1] // 2
        x = jnp.mean(x[:, : 2 * pairs].reshape(x.shape[0], pairs, 2, x.shape[2]), axis=2)
        return self.norm(x)


def pooled_length(frames: Int[Array, "*batch"]) -> Int[Array, "*batch"]:
    """Features of a clip of so many frames, 0 for an empty slot."""
    return jnp.maximum(((frames - 1) // 2 + 1 - 2) // 2 + 1, 0)
