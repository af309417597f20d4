"""Qwen2-Audio (Chu et al., 2024): Whisper's encoder, a linear projector and a Qwen2 decoder."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from aa_jax.models.config import Reader
from aa_jax.models.decoder import Decoder
from aa_jax.models.layers import Linear
from aa_jax.models.multimodal import Multimodal
from aa_jax.models.qwen.modeling import Qwen2Config
from aa_jax.models.whisper.modeling import AudioEncoder, AudioEncoderConfig, pooled_length

SUB_CONFIGS = {"text_config": "qwen2", "audio_config": "qwen2_audio_encoder"}


@dataclasses.dataclass(frozen=True)
class Qwen2AudioConfig:
    """What of a Qwen2-Audio config.json decides the model.

    Attributes:
        audio_token_id: the placeholder token that stands for one feature.
    """

    text: Qwen2Config
    audio: AudioEncoderConfig
    audio_token_id: int

    @classmethod
    def read(cls, reader: Reader) -> "Qwen2AudioConfig":
        """Takes the attributes out of ``reader``, which collects the problems."""
        for name, known in SUB_CONFIGS.items():
            sub = reader.get(name, {})
            kind = sub.get("model_type", known) if isinstance(sub, dict) else known
            if kind != known:
                reader.problem(name, f"is of model_type {kind!r}; handled: {known}")
        text = Qwen2Config.read(reader.section("text_config"))
        audio = AudioEncoderConfig.read(reader.section("audio_config"))
        # transformers builds an untied head whatever the flags say.
        reader.flag("tie_word_embeddings", False)
        text = dataclasses.replace(text, tied=False)
        old, new = reader.get("audio_token_index", None), reader.get("audio_token_id", None)
        if old is not None and new is not None and old != new:
            reader.problem("audio_token_id", f"is {new}, but audio_token_index is {old}")
        name = "audio_token_index" if new is None else "audio_token_id"
        token = reader.token(name, 151646, text.vocab_size)
        # The text config's vocabulary counts; ignore_index is the loss's.
        reader.finish(inert=("ignore_index", "vocab_size"))
        return cls(text=text, audio=audio, audio_token_id=token)


class Qwen2Audio(Multimodal):
    """The family interface of `models.functional` for audio and text.

    media: "input_features" [B, A, mels, frames], log-mel spectrograms of up to A clips per row, and
    "feature_lengths" [B, A], their frames that are not padding (0: no clip). Features of a row
    stand one after the other without gaps, so `feature_index` counts through its clips.
    """

    tower = "audio_tower"

    def __init__(
        self, config: Qwen2AudioConfig, *, rngs: nnx.Rngs, dtype: Any, param_dtype: Any, remat: str
    ):
        kwargs = dict(rngs=rngs, dtype=dtype, param_dtype=param_dtype, remat=remat)
        self.audio_tower = AudioEncoder(config.audio, **kwargs)
        self.projector = Linear(
            config.audio.hidden_size,
            config.text.hidden_size,
            bias=True,
            std=config.text.initializer_range,
            rngs=rngs,
            param_dtype=param_dtype,
        )
        self.language_model = Decoder(config.text, **kwargs)
        self.config, self.dtype = config, dtype

    def tower_features(self, media: dict[str, Any]) -> Float[Array, "B A F Da"]:
        """What the projector reads, F vectors per clip."""
        clips = media["input_features"]
        rows, most = clips.shape[:2]
        flat = clips.reshape(rows * most, *clips.shape[2:])
        x = self.audio_tower(flat, media["feature_lengths"].reshape(-1))
        return x.reshape(rows, most, *x.shape[1:])

    def encode_media(self, media: dict[str, Any]) -> Float[Array, "B F D"]:
        """Tower and projector; "tower_features" [B,A,F,Da] in media stands for the tower's run.

        Places past a row's last feature are NaN, so that a placeholder without a feature is seen.
        """
        if "tower_features" in media:
            x = media["tower_features"].astype(self.dtype)
        else:
            x = self.tower_features(media)
        x = self.projector(x)
        rows, clips, most, dim = x.shape
        counts = pooled_length(media["feature_lengths"])
        real = jnp.arange(most, dtype=jnp.int32)[None, None, :] < counts[..., None]
        real = real.reshape(rows, clips * most)
        order = jnp.argsort(~real, axis=1, stable=True)
        x = jnp.take_along_axis(x.reshape(rows, clips * most, dim), order[..., None], axis=1)
        real = jnp.take_along_axis(real, order, axis=1)
        return jnp.where(real[..., None], x, jnp.nan)
