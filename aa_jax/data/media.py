"""Decoding images: bytes, a path, a data URL or a datasets column -> an RGB PIL image.

Colour rules, the same for every source. They are LLaVA's, which was trained on
``Image.open(...).convert("RGB")``: alpha is dropped, not blended (so does ``load_image`` of
transformers; its newest processors blend over white when handed an RGBA image object); grey is
repeated; palettes are looked up; CMYK is converted by PIL; 16-bit images are scaled by 1/257 (PIL
alone would clip them). The EXIF orientation is applied; of an animation the first frame counts.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import io
import os
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageFile, ImageOps

from aa_jax.data.example import Example, Media
from aa_jax.errors import MediaError

# Broken EXIF and odd TIFF tags warn; the pixels are what counts here. Said once, after any filter
# of the user's: images are decoded in threads, and `warnings.catch_warnings` in one thread changes,
# and at last undoes, the filters of all.
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.", append=True)

_DATA_URL = re.compile(r"data:(?P<mime>[\w.+-]+/[\w.+-]+)?(;[\w=-]+)*;base64,", re.ASCII)
_NO_IMAGE_FIX = "Remove or repair the row, or point media_root at the folder with the images."


def reference(value: Any, kind: str, where: str = "") -> Media | Image.Image:
    """What a dataset column holds -> a Media that is not decoded yet (or the PIL image itself).

    Args:
      value: bytes, path, data URL, base64 text, ``{"bytes", "path"}`` (datasets with
        ``decode=False``), ``{"array", "sampling_rate"}`` (decoded audio), or a PIL image.
      kind: ``image``, ``audio`` or ``video``.
      where: ``file:row`` for the error.

    Raises:
      MediaError: the column is empty or holds something else.
    """
    if isinstance(value, (Image.Image, Media)):
        return value
    if isinstance(value, Mapping) and "array" in value:
        return Media(kind, array=value["array"], sampling_rate=_rate(value.get("sampling_rate")))
    if isinstance(value, Mapping):
        data, path = value.get("bytes"), value.get("path")
        known = isinstance(data, (bytes, bytearray, memoryview, type(None)))
        known = known and isinstance(path, (str, os.PathLike, type(None)))
        if known and (data or path):
            data, path = bytes(data or b""), None if path is None else os.fspath(path)
            return Media(kind, data=data or None, path=path)
    elif isinstance(value, (bytes, bytearray, memoryview)) and len(value):
        return Media(kind, data=bytes(value))
    elif isinstance(value, (str, os.PathLike)) and (text := os.fspath(value)).strip():
        return _from_text(text.strip(), kind, where)
    elif isinstance(value, np.ndarray):
        return _from_array(value, kind, where)
    raise MediaError(
        f"{where or 'A row'}: the {kind} column holds {_describe(value)}; expected bytes, a path, "
        f'a data URL, {{"bytes", "path"}} or a decoded {kind}. {_NO_IMAGE_FIX}'
    )


def _rate(value: Any) -> int | None:
    """A sampling rate as a whole number of Hz; None where it is not one."""
    try:
        return int(value)
    except (TypeError, ValueError, OverflowError):
        return None


def _from_array(array: np.ndarray, kind: str, where: str) -> Image.Image:
    if kind == "image":
        try:
            return Image.fromarray(array)
        except (TypeError, ValueError):
            pass
    raise MediaError(
        f"{where or 'A row'}: the {kind} column holds an array {list(array.shape)} {array.dtype}; "
        "an image is [height, width] or [height, width, 3], uint8; audio and video come as "
        '{"array", "sampling_rate"}.'
    )


def _from_text(text: str, kind: str, where: str) -> Media:
    if match := _DATA_URL.match(text):
        return Media(kind, data=_base64(text[match.end() :], where), mime=match["mime"])
    if text.startswith(("http://", "https://")):
        raise MediaError(
            f"{where or 'A row'}: the {kind} is a web address ({text[:80]}); nothing is downloaded "
            "while training. Download the files first and put their paths in the column."
        )
    # Base64 without a header is told from a path by its length: no path is that long.
    if len(text) > 4096 and re.fullmatch(r"[A-Za-z0-9+/=\s]+", text[:4096]):
        return Media(kind, data=_base64(text, where))
    return Media(kind, path=text)


def _base64(text: str, where: str) -> bytes:
    try:
        return base64.b64decode(text, validate=False)
    except (binascii.Error, ValueError) as error:
        raise MediaError(f"{where or 'A row'}: broken base64 data ({error}).") from error


def _describe(value: Any) -> str:
    if value is None:
        return "nothing (null)"
    if isinstance(value, Mapping):
        held = {str(k): type(v).__name__ for k, v in value.items() if v}
        return f"a mapping with {held or sorted(map(str, value)) or 'no keys'} and no content"
    return f"an empty {type(value).__name__}" if not value else f"a {type(value).__name__}"


def find_file(path: str, root: str | None, where: str = "", kind: str = "image") -> Path:
    """Resolves a media path: absolute, or relative to the dataset's folder.

    Raises:
      MediaError: no such file; lists the places tried.
    """
    try:
        given = Path(path).expanduser()
    except RuntimeError:  # no such user
        given = Path(path)
    tried = [given] if given.is_absolute() or root is None else [Path(root) / given]
    for candidate in tried:
        if candidate.is_file():
            return candidate
    raise MediaError(
        f"{where or 'A row'}: {kind} file {path!r} is not at {tried[0]}. Relative paths start at "
        "the folder of the dataset file; pass media_root=... if the files lie elsewhere."
    )


def read_bytes(media: Media, root: str | None = None, where: str = "") -> bytes:
    """The encoded file behind a Media."""
    if media.data is not None:
        return media.data
    if media.path is None:
        raise MediaError(f"{where or 'A row'}: this {media.kind} is already decoded.")
    return find_file(media.path, root, where, media.kind).read_bytes()


def media_key(items: Sequence[tuple[str, Any]]) -> str | None:
    """The hash of media as they came, undecoded; None of none.

    Args:
      items: (kind, medium) each: a PIL image, or a Media that holds bytes or an array.
    """
    digest = hashlib.sha256()
    for kind, item in items:
        if isinstance(item, Media) and item.data is not None:
            head, data = "file", item.data
        elif isinstance(item, Media):
            array = np.ascontiguousarray(item.array)
            head, data = f"{array.dtype} {array.shape} {item.sampling_rate}", array.tobytes()
        else:
            head, data = f"{item.mode} {item.size}", item.tobytes()
            head += f" {item.getpalette('RGBA')}" if item.mode in ("P", "PA") else ""
            head += f" {item.getexif().get(0x0112, 1)}"  # the pixels are held as they came
        digest.update(f"{kind} {head} {len(data)} ".encode())
        digest.update(data)
    return digest.hexdigest() if items else None


def decode_image(value: Any, *, root: str | None = None, where: str = "") -> Image.Image:
    """Any image value (see ``reference``) -> RGB PIL image.

    Raises:
      MediaError: missing, truncated or corrupt, naming ``where``.
    """
    value = reference(value, "image", where)
    name = ""
    if isinstance(value, Media):
        data = read_bytes(value, root, where)
        name = f" ({value.path}), {len(data)} bytes" if value.path else f", {len(data)} bytes"
    try:
        image = Image.open(io.BytesIO(data)) if isinstance(value, Media) else value
        _load_whole(image)
        image = ImageOps.exif_transpose(image)
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        raise MediaError(
            f"{where or 'A row'}: cannot decode the image{name}: {error}. {_NO_IMAGE_FIX}"
        ) from error
    image = to_rgb(image, where)
    if not image.width or not image.height:
        raise MediaError(
            f"{where or 'A row'}: the image is {image.height} x {image.width} pixels, so there is "
            f"nothing to see. {_NO_IMAGE_FIX}"
        )
    return image


def _load_whole(image: Image.Image) -> None:
    # Pillow has a global switch that turns truncated files into grey areas; never use it.
    if ImageFile.LOAD_TRUNCATED_IMAGES:
        raise MediaError(
            "PIL.ImageFile.LOAD_TRUNCATED_IMAGES is set: damaged images would train as grey "
            "areas. Unset it."
        )
    image.load()


def to_rgb(image: Image.Image, where: str = "") -> Image.Image:
    """Any PIL mode -> RGB, by the rules at the top of this file.

    Raises:
      MediaError: a pixel is not a number.
    """
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I") or image.mode == "F":
        pixels = np.asarray(image).astype(np.float64)
        if np.isnan(pixels).any():
            raise MediaError(f"{where or 'A row'}: the image holds NaN pixels. {_NO_IMAGE_FIX}")
        if 0 < pixels.max(initial=0) <= 1 and (pixels % 1).any():
            raise MediaError(
                f"{where or 'A row'}: the image holds real numbers up to {pixels.max():g}; they "
                "would all turn out black, as 255 is white. Multiply them by 255."
            )
        if image.mode != "F" and (image.mode != "I" or pixels.max(initial=0) > 255):
            pixels = pixels / 257.0
        grey = np.clip(np.rint(pixels), 0, 255).astype(np.uint8)
        return Image.fromarray(grey).convert("RGB")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # otherwise PIL warns; the colours are the same
    return image.convert("RGB")


def image_size(value: Any, *, root: str | None = None, where: str = "") -> tuple[int, int]:
    """(height, width) from the header alone, orientation applied."""
    value = reference(value, "image", where)
    if isinstance(value, Media):
        data = read_bytes(value, root, where)
        try:
            value = Image.open(io.BytesIO(data))
            return _oriented(value)
        except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
            raise MediaError(
                f"{where or 'A row'}: not an image that can be read, {len(data)} bytes: {error}. "
                f"{_NO_IMAGE_FIX}"
            ) from error
    return _oriented(value)


def _oriented(image: Image.Image) -> tuple[int, int]:
    # Of a TIFF file PIL gives the size as turned already. Of a PNG file this reads the pixels.
    turned = image.format != "TIFF" and image.getexif().get(0x0112, 1) in (5, 6, 7, 8)
    return image.size if turned else image.size[::-1]


def decode(example: Example, root: str | None = None) -> Example:
    """Decodes the images of an example; audio and video stay ``Media`` with a resolved path."""
    decoded = []
    for item in example.media:
        if not isinstance(item, Media) or item.kind == "image":
            item = decode_image(item, root=root, where=example.where)
        elif item.path is not None and item.data is None:
            path = find_file(item.path, root, example.where, item.kind)
            item = Media(item.kind, path=str(path), mime=item.mime)
        decoded.append(item)
    return example.replace(media=tuple(decoded))
