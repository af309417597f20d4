"""Llama (Touvron et al., 2023) and its relatives with the same layer: Vicuna, Mistral."""

import dataclasses

from aa_jax.models.config import Reader
from aa_jax.models.decoder import Decoder, DecoderConfig, Defaults, read_sizes

DEFAULTS = Defaults(vocab_size=32000, hidden_size=4096, intermediate_size=11008, max_positions=2048)

MISTRAL = Defaults(
    vocab_size=32000,
    hidden_size=4096,
    intermediate_size=14336,
    max_positions=131072,
    num_kv_heads=8,
)

Llama = Decoder


@dataclasses.dataclass(frozen=True)
class LlamaConfig(DecoderConfig):
    """What of a Llama config.json decides the model; defaults are transformers' own."""

    @classmethod
    def read(cls, reader: Reader) -> "LlamaConfig":
        """Takes the attributes out of ``reader``, which collects the problems."""
        bias = reader.flag("attention_bias", False)
        config = cls(
            **read_sizes(reader, DEFAULTS),
            qkv_bias=bias,
            out_bias=bias,
            mlp_bias=reader.flag("mlp_bias", False),
        )
        # pretraining_tp splits matmuls and sums them: the same result in exact arithmetic.
        reader.finish(inert=("pretraining_tp",))
        return config


@dataclasses.dataclass(frozen=True)
class MistralConfig(LlamaConfig):
    """What of a Mistral config.json (Jiang et al., 2023) decides the model."""

    @classmethod
    def read(cls, reader: Reader) -> "MistralConfig":
        """Takes the attributes out of ``reader``, which collects the problems."""
        sizes = read_sizes(reader, MISTRAL)
        # Silence means a window of 4096 tokens to transformers; null, as from v0.2 on, means none.
        none = reader.raw.get("sliding_window", 4096) is None
        window = reader.size("sliding_window", 4096)
        reader.finish()
        return cls(**sizes, window=None if none else window)
