"""Models as pure functions over plain parameter trees, with Hugging Face checkpoints in and out.

model, params = models.load("/ckpt/llava-1.5-7b-hf", dtype="bfloat16")
hidden = model.hidden_states(params, batch)
"""

import copy
import dataclasses
import os
from collections.abc import Callable, Mapping
from typing import Any

from aa_jax.errors import ModelError
from aa_jax.models import adapt
from aa_jax.models.chameleon import modeling as _chameleon
from aa_jax.models.chameleon.params import names as _chameleon_names
from aa_jax.models.config import Reader
from aa_jax.models.decoder_names import decoder_names as _decoder_names
from aa_jax.models.functional import Model, Params, functional
from aa_jax.models.hf import read_config, read_params, write_checkpoint
from aa_jax.models.llama import modeling as _llama
from aa_jax.models.llava import modeling as _llava
from aa_jax.models.llava.params import names as _llava_names
from aa_jax.models.llava_next import modeling as _llava_next
from aa_jax.models.llava_next.params import names as _llava_next_names
from aa_jax.models.names import Names
from aa_jax.models.qwen import modeling as _qwen
from aa_jax.models.qwen2_audio import modeling as _qwen2_audio
from aa_jax.models.qwen2_audio.params import names as _qwen2_audio_names
from aa_jax.models.qwen2_vl import config as _qwen2_vl_config
from aa_jax.models.qwen2_vl.modeling import Qwen2VL as _Qwen2VL
from aa_jax.models.qwen2_vl.params import names as _qwen2_vl_names

__all__ = ["ARCHITECTURES", "Family", "Model", "Params", "build", "load", "save"]


@dataclasses.dataclass(frozen=True)
class Family:
    """What a folder of this package offers for one architecture."""

    name: str
    config: Any
    module: Any
    names: Callable[[Any], Names]


# config.json's `architectures` entry -> family. A new family is a folder and a line here.
ARCHITECTURES: dict[str, Family] = {
    "LlamaForCausalLM": Family("llama", _llama.LlamaConfig, _llama.Llama, _decoder_names),
    "MistralForCausalLM": Family("mistral", _llama.MistralConfig, _llama.Llama, _decoder_names),
    "Qwen2ForCausalLM": Family("qwen2", _qwen.Qwen2Config, _qwen.Qwen, _decoder_names),
    "Qwen3ForCausalLM": Family("qwen3", _qwen.Qwen3Config, _qwen.Qwen, _decoder_names),
    "LlavaForConditionalGeneration": Family(
        "llava", _llava.LlavaConfig, _llava.Llava, _llava_names
    ),
    "LlavaNextForConditionalGeneration": Family(
        "llava_next", _llava_next.LlavaNextConfig, _llava_next.LlavaNext, _llava_next_names
    ),
    "Qwen2AudioForConditionalGeneration": Family(
        "qwen2_audio",
        _qwen2_audio.Qwen2AudioConfig,
        _qwen2_audio.Qwen2Audio,
        _qwen2_audio_names,
    ),
    "ChameleonForConditionalGeneration": Family(
        "chameleon", _chameleon.ChameleonConfig, _chameleon.Chameleon, _chameleon_names
    ),
    "Qwen2VLForConditionalGeneration": Family(
        "qwen2_vl", _qwen2_vl_config.Qwen2VLConfig, _Qwen2VL, _qwen2_vl_names
    ),
    "Qwen2_5_VLForConditionalGeneration": Family(
        "qwen2_5_vl", _qwen2_vl_config.Qwen25VLConfig, _Qwen2VL, _qwen2_vl_names
    ),
}
_MODEL_TYPES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "llava": "LlavaForConditionalGeneration",
    "llava_next": "LlavaNextForConditionalGeneration",
    "qwen2_audio": "Qwen2AudioForConditionalGeneration",
    "chameleon": "ChameleonForConditionalGeneration",
    "qwen2_vl": "Qwen2VLForConditionalGeneration",
    "qwen2_5_vl": "Qwen2_5_VLForConditionalGeneration",
}


def build(
    hf_config: dict[str, Any],
    *,
    dtype: str = "float32",
    param_dtype: str = "float32",
    remat: str = "none",
    quantize: Mapping[str, Any] | None = None,
) -> Model:
    """A model from a decoded config.json; allocates nothing.

    Args:
        hf_config: the config; `architectures` (or, where absent, `model_type`) picks the family.
        dtype: type of activations and matmuls, "float32", "bfloat16" or "float16".
        param_dtype: type parameters are stored in.
        remat: "none", "dots" (keep weight matmuls) or "full" (keep layer inputs only).
        quantize: keyword arguments of `adapt.quantized`: linear layers in 4 or 8 bits, which do not
            train.

    Raises:
        ModelError: the architecture is unknown, or the config holds attributes that are not
            handled; all of them are listed.
        ConfigError: an unknown dtype or remat policy.
    """
    family = _family(hf_config)
    reader = Reader(hf_config, "config")
    config = family.config.read(reader)
    reader.raise_problems(family.name)
    model = functional(
        family.module,
        family=family.name,
        config=config,
        hf_config=copy.deepcopy(hf_config),
        names=family.names(config),
        dtype=dtype,
        param_dtype=param_dtype,
        remat=remat,
    )
    return model if quantize is None else adapt.quantized(model, **quantize)


def _family(hf_config: dict[str, Any]) -> Family:
    named, kind = hf_config.get("architectures") or [], str(hf_config.get("model_type"))
    if not named and kind in _MODEL_TYPES:
        named = [_MODEL_TYPES[kind]]
    if not isinstance(named, list) or len(named) != 1 or str(named[0]) not in ARCHITECTURES:
        raise ModelError(
            f"config.json names the architecture {named or None} (model_type "
            f"{hf_config.get('model_type')!r}); handled are {', '.join(sorted(ARCHITECTURES))}."
        )
    return ARCHITECTURES[named[0]]


def load(
    path: str | os.PathLike[str], *, shardings: Any = None, **build_kwargs: Any
) -> tuple[Model, Params]:
    """A model and its parameters from a Hugging Face checkpoint folder.

    Args:
        path: local folder with config.json and safetensors weights, whole or sharded, in the
            layout of any transformers version.
        shardings: tree of `jax.sharding.Sharding` like the parameters, or a function of the model
            that returns one; None leaves placement to jax.
        **build_kwargs: of `build` (dtype, param_dtype, remat, quantize).

    Raises:
        CheckpointError: files are missing or damaged, or tensors and config disagree; all of it
            is listed.
        ModelError: see `build`.
    """
    model = build(read_config(path), **build_kwargs)
    placed = shardings(model) if callable(shardings) else shardings
    return model, read_params(path, adapt.plain(model), placed, model.variant)


def save(
    path: str | os.PathLike[str],
    model: Model,
    params: Params,
    extra_files_from: str | os.PathLike[str] | None = None,
    *,
    dtype: str | None = None,
    overwrite: bool = False,
) -> None:
    """Writes a folder that transformers' `from_pretrained` loads: config.json, model.safetensors.

    Adapters are merged into it and quantised kernels made wide, one leaf at a time. The folder
    appears under its name only when it is complete.

    Args:
        path: the new folder.
        model: the model.
        params: its parameters.
        extra_files_from: a checkpoint folder whose tokenizer and processor files are copied.
        dtype: type to store, "float32", "bfloat16" or "float16"; None stores as they are.
        overwrite: replace an existing folder as a whole.

    Raises:
        CheckpointError: the folder exists, or the parameters are another model's.
    """
    write_checkpoint(
        path,
        *adapt.pending(model, params),
        extra_files_from=extra_files_from,
        dtype=dtype,
        overwrite=overwrite,
    )
