"""Qwen2 and Qwen2.5 (Yang et al., 2024), Qwen3 (Yang et al., 2025): options of the decoder."""

import dataclasses

from aa_jax.models.config import Reader
from aa_jax.models.decoder import Decoder, DecoderConfig, Defaults, read_sizes

DEFAULTS = Defaults(
    vocab_size=151936,
    hidden_size=4096,
    intermediate_size=22016,
    num_kv_heads=32,
    max_positions=32768,
)

Qwen = Decoder


def read_window(reader: Reader, layers: int) -> None:
    """Notes a sliding window that would be in use; every layer here sees the whole row.

    Qwen configs carry the window's size also where it is switched off, and transformers writes
    out what each layer does (`layer_types`).
    """
    used = reader.flag("use_sliding_window", False)
    window = reader.get("sliding_window", 4096)
    first = reader.get("max_window_layers", 28)
    kinds = reader.get("layer_types", None)
    if kinds is not None and (other := sorted(set(kinds) - {"full_attention"})):
        reader.problem("layer_types", f"holds {', '.join(other)}; only full_attention is handled")
    elif kinds is None and used and first < layers and reader.raw.get("sliding_window", 1):
        reader.problem(
            "use_sliding_window",
            f"is true: layers {first} to {layers - 1} would see the last {window} tokens only; "
            "full attention alone is handled",
        )


@dataclasses.dataclass(frozen=True)
class Qwen2Config(DecoderConfig):
    """What of a Qwen2 config.json decides the model; defaults are transformers' own."""

    @classmethod
    def read(cls, reader: Reader) -> "Qwen2Config":
        """Takes the attributes out of ``reader``, which collects the problems."""
        config = cls(**read_sizes(reader, DEFAULTS), qkv_bias=True)
        read_window(reader, config.num_layers)
        reader.finish()
        return config


@dataclasses.dataclass(frozen=True)
class Qwen3Config(DecoderConfig):
    """What of a Qwen3 config.json decides the model; defaults are transformers' own."""

    @classmethod
    def read(cls, reader: Reader) -> "Qwen3Config":
        """Takes the attributes out of ``reader``, which collects the problems."""
        bias = reader.flag("attention_bias", False)
        sizes = read_sizes(reader, dataclasses.replace(DEFAULTS, head_dim=128))
        config = cls(**sizes, qkv_bias=bias, out_bias=bias, qk_norm="rms")
        read_window(reader, config.num_layers)
        reader.finish()
        return config
