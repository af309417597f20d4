"""Shapes of known models: what their config.json says of the architecture, without any weights."""

import copy
import json
from pathlib import Path
from typing import Any

from aa_jax.errors import ConfigError


def _llama(width: int, mlp: int, layers: int, heads: int, vocab: int, **more: Any) -> dict:
    return {
        "model_type": "llama", "vocab_size": vocab, "hidden_size": width, "intermediate_size": mlp,
        "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": heads,
        "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "hidden_act": "silu",
        "rope_theta": 10000.0, **more,
    }  # fmt: skip


def _llava(text: dict) -> dict:
    vision = {
        "model_type": "clip_vision_model", "hidden_size": 1024, "intermediate_size": 4096,
        "num_hidden_layers": 24, "num_attention_heads": 16, "image_size": 336, "patch_size": 14,
        "projection_dim": 768, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5,
    }  # fmt: skip
    return {
        "architectures": ["LlavaForConditionalGeneration"], "model_type": "llava",
        "image_token_index": 32000, "projector_hidden_act": "gelu", "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default", "text_config": text, "vision_config": vision,
    }  # fmt: skip


def _qwen2(width: int, mlp: int, layers: int, heads: int, kv: int, vocab: int, **more: Any) -> dict:
    return {
        "vocab_size": vocab, "hidden_size": width, "intermediate_size": mlp,
        "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": kv,
        "max_position_embeddings": 32768, "rms_norm_eps": 1e-6, "hidden_act": "silu",
        "rope_theta": 1e6, **more,
    }  # fmt: skip


def _qwen2_vl(width: int, *sizes: int, tied: bool) -> dict:
    vision = {
        "depth": 32, "embed_dim": 1280, "hidden_size": width, "num_heads": 16, "mlp_ratio": 4,
        "hidden_act": "quick_gelu", "in_channels": 3, "patch_size": 14, "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    }  # fmt: skip
    return {
        "architectures": ["Qwen2VLForConditionalGeneration"], "model_type": "qwen2_vl",
        "tie_word_embeddings": tied, "vision_config": vision,
        "image_token_id": 151655, "video_token_id": 151656,
        "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
        **_qwen2(width, *sizes),
    }  # fmt: skip


# Sizes are those of the published config.json files of these models.
PRESETS: dict[str, dict[str, Any]] = {
    "llava-1.5-7b": _llava(_llama(4096, 11008, 32, 32, 32064)),
    "llava-1.5-13b": _llava(_llama(5120, 13824, 40, 40, 32064)),
    "qwen2-vl-2b": _qwen2_vl(1536, 8960, 28, 12, 2, 151936, tied=True),
    "qwen2-vl-7b": _qwen2_vl(3584, 18944, 28, 28, 4, 152064, tied=False),
    "llama-2-7b": {"architectures": ["LlamaForCausalLM"], **_llama(4096, 11008, 32, 32, 32000)},
    "llama-3-8b": {
        "architectures": ["LlamaForCausalLM"],
        **_llama(4096, 14336, 32, 32, 128256, num_key_value_heads=8, rope_theta=500000.0),
    },
    "qwen2.5-7b": {
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2",
        **_qwen2(3584, 18944, 28, 28, 4, 152064, tie_word_embeddings=False),
    },
}  # fmt: skip


def model_config(name: str) -> dict[str, Any]:
    """The decoded config.json of a model.

    Args:
      name: a key of `PRESETS`, a checkpoint folder, or a config.json file.

    Raises:
      ConfigError: it is none of them.
    """
    if name in PRESETS:
        return copy.deepcopy(PRESETS[name])
    path = Path(name)
    file = path / "config.json" if path.is_dir() else path
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{name!r} is no model that is known by name ({', '.join(PRESETS)}), and {file} cannot "
            f"be read as its config.json ({error}). Give a name, a checkpoint folder or the file."
        ) from error


def with_layers(hf_config: dict[str, Any], layers: int) -> dict[str, Any]:
    """The same model with another number of decoder layers."""
    out = copy.deepcopy(hf_config)
    (out.get("text_config") or out)["num_hidden_layers"] = layers
    return out
