"""Images, audio and video as data: URIs, so that a report needs no other file."""

import base64
import dataclasses
import io
from typing import Any

from aa_jax.errors import MediaError
from aa_jax.report.html import Markup, el

_HEIGHT, _WIDTH = 112, 240  # CSS pixels a small image is enlarged to at most
_LARGEST = 768  # pixels kept of a large image's longer side
_MAGIC = (
    (b"\x89PNG", "image/png"),
    (b"\xff\xd8\xff", "image/jpeg"),
    (b"GIF8", "image/gif"),
    (b"OggS", "audio/ogg"),
    (b"fLaC", "audio/flac"),
    (b"ID3", "audio/mpeg"),
    (b"\xff\xfb", "audio/mpeg"),
    (b"\x1aE\xdf\xa3", "video/webm"),
)


@dataclasses.dataclass(frozen=True)
class Media:
    """A clip with the words for those who cannot see or hear it.

    Attributes:
      data: A PIL image, or encoded bytes (png, jpeg, gif, webp, wav, ogg, flac, mp3, mp4, webm).
      alt: What it shows; the column's name if empty.
    """

    data: Any
    alt: str = ""


def is_media(value: Any) -> bool:
    """Whether a cell is media (or a list of media) rather than text or a number."""
    if isinstance(value, (list, tuple)):
        return bool(value) and all(is_media(item) for item in value)
    return isinstance(value, (bytes, Media)) or hasattr(value, "convert")


def show(value: Any, alt: str) -> Markup:
    """The element for one clip.

    Raises:
      MediaError: The bytes are of no known kind.
    """
    if isinstance(value, Media):
        value, alt = value.data, value.alt or alt
    if not isinstance(value, bytes):
        return _image(value, _encode(value), alt)
    kind = _sniff(value, alt)
    if kind.startswith("image/"):
        from PIL import Image, UnidentifiedImageError

        try:
            with Image.open(io.BytesIO(value)) as image:
                image.load()
                too_large = max(image.size) > _LARGEST and kind != "image/gif"
                return _image(image, _encode(image) if too_large else (value, kind), alt)
        except (UnidentifiedImageError, OSError) as error:
            raise MediaError(
                f"sample {alt!r}: these {len(value)} bytes look like {kind} but cannot be decoded "
                f"({error}). Pass a complete file."
            ) from error
    tag = kind.split("/")[0]
    return el(tag, controls=True, preload="metadata", src=_uri(value, kind), aria_label=alt)


def _image(image: Any, encoded: tuple[bytes, str], alt: str) -> Markup:
    width, height = image.size
    # Whole multiples only: otherwise some pixels are wider than others.
    scale = max(1, min(_HEIGHT // height, _WIDTH // width))
    picture = el(
        "img", src=_uri(*encoded), alt=alt, width=width * scale, height=height * scale,
        class_="pixels" if scale > 1 else None,
    )  # fmt: skip
    return el("button", picture, type="button", class_="zoom", aria_label=f"Enlarge: {alt}")


def _encode(image: Any) -> tuple[bytes, str]:
    """PIL image -> (bytes, mime): png for small or transparent ones, jpeg for photographs."""
    image = image.copy()
    image.thumbnail((_LARGEST, _LARGEST))
    if image.mode not in ("1", "L", "RGB", "RGBA", "P"):
        image = image.convert("RGB")
    buffer = io.BytesIO()
    photograph = image.mode == "RGB" and max(image.size) > 160
    if photograph:
        image.save(buffer, "JPEG", quality=88)
    else:
        image.save(buffer, "PNG", optimize=True)
    return buffer.getvalue(), "image/jpeg" if photograph else "image/png"


def _sniff(data: bytes, alt: str) -> str:
    for magic, kind in _MAGIC:
        if data.startswith(magic):
            return kind
    if data[:4] == b"RIFF":
        return {b"WAVE": "audio/wav", b"WEBP": "image/webp"}.get(data[8:12], "image/webp")
    if data[4:8] == b"ftyp":
        return "video/mp4"
    raise MediaError(
        f"sample {alt!r}: the first bytes {data[:8]!r} are no image, audio or video format a "
        "browser shows. Encode it as png, jpeg, wav, mp3, ogg, mp4 or webm."
    )


def _uri(data: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"
