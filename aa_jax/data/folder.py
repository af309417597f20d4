"""What the files of a checkpoint folder say about text and images, apart from the tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from aa_jax.data.images import read_json

# Towers whose class token the features leave out.
_UNCOUNTED_CLS = ("clip_vision_model", "clip")


def write_json(folder: Path, files: dict[str, dict[str, Any]]) -> None:
    """Writes JSON objects, file name -> content."""
    for name, value in files.items():
        text = json.dumps(value, indent=2, sort_keys=True)
        (folder / name).write_text(text + "\n", encoding="utf-8")


def patch_settings(folder: Path) -> dict[str, Any]:
    """The tokens of a Qwen2-VL folder: the tokenizer's own names for them, or the usual ones."""
    path = folder / "tokenizer_config.json"
    named = read_json(path) if path.is_file() else {}
    return {
        "image_token": named.get("image_token") or "<|image_pad|>",
        "video_token": named.get("video_token") or "<|video_pad|>",
        "media_borders": ("<|vision_start|>", "<|vision_end|>"),
    }


def vision_settings(folder: Path) -> dict[str, Any]:
    """Image token, patch size and which tower outputs count, from either config file."""
    names = ("image_token", "patch_size", "vision_feature_select_strategy")
    names += ("num_additional_image_tokens",)
    path = folder / "processor_config.json"
    config = read_json(path) if path.is_file() else {}
    settings = {name: config[name] for name in names if config.get(name) is not None}
    if (folder / "config.json").is_file():
        model = read_json(folder / "config.json")
        vision = model.get("vision_config") or {}
        if "patch_size" in vision:
            settings.setdefault("patch_size", vision["patch_size"])
        if strategy := model.get("vision_feature_select_strategy"):
            settings.setdefault("vision_feature_select_strategy", strategy)
        if "model_type" in vision:
            cls_token = int(vision["model_type"] in _UNCOUNTED_CLS)
            settings.setdefault("num_additional_image_tokens", cls_token)
    return settings


def audio_settings(folder: Path) -> dict[str, Any]:
    """The token of a Qwen2-Audio folder that stands for a clip, where the folder names it."""
    path = folder / "processor_config.json"
    named = read_json(path) if path.is_file() else {}
    return {"audio_token": named["audio_token"]} if named.get("audio_token") else {}


def chat_source(folder: Path, tokenizer: Any) -> str | None:
    """The chat template: its own file, the processor's, or the tokenizer's (where one is given)."""
    if (path := folder / "chat_template.jinja").is_file():
        return path.read_text(encoding="utf-8")
    for name in ("chat_template.json", "processor_config.json"):
        if (folder / name).is_file():
            if source := read_json(folder / name).get("chat_template"):
                return source
    source = None if tokenizer is None else tokenizer.chat_template
    return source.get("default") if isinstance(source, dict) else source
