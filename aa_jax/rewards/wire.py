"""Requests and results as JSON, for a reward in another process or on another machine."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image

from aa_jax.data.example import Example, Media, Message, Part
from aa_jax.errors import DataError
from aa_jax.rewards.base import Request, Result, RewardError


def request_to_json(request: Request) -> dict[str, Any]:
    """A request with its media; what of its meta has no JSON form is left out.

    Raises:
      RewardError: the reference, or a piece of media, cannot be sent.
    """
    try:
        json.dumps(request.reference)
    except TypeError:
        raise RewardError(
            f"a reward server is sent references as JSON, but this one is a "
            f"{type(request.reference).__name__}. Use text, numbers, lists or mappings, or compute "
            "this reward in the training process."
        ) from None
    found = {"response": request.response, "reference": request.reference}
    if request.pictures:
        drawn = map(Image.fromarray, request.pictures)
        found["pictures"] = [_media_to_json(picture, "a response") for picture in drawn]
    found["meta"] = {name: value for name, value in request.meta.items() if _is_plain(value)}
    if isinstance(request.prompt, str):
        return found | {"prompt": request.prompt}
    example = request.prompt
    messages = [
        {"role": m.role, "content": [_part_to_json(part) for part in m.content]}
        for m in example.messages
    ]
    media = [_media_to_json(item, example.where) for item in example.media]
    return found | {"prompt": request.text, "messages": messages, "media": media}


def request_from_json(values: Any) -> Request:
    """The request behind `request_to_json`; a prompt may be text alone.

    Raises:
      DataError: it is no such thing.
    """
    try:
        if "messages" in values:
            prompt: str | Example = Example(
                tuple(
                    Message(m["role"], tuple(Part(**part) for part in m["content"]))
                    for m in values["messages"]
                ),
                media=tuple(_media_from_json(item) for item in values.get("media", ())),
            )
        else:
            prompt = str(values["prompt"])
        drawn = (_media_from_json(item) for item in values.get("pictures", ()))
        return Request(
            prompt, str(values["response"]), values.get("reference"),
            dict(values.get("meta") or {}), tuple(np.asarray(picture) for picture in drawn),
        )  # fmt: skip
    except (KeyError, TypeError, AttributeError, ValueError, OSError) as error:
        raise DataError(
            f"a request is a mapping with 'prompt' (or 'messages' and 'media') and 'response': "
            f"{type(error).__name__}: {error}"
        ) from error


def result_to_json(result: Result) -> dict[str, Any]:
    """A checked result: its numbers are finite or None (JSON has no NaN)."""
    parts = {name: value if np.isfinite(value) else None for name, value in result.parts.items()}
    return {
        "value": float(result.value), "valid": result.valid, "parts": parts,
        "reason": result.reason, "detail": result.detail,
    }  # fmt: skip


def result_from_json(values: Any) -> Result | int | float | None:
    """What a server said of one response: a mapping as above, a number, or null (skipped)."""
    if not isinstance(values, Mapping):
        return values
    parts = {name: np.nan if value is None else value for name, value in values["parts"].items()}
    return Result(values["value"], bool(values["valid"]), parts, values["reason"], values["detail"])


def _is_plain(value: Any) -> bool:
    if value is None or isinstance(value, (str, bool, int, float)):
        return True
    if isinstance(value, Mapping):
        return all(isinstance(k, str) and _is_plain(v) for k, v in value.items())
    return isinstance(value, (list, tuple)) and all(map(_is_plain, value))


def _part_to_json(part: Part) -> dict[str, Any]:
    if part.type == "text":
        return {"type": "text", "text": part.text}
    return {"type": part.type, "index": part.index}


def _media_to_json(item: Any, where: str) -> dict[str, Any]:
    if isinstance(item, Image.Image):
        file = io.BytesIO()
        item.save(file, "PNG")
        return {"kind": "image", "data": base64.b64encode(file.getvalue()).decode()}
    if isinstance(item, Media) and item.array is not None:
        file = io.BytesIO()
        np.save(file, np.asarray(item.array), allow_pickle=False)
        data = base64.b64encode(file.getvalue()).decode()
        return {"kind": item.kind, "array": data, "sampling_rate": item.sampling_rate}
    if isinstance(item, Media) and item.data is not None:
        data = base64.b64encode(item.data).decode()
        return {"kind": item.kind, "data": data, "mime": item.mime}
    raise RewardError(
        f"{where or 'a prompt'}: its media ({type(item).__name__}) is neither decoded nor read, so "
        "it cannot be sent to a reward server."
    )


def _media_from_json(values: Mapping[str, Any]) -> Any:
    if "array" in values:
        array = np.load(io.BytesIO(base64.b64decode(values["array"])), allow_pickle=False)
        return Media(values["kind"], array=array, sampling_rate=values.get("sampling_rate"))
    data = base64.b64decode(values["data"], validate=True)
    if values["kind"] == "image":
        return Image.open(io.BytesIO(data)).convert("RGB")
    return Media(values["kind"], data=data, mime=values.get("mime"))
