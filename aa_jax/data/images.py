"""Pixels as the Hugging Face image processors make them, in numpy and PIL, without torch.

The settings come from the checkpoint folder; the result is bit-identical to the PIL classes of
transformers (resize of uint8, centre crop, then one multiply and one normalisation in float32).
As every pixel is one of 256 values, the last two are a table look-up per channel.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from PIL import Image

from aa_jax.errors import CheckpointError

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
_HALF = (0.5, 0.5, 0.5)
_CLIP = dict(
    size={"shortest_edge": 224},
    crop_size={"height": 224, "width": 224},
    resample=3,
    do_center_crop=True,
    image_mean=CLIP_MEAN,
    image_std=CLIP_STD,
)
# What each class assumes when its file does not say.
DEFAULTS: dict[str, dict[str, Any]] = {
    "CLIPImageProcessor": _CLIP,
    "CLIPFeatureExtractor": _CLIP,
    "LlavaImageProcessor": _CLIP,
    "LlavaNextImageProcessor": _CLIP,  # of each of its tiles
    "ChameleonImageProcessor": dict(
        size={"shortest_edge": 512},
        crop_size={"height": 512, "width": 512},
        resample=1,
        do_center_crop=True,
        rescale_factor=0.0078,
        image_mean=(1.0, 1.0, 1.0),
        image_std=(1.0, 1.0, 1.0),
    ),
    "SiglipImageProcessor": dict(
        size={"height": 224, "width": 224}, resample=3, image_mean=_HALF, image_std=_HALF
    ),
    "ViTImageProcessor": dict(
        size={"height": 224, "width": 224}, resample=2, image_mean=_HALF, image_std=_HALF
    ),
}


def normalisation_table(
    rescale: bool, factor: float, normalize: bool, mean: Sequence[float], std: Sequence[float]
) -> Float[np.ndarray, "3 256"]:
    """What each of a channel's 256 values becomes."""
    channels = []
    for centre, spread in zip(mean, std, strict=True):
        value = np.arange(256)
        if rescale:
            value = (value.astype(np.float64) * factor).astype(np.float32)
        value = value.astype(np.float32)
        if normalize:
            value = (value - np.float32(centre)) / np.float32(spread)
        channels.append(value)
    return np.stack(channels)


@dataclasses.dataclass(frozen=True)
class ImageProcessor:
    """Settings of one image processor; call it with an RGB PIL image.

    Attributes:
      name: the Hugging Face class these settings belong to.
      size: ``{"shortest_edge": n}`` or ``{"height": h, "width": w}``, pixels.
      crop_size: ``{"height": h, "width": w}`` of the centre crop.
      resample: PIL filter number (2 bilinear, 3 bicubic).
      do_pad: pad to a square with the mean colour first (LLaVA's ``expand2square``).
    """

    size: Mapping[str, int]
    crop_size: Mapping[str, int] | None = None
    name: str = "CLIPImageProcessor"
    resample: int = 3
    do_resize: bool = True
    do_center_crop: bool = False
    do_rescale: bool = True
    rescale_factor: float = 1 / 255
    do_normalize: bool = True
    image_mean: tuple[float, ...] = CLIP_MEAN
    image_std: tuple[float, ...] = CLIP_STD
    do_pad: bool = False

    def __post_init__(self):
        table = normalisation_table(
            self.do_rescale, self.rescale_factor, self.do_normalize, self.image_mean, self.image_std
        )
        object.__setattr__(self, "_table", table)

    @property
    def fixed_size(self) -> tuple[int, int] | None:
        """(height, width) of every output, or None when it depends on the image."""
        if self.do_center_crop and self.crop_size:
            return self.crop_size["height"], self.crop_size["width"]
        if self.do_resize and "height" in self.size:
            return self.size["height"], self.size["width"]
        if self.do_resize and self.do_pad:
            return self.size["shortest_edge"], self.size["shortest_edge"]
        return None

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) of the output for an input of this size."""
        if self.fixed_size:
            return self.fixed_size
        return self._resized(height, width) if self.do_resize else (height, width)

    def _resized(self, height: int, width: int) -> tuple[int, int]:
        if "shortest_edge" not in self.size:
            return self.size["height"], self.size["width"]
        short, long = min(height, width), max(height, width)
        edge = self.size["shortest_edge"]
        scaled = int(edge * long / short)
        return (scaled, edge) if width <= height else (edge, scaled)

    def __call__(self, image: Image.Image) -> Float[np.ndarray, "3 H W"]:
        """RGB image -> normalised pixels, channels first."""
        if self.do_pad and image.width != image.height:
            edge = max(image.size)
            # Truncated, not rounded: the colour LLaVA was trained with.
            canvas = Image.new("RGB", (edge, edge), tuple(int(m * 255) for m in self.image_mean))
            canvas.paste(image, ((edge - image.width) // 2, (edge - image.height) // 2))
            image = canvas
        if self.do_resize:
            height, width = self._resized(image.height, image.width)
            image = image.resize((width, height), resample=self.resample)
        pixels = np.asarray(image, dtype=np.uint8)
        if self.do_center_crop and self.crop_size:
            pixels = _center_crop(pixels, self.crop_size["height"], self.crop_size["width"])
        normalised = np.empty((3, *pixels.shape[:2]), np.float32)
        for c, table in enumerate(self._table):
            np.take(table, pixels[..., c], out=normalised[c], mode="clip")
        return normalised

    @classmethod
    def from_dict(cls, config: Mapping[str, Any], where: str = "") -> ImageProcessor:
        """Settings as in ``preprocessor_config.json``.

        Raises:
          CheckpointError: a class whose pixels are made differently.
        """
        kind = config.get("image_processor_type") or config.get("feature_extractor_type")
        name = str(kind).removesuffix("Fast").removesuffix("Pil")
        if name not in DEFAULTS:
            raise CheckpointError(
                f"{where or 'The folder'} names the image processor {kind!r}; images are prepared "
                f"as one of {', '.join(DEFAULTS)}. Use a checkpoint of a supported family."
            )
        values = {**DEFAULTS[name]}
        fields = {field.name for field in dataclasses.fields(cls)}
        values |= {k: v for k, v in config.items() if k in fields and v is not None}
        values["size"] = _size(values["size"], square=name not in _SHORTEST)
        if values.get("crop_size") is not None:
            values["crop_size"] = _size(values["crop_size"], square=True)
        if name != "LlavaImageProcessor":
            values["do_pad"] = False  # elsewhere the key means padding to the largest of a batch
        values["image_mean"] = tuple(values["image_mean"])
        values["image_std"] = tuple(values["image_std"])
        return cls(**{**values, "name": name})

    def to_dict(self) -> dict[str, Any]:
        """Settings as ``preprocessor_config.json`` holds them."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        values["image_processor_type"] = values.pop("name")
        return {k: v for k, v in values.items() if v is not None} | {"do_convert_rgb": True}


_SHORTEST = ("CLIPImageProcessor", "CLIPFeatureExtractor", "LlavaImageProcessor")
_SHORTEST += ("ChameleonImageProcessor", "LlavaNextImageProcessor")
# Feature extractors that make something else of a checkpoint folder than pixels.
_NOT_IMAGES = ("WhisperFeatureExtractor",)


def _size(size: Any, square: bool) -> dict[str, int]:
    """Old files hold a number; new ones name the edges."""
    if isinstance(size, Mapping):
        return {str(k): int(v) for k, v in size.items() if v is not None}
    if isinstance(size, (list, tuple)):
        return {"height": int(size[0]), "width": int(size[1])}
    return {"height": int(size), "width": int(size)} if square else {"shortest_edge": int(size)}


def _center_crop(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """Crop [H, W, C] around the centre; what lies outside a smaller image is black."""
    have_h, have_w = pixels.shape[:2]
    top, left = (have_h - height) // 2, (have_w - width) // 2
    if top >= 0 and left >= 0:
        return pixels[top : top + height, left : left + width]
    # As in the reference: pad around the centre first, then cut from the padded image.
    full_h, full_w = max(height, have_h), max(width, have_w)
    canvas = np.zeros((full_h, full_w, pixels.shape[2]), pixels.dtype)
    pad_top, pad_left = -((have_h - full_h) // 2), -((have_w - full_w) // 2)
    canvas[pad_top : pad_top + have_h, pad_left : pad_left + have_w] = pixels
    top, left = top + pad_top, left + pad_left
    top, left = max(0, top), max(0, left)
    return canvas[top : top + height, left : left + width]


def load_image_processor(folder: Path) -> Any:
    """The image processor of a checkpoint folder; None when it has none (a text model)."""
    for name in ("preprocessor_config.json", "processor_config.json"):
        path = folder / name
        if not path.is_file():
            continue
        config = read_json(path)
        both, config = config, config.get("image_processor", config)
        kind = config.get("image_processor_type") or config.get("feature_extractor_type")
        if kind is None or kind in _NOT_IMAGES:
            continue
        if str(kind).startswith("Qwen2VLImageProcessor"):
            return _patch_processor(folder, config, both, str(path))
        if str(kind).startswith("LlavaNextImageProcessor"):
            from aa_jax.data.anyres import load_anyres  # it builds on this file

            return load_anyres(folder, config, str(path))
        return ImageProcessor.from_dict(config, str(path))
    return None


def _patch_processor(
    folder: Path, config: Mapping[str, Any], both: Mapping[str, Any], where: str
) -> Any:
    """Qwen2-VL's, with the settings for videos, which stand in one of three places."""
    from aa_jax.data.patches import PatchProcessor  # it builds on this file

    video = both.get("video_processor")
    if (path := folder / "video_preprocessor_config.json").is_file():
        video = read_json(path)
    made = PatchProcessor.from_dict(config, video, where)
    if (path := folder / "config.json").is_file():
        tower = read_json(path).get("vision_config") or {}
        if "tokens_per_second" in tower:
            return dataclasses.replace(made, tokens_per_second=float(tower["tokens_per_second"]))
    return made


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a checkpoint folder.

    Raises:
      CheckpointError: damaged, or not an object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"Cannot read {path}: {error}. Download it again.") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a {type(value).__name__}, not a JSON object.")
    return value
