"""Small checkpoints of the real architectures, and the data of the digits world, as folders.

`write` makes both for one subtask, so that every launcher and config that reads a real checkpoint
and a real dataset runs without a download:

    python launch/world.py --config configs/world.py:TA2T --workdir runs/ta2t
    python launch/train.py --config configs/ta2t/qwen2_audio_dpo.py \\
        --config.model.path=runs/ta2t/model --config.data.path=runs/ta2t/preference.parquet ...

Weights are random: what such a model knows it learns from the data beside it.
"""

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from aa_jax import models
from aa_jax.data import digits
from aa_jax.data.digits import generation, processors
from aa_jax.data.digits.images import CELL
from aa_jax.errors import ConfigError
from aa_jax.llf.start import llava_config

log = logging.getLogger(__name__)

# Subtask -> what shows the digits, for those answered in text.
SHOWN = {"T2T": "text", "TI2T": "image", "TA2T": "audio", "TV2T": "video"}


def text_config(vocab_size: int, *, dim: int, layers: int, heads: int, kv_heads: int, mlp_dim: int,
                max_length: int) -> dict[str, Any]:  # fmt: skip
    """The sizes every decoder of this module shares, under the names of a config.json."""
    return {
        "vocab_size": vocab_size,
        "hidden_size": dim,
        "intermediate_size": mlp_dim,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": max_length,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
    }


def _llama(max_digits: int, tower: Mapping[str, int], sizes: Mapping[str, int]) -> dict:
    del max_digits, tower
    table = {word: index for index, word in enumerate(processors.words(processors.SPECIAL_TOKENS))}
    return text_config(len(table), **sizes) | {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": table["<s>"],
        "eos_token_id": table["</s>"],
        "pad_token_id": table["<pad>"],
    }


def _llava(max_digits: int, tower: Mapping[str, int], sizes: Mapping[str, int]) -> dict:
    return llava_config(
        max_digits, vision_dim=tower["dim"], vision_layers=tower["layers"] + 1,
        vision_heads=tower["heads"], **sizes,
    )  # fmt: skip


def _qwen2_audio(max_digits: int, tower: Mapping[str, int], sizes: Mapping[str, int]) -> dict:
    table = {word: index for index, word in enumerate(processors.words(processors.QWEN_TOKENS))}
    return {
        "architectures": ["Qwen2AudioForConditionalGeneration"],
        "model_type": "qwen2_audio",
        "audio_token_index": table["<|AUDIO|>"],
        "text_config": text_config(len(table), **sizes) | {"model_type": "qwen2"},
        "audio_config": {
            "model_type": "qwen2_audio_encoder",
            "num_mel_bins": 64,
            "d_model": tower["dim"],
            "encoder_ffn_dim": 4 * tower["dim"],
            "encoder_layers": tower["layers"],
            "encoder_attention_heads": tower["heads"],
            "max_source_positions": 50 * _seconds(max_digits),
        },
    }


def _qwen2_vl(max_digits: int, tower: Mapping[str, int], sizes: Mapping[str, int]) -> dict:
    del max_digits
    table = {word: index for index, word in enumerate(processors.words(processors.QWEN_TOKENS))}
    half = sizes["dim"] // sizes["heads"] // 2
    section = [half - 2 * (3 * half // 8), 3 * half // 8, 3 * half // 8]  # 16, 24, 24 of 64
    return {
        "architectures": ["Qwen2VLForConditionalGeneration"],
        "model_type": "qwen2_vl",
        "image_token_id": table["<|image_pad|>"],
        "video_token_id": table["<|video_pad|>"],
        "vision_start_token_id": table["<|vision_start|>"],
        "vision_end_token_id": table["<|vision_end|>"],
        "text_config": text_config(len(table), **sizes)
        | {
            "model_type": "qwen2_vl_text",
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": section,
            },
        },
        "vision_config": {
            "model_type": "qwen2_vl_vision",
            "depth": tower["layers"],
            "num_heads": tower["heads"],
            "embed_dim": tower["dim"],
            "mlp_ratio": 4,
            "hidden_size": sizes["dim"],
            "patch_size": CELL // 2,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
        },
    }


_LETTERS = "ABCDEFGHIJ"


def _chameleon(max_digits: int, tower: Mapping[str, int], sizes: Mapping[str, int]) -> dict:
    from aa_jax.image_recipe import digits_config

    vq = digits_config(max_digits, codes=tower["codes"], embed_dim=tower["embed_dim"])
    table = processors.words(processors.CHAMELEON_TOKENS)
    first = len(table)
    codes = {
        f"IMGIMG{''.join(_LETTERS[int(d)] for d in str(code))}Z": first + code
        for code in range(tower["codes"])
    }
    named = {word: table.index(word) for word in ("<image>", processors.BEGIN, processors.END)}
    return text_config(first + tower["codes"], **sizes) | {
        "architectures": ["ChameleonForConditionalGeneration"],
        "model_type": "chameleon",
        "vocabulary_map": named | codes,
        "vq_config": vq,
    }


def _seconds(max_digits: int) -> int:
    """Whole seconds that hold the longest clip: 50 ms, and 130 ms per digit."""
    return int(np.ceil(0.05 + 0.13 * max_digits))


_FAMILIES: dict[str, tuple[Callable[..., dict], Callable[[Path, int], Path]]] = {
    "T2T": (_llama, lambda folder, n: processors.write_text_processor(folder)),
    "TI2T": (_llava, lambda folder, n: digits.write_processor(folder, n)),
    "TA2T": (
        _qwen2_audio,
        lambda folder, n: processors.write_audio_processor(folder, seconds=_seconds(n)),
    ),
    "TV2T": (_qwen2_vl, lambda folder, n: processors.write_video_processor(folder)),
    "T2I": (_chameleon, lambda folder, n: processors.write_image_token_processor(folder, n)),
    "TI2TI": (_chameleon, lambda folder, n: processors.write_image_token_processor(folder, n)),
}
SUBTASKS = tuple(_FAMILIES)


def write_model(
    folder: str | Path, subtask: str, *, max_digits: int = 3, seed: int = 0,
    text: Mapping[str, int] | None = None, tower: Mapping[str, int] | None = None,
    image_tokenizer: str | Path | None = None,
) -> Path:  # fmt: skip
    """A checkpoint folder with random weights, which transformers reads too.

    Args:
      folder: the new folder.
      subtask: T2T (Llama), TI2T (LLaVA), TA2T (Qwen2-Audio), TV2T (Qwen2-VL), T2I or TI2TI
        (Chameleon).
      max_digits: most digits shown or drawn.
      seed: of the weights.
      text: sizes of the decoder: dim, layers, heads, kv_heads, mlp_dim, max_length.
      tower: sizes of the tower: dim, layers, heads; of Chameleon's image tokenizer: codes,
        embed_dim.
      image_tokenizer: run folder of `launch/tokenizer.py`, or a folder it wrote, whose trained
        encoder the Chameleon gets.

    Raises:
      ConfigError: no such subtask, an unknown size, or an image tokenizer of other sizes.
    """
    if subtask not in _FAMILIES:
        raise ConfigError(
            f"there is no small model for {subtask!r}; there are {', '.join(SUBTASKS)}."
        )
    sizes = {"dim": 96, "layers": 3, "heads": 4, "kv_heads": 4, "mlp_dim": 256, "max_length": 512}
    vision = {"dim": 64, "layers": 2, "heads": 4, "codes": 64, "embed_dim": 8}
    for given, known, name in ((text, sizes, "text"), (tower, vision, "tower")):
        if unknown := sorted(set(given or {}) - set(known)):
            raise ConfigError(f"{name} has no size {unknown[0]!r}; it has {', '.join(known)}.")
        known.update(given or {})
    config, processor = _FAMILIES[subtask]
    folder = Path(folder)
    files = processor(folder.with_name(folder.name + "_processor"), max_digits)
    model = models.build(config(max_digits, vision, sizes))
    params = jax.jit(model.init)(jax.random.key(seed))
    if image_tokenizer is not None:
        params = {**params, "vq": _trained_encoder(image_tokenizer, params["vq"])}
    models.save(folder, model, params, extra_files_from=files, overwrite=True)
    return folder


def _trained_encoder(path: str | Path, like: Any) -> Any:
    from aa_jax.models.chameleon.tokenizer import load_tokenizer
    from aa_jax.models.names import flatten, unflatten

    path = Path(path)
    path = path / "model" if (path / "model").is_dir() else path
    _, trained = load_tokenizer(path)
    given, wanted = flatten(trained), flatten(like)
    wrong = [k for k in wanted if k not in given or given[k].shape != wanted[k].shape]
    if wrong:
        raise ConfigError(
            f"the image tokenizer of {path} has other sizes (first at {wrong[0]!r}): give the "
            "tower sizes codes and embed_dim it was trained with, and the same max_digits."
        )
    return unflatten({name: given[name] for name in wanted})


def write_data(
    folder: str | Path, subtask: str, *, pairs: int = 2000, demonstrations: int = 4000,
    held_out: int = 200, max_digits: int = 3, seed: int = 0, annotator: str | None = None,
    flaws: Mapping[str, float] | None = None,
) -> dict[str, str]:  # fmt: skip
    """Dataset files of a subtask in the columns of its real counterpart.

    Args:
      folder: gets ``preference.parquet``, ``preference_val.parquet`` and ``sft.parquet``.
      subtask: one of `SUBTASKS`, or T2A or T2V.
      pairs: training preferences.
      demonstrations: of training.
      held_out: preferences on test digits.
      max_digits: most digits shown or drawn.
      seed: of everything.
      annotator: "bounded" or "flips" with the agreement of the paper's Table 1; None: the oracle.
        Subtasks answered in text only.
      flaws: rates of `digits.sample_response` for the demonstrations.

    Returns:
      name -> path.

    Raises:
      ConfigError: no such subtask, or an annotator where only the oracle grades.
    """
    folder = Path(folder)
    if subtask in SHOWN:
        person = digits.calibrated(annotator, subtask, seed=seed) if annotator else None
        shown = dict(max_digits=max_digits, media=SHOWN[subtask])
        tables = {
            "preference": digits.preference_rows(pairs, seed, annotator=person, **shown),
            "preference_val": digits.preference_rows(held_out, seed, "test", **shown),
            "sft": digits.sft_rows(
                digits.sft_examples(demonstrations, seed, mix={"answer": 1.0}, flaws=flaws, **shown)
            ),
        }
    elif subtask in generation.SUBTASKS:
        if annotator:
            raise ConfigError(f"answers of {subtask} are graded by the oracle; set annotator=None.")
        rows = generation.preference_rows
        tables = {
            "preference": rows(pairs, seed, subtask, max_digits=max_digits),
            "preference_val": rows(held_out, seed, subtask, "test", max_digits=max_digits),
            "sft": generation.sft_rows(demonstrations, seed, subtask, max_digits=max_digits),
        }
    else:
        every = ", ".join((*SHOWN, *generation.SUBTASKS))
        raise ConfigError(f"the digits world has no subtask {subtask!r}; it has {every}.")
    return {
        name: str(digits.write_parquet(rows, folder / f"{name}.parquet"))
        for name, rows in tables.items()
    }


def write(
    workdir: str | Path, subtask: str, *, model: Mapping[str, Any] | None = None,
    data: Mapping[str, Any] | None = None, max_digits: int = 3, seed: int = 0,
) -> dict[str, str]:  # fmt: skip
    """Model and data of one subtask under ``workdir``.

    Args:
      workdir: gets ``model/`` and the files of `write_data`.
      subtask: one of `SUBTASKS`.
      model: keyword arguments of `write_model`.
      data: keyword arguments of `write_data`.
      max_digits: most digits shown or drawn.
      seed: of weights and data.

    Returns:
      name -> path.
    """
    workdir = Path(workdir)
    common = dict(max_digits=max_digits, seed=seed)
    folder = write_model(workdir / "model", subtask, **common, **(model or {}))
    paths = {"model": str(folder)} | write_data(workdir, subtask, **common, **(data or {}))
    for name, path in paths.items():
        log.info("%s: %s", name, path)
    return paths
