"""Qwen2 and Qwen2.5 (Yang et al., 2024), Qwen3 (Yang et al., 2025): options of the decoder."""

import dataclasses
from typing import Any

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

FULL, SLIDING = "full_attention", "sliding_attention"
_OFF = "use_sliding_window is not true, or sliding_window null, so the window has no size"


def read_window(reader: Reader, layers: int, *, first: int = 28) -> dict[str, Any]:
    """The sliding window of the higher layers, as keyword arguments of `DecoderConfig`.

    Qwen configs carry the window's size also where it is switched off, and transformers writes
    out what each layer does (`layer_types`).

    Args:
        reader: of the text config; collects the problems.
        layers: number of layers.
        first: the layer windows begin at where the config does not say (`max_window_layers`).
    """
    used = reader.flag("use_sliding_window", False)
    none = reader.raw.get("sliding_window", 1) is None
    size = reader.get("sliding_window", 4096)  # a size that is not in use may be anything
    first = reader.get("max_window_layers", first)
    kinds = reader.get("layer_types", None)
    if kinds is None:
        if not isinstance(first, int):
            reader.problem("max_window_layers", f"is {first!r}; it must be a whole number")
            first = layers
        windowed = used and not none
        kinds = [SLIDING if windowed and i >= first else FULL for i in range(layers)]
    elif not isinstance(kinds, list | tuple) or len(kinds) != layers:
        reader.problem("layer_types", f"is {kinds!r}; it must name the kind of {layers} layers")
        return {}
    elif other := sorted({str(kind) for kind in kinds} - {FULL, SLIDING}):
        reader.problem("layer_types", f"holds {', '.join(other)}; handled are {FULL}, {SLIDING}")
        return {}
    elif SLIDING in kinds and (none or not used):
        reader.problem("layer_types", f"holds {SLIDING}, but {_OFF}")
        return {}
    if SLIDING not in kinds:
        return {}
    size = reader.size("sliding_window", 4096)
    return dict(window=size, full_layers=tuple(i for i, k in enumerate(kinds) if k == FULL))


@dataclasses.dataclass(frozen=True)
class Qwen2Config(DecoderConfig):
    """What of a Qwen2 config.json decides the model; defaults are transformers' own."""

    @classmethod
    def read(cls, reader: Reader) -> "Qwen2Config":
        """Takes the attributes out of ``reader``, which collects the problems."""
        sizes = read_sizes(reader, DEFAULTS)
        window = read_window(reader, sizes["num_layers"])
        reader.finish()
        return cls(**sizes, **window, qkv_bias=True)


@dataclasses.dataclass(frozen=True)
class Qwen3Config(DecoderConfig):
    """What of a Qwen3 config.json decides the model; defaults are transformers' own."""

    @classmethod
    def read(cls, reader: Reader) -> "Qwen3Config":
        """Takes the attributes out of ``reader``, which collects the problems."""
        bias = reader.flag("attention_bias", False)
        sizes = read_sizes(reader, dataclasses.replace(DEFAULTS, head_dim=128))
        window = read_window(reader, sizes["num_layers"])
        reader.finish()
        return cls(**sizes, **window, qkv_bias=bias, out_bias=bias, qk_norm="rms")
