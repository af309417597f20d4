"""Templates whose responses are images, audio or video."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from aa_jax.data.example import InvalidRow, Message
from aa_jax.data.templates.base import Side, Template, _Media, _where, column


def _side(kind: str, *names: str, text: str | None = None) -> Side:
    return Side((text,) if text else (), ((kind, names),))


@dataclasses.dataclass(frozen=True)
class PickAPic(Template):
    """Pick-a-Pic: ``label_0`` is 1 when image 0 won, 0 when image 1 did, 0.5 for a tie."""

    def order(self, row: Mapping[str, Any]) -> tuple[int, int]:
        won = float(column(row, ("label_0",), "label"))
        if won not in (0.0, 1.0):
            raise InvalidRow("invalid label", f"{_where(row)}: label_0 is {won}, a tie.")
        return (0, 1) if won else (1, 0)


@dataclasses.dataclass(frozen=True)
class SafeSora(Template):
    """SafeSora: ``helpfulness`` names the better of two nested videos."""

    def order(self, row: Mapping[str, Any]) -> tuple[int, int]:
        better = column(row, ("helpfulness",), "label")
        if better not in ("video_0", "video_1"):
            raise InvalidRow("invalid label", f"{_where(row)}: helpfulness is {better!r}.")
        return (0, 1) if better == "video_0" else (1, 0)

    def _response(self, row: Mapping[str, Any], side: Side, media: _Media) -> Message:
        name = side.media[0][1][0]
        video = column(row, (name,), "response")
        flat = {**row, name: video["video_path"] if isinstance(video, Mapping) else video}
        nested = _Media(flat)
        nested.items = media.items
        return Message("assistant", nested.parts(side.media))


_TEXT_IMAGE = (("image", ("input_image", "image_url")),)

GENERATION_TEMPLATES: dict[str, Template] = {
    "AA_T2I": Template(
        response=_side("image", "image"),
        pair=(_side("image", "image_1"), _side("image", "image_2")),
        label=("overall_image",),
        meta=("image_1_model", "image_2_model"),
    ),
    "AA_T2A": Template(
        response=_side("audio", "audio"),
        pair=(_side("audio", "response_1"), _side("audio", "response_2")),
        label=("overall_audio",),
        meta=("overall_textfeedback",),
    ),
    # The raw subset's columns are not documented; these are the names of its siblings.
    "AA_T2V": Template(
        pair=(_side("video", "video_1"), _side("video", "video_2")),
        response=_side("video", "video"),
        label=("overall_video",),
        meta=("overall_textfeedback",),
    ),
    "Pickapic": PickAPic(
        question=("caption",), pair=(_side("image", "jpg_0"), _side("image", "jpg_1"))
    ),
    "DiffusionDB": Template(response=_side("image", "image")),
    "DiffusionDBCanny": Template(question=("text",), response=_side("image", "image")),
    "WavCaps": Template(question=("answer",), response=_side("audio", "context")),
    "Webvid": Template(question=("caption",), response=_side("video", "video_path")),
    "SafeSora": SafeSora(
        question=("prompt_text",), pair=(_side("video", "video_0"), _side("video", "video_1"))
    ),
    "SOMOS": Template(pair=(_side("audio", "better_data_path"), _side("audio", "worse_data_path"))),
    "ti2ti": Template(
        question=("input_text",),
        media=_TEXT_IMAGE,
        response=_side("image", "output_image", text="output_text"),
        strip=("<image>",),
    ),
    "ti2ti_preference": Template(
        question=("input_text",),
        media=_TEXT_IMAGE,
        pair=(
            _side("image", "better_img", text="better_text"),
            _side("image", "worse_img", text="worse_text"),
        ),
        strip=("<image>",),
    ),
    "ANYTHING_TI2TI": Template(
        question=("question",),
        media=(("image", ("image_url",)),),
        response=_side("image", "output_image_url", text="response"),
        strip=("<image>",),
    ),
}
