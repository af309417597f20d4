"""Pixels as Qwen2-VL reads them: images and videos of any size as a list of patches.

An image keeps its aspect ratio: it is resized to the nearest size whose edges are multiples of
patch_size x merge_size and whose area is within bounds, then cut into patches. The numbers are bit
for bit those of transformers' PIL image processor. A video is cut the same way with
temporal_patch_size frames per patch; an image stands for that many equal frames, so a video of
repeated frames has the image's patches.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int, UInt8
from PIL import Image

from aa_jax.data.example import InvalidRow
from aa_jax.data.images import CLIP_MEAN, CLIP_STD, normalisation_table
from aa_jax.data.mrope import Grid
from aa_jax.errors import CheckpointError

NAME = "Qwen2VLImageProcessor"
_MOST_ELONGATED = 200
_IMAGE_PIXELS = (56 * 56, 28 * 28 * 1280)
_VIDEO_PIXELS = (128 * 28 * 28, 28 * 28 * 768)


def smart_resize(
    height: int, width: int, *, factor: int, pixels: tuple[int, int], where: str = ""
) -> tuple[int, int]:
    """The size an image is resized to: multiples of ``factor``, area within ``pixels``.

    Args:
      height: of the image, pixels.
      width: of the image, pixels.
      factor: edge of the square that makes one feature.
      pixels: smallest and largest area.
      where: ``file:row`` for the error.

    Raises:
      InvalidRow: one edge is more than 200 times the other.
    """
    ratio = max(height, width) / min(height, width)
    if ratio > _MOST_ELONGATED:
        raise InvalidRow(
            "image too elongated",
            f"{where or 'An image'}: {height} x {width} pixels; one edge is {ratio:.0f} times the "
            f"other, and this model reads at most {_MOST_ELONGATED} times. Crop the image.",
        )
    least, most = pixels
    high, wide = (round(edge / factor) * factor for edge in (height, width))
    if high * wide > most:
        shrink = math.sqrt(height * width / most)
        high, wide = (
            max(factor, math.floor(edge / shrink / factor) * factor) for edge in (height, width)
        )
    elif high * wide < least:
        grow = math.sqrt(least / (height * width))
        high, wide = (math.ceil(edge * grow / factor) * factor for edge in (height, width))
    return high, wide


@dataclasses.dataclass(frozen=True)
class VideoSettings:
    """How a video is sampled.

    Attributes:
      pixels: smallest and largest area of a frame.
      fps: frames per second taken; None takes all of them.
      min_frames: fewest frames taken (never more than the video has).
      max_frames: most frames taken.
    """

    pixels: tuple[int, int] = _VIDEO_PIXELS
    fps: float | None = 2.0
    min_frames: int = 4
    max_frames: int = 768


def sample_frames(
    total: int, rate: float, settings: VideoSettings, factor: int
) -> Int[np.ndarray, " N"]:
    """Which frames of a video are read: evenly spaced from the first.

    Args:
      total: frames in the file.
      rate: its frames per second.
      settings: how many to take.
      factor: frames per patch; the number taken is a multiple, unless the video has fewer.
    """
    if settings.fps is None:
        return np.arange(total, dtype=np.int32)
    most = min(settings.max_frames, total) // factor * factor
    number = min(max(total / rate * settings.fps, settings.min_frames), most, total)
    number = math.floor(number / factor) * factor
    if number < 1:
        return np.arange(min(total, factor), dtype=np.int32)
    return (np.arange(number) * (total / number)).astype(np.float32).astype(np.int32)


@dataclasses.dataclass(frozen=True)
class PatchProcessor:
    """Settings of a Qwen2-VL image processor.

    Attributes:
      patch_size: edge of a patch, pixels.
      merge_size: a square of merge_size x merge_size patches is one feature.
      temporal_patch_size: frames per patch.
      pixels: smallest and largest area of a resized image.
      video: the same for videos, and their sampling.
      resample: PIL filter number.
      tokens_per_second: positions per second of video (Qwen2.5-VL); None: one per temporal patch.
    """

    patch_size: int = 14
    merge_size: int = 2
    temporal_patch_size: int = 2
    pixels: tuple[int, int] = _IMAGE_PIXELS
    video: VideoSettings = VideoSettings()
    resample: int = 3
    do_resize: bool = True
    do_rescale: bool = True
    rescale_factor: float = 1 / 255
    do_normalize: bool = True
    image_mean: tuple[float, ...] = CLIP_MEAN
    image_std: tuple[float, ...] = CLIP_STD
    tokens_per_second: float | None = None

    def __post_init__(self):
        table = normalisation_table(
            self.do_rescale, self.rescale_factor, self.do_normalize, self.image_mean, self.image_std
        )
        object.__setattr__(self, "_table", table)

    @property
    def patch_numbers(self) -> int:
        """Numbers in one patch."""
        return 3 * self.temporal_patch_size * self.patch_size**2

    def grid(self, height: int, width: int, where: str = "") -> Grid:
        """Patches of an image of this size."""
        height, width = self._resized(height, width, self.pixels, where)
        return Grid(1, height // self.patch_size, width // self.patch_size)

    def video_grid(self, frames: int, seconds: float, size: tuple[int, int], where: str) -> Grid:
        """Patches of a video.

        Args:
          frames: number of frames taken.
          seconds: between two frames taken.
          size: (height, width) of the file's frames.
          where: ``file:row`` for errors.
        """
        height, width = self._resized(*size, self.video.pixels, where)
        step = 1.0
        if self.tokens_per_second is not None:
            step = self.tokens_per_second * seconds * self.temporal_patch_size
        grid = -(-frames // self.temporal_patch_size)
        return Grid(grid, height // self.patch_size, width // self.patch_size, step)

    def _resized(
        self, height: int, width: int, pixels: tuple[int, int], where: str
    ) -> tuple[int, int]:
        factor = self.patch_size * self.merge_size
        if self.do_resize:
            return smart_resize(height, width, factor=factor, pixels=pixels, where=where)
        if height % factor or width % factor:
            raise InvalidRow(
                "image size",
                f"{where or 'An image'}: {height} x {width} pixels are no multiple of {factor}, "
                "and the checkpoint's do_resize is false. Resize the image.",
            )
        return height, width

    def __call__(self, image: Image.Image, grid: Grid) -> Float[np.ndarray, "N K"]:
        """RGB image -> its patches, square by square."""
        return self.patches([image], grid)

    def patches(self, frames: Sequence[Image.Image], grid: Grid) -> Float[np.ndarray, "N K"]:
        """Frames -> patches of ``grid``; the last frame is repeated to fill its patch."""
        size = (grid.columns * self.patch_size, grid.rows * self.patch_size)
        taken = list(frames) + [frames[-1]] * (grid.frames * self.temporal_patch_size - len(frames))
        seen: dict[int, np.ndarray] = {}
        for frame in taken:  # a repeated frame is made once
            if id(frame) not in seen:
                seen[id(frame)] = self._normalised(frame, size)
        pixels = np.stack([seen[id(frame)] for frame in taken])
        m, p = self.merge_size, self.patch_size
        cut = pixels.reshape(
            grid.frames,
            self.temporal_patch_size,
            3,
            grid.rows // m,
            m,
            p,
            grid.columns // m,
            m,
            p,
        )
        # -> frame, square row, square column, row and column in it, channel, time, pixel y, x
        return cut.transpose(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(grid.patches, -1)

    def _normalised(self, frame: Image.Image, size: tuple[int, int]) -> Float[np.ndarray, "3 H W"]:
        if frame.size != size:
            frame = frame.resize(size, resample=self.resample)
        pixels: UInt8[np.ndarray, "H W 3"] = np.asarray(frame, dtype=np.uint8)
        return np.stack([table[pixels[..., c]] for c, table in enumerate(self._table)])

    @classmethod
    def from_dict(
        cls, config: Mapping[str, Any], video: Mapping[str, Any] | None = None, where: str = ""
    ) -> PatchProcessor:
        """Settings as in ``preprocessor_config.json`` and ``video_preprocessor_config.json``.

        Raises:
          CheckpointError: the area's bounds are unreadable, or videos are sampled to a number.
        """
        fields = {field.name for field in dataclasses.fields(cls)} - {"video", "pixels"}
        values = {k: v for k, v in config.items() if k in fields and v is not None}
        for name in ("image_mean", "image_std"):
            if name in values:
                values[name] = tuple(values[name])
        moving = config if video is None else video
        default = VideoSettings()
        if moving.get("num_frames") is not None:
            raise CheckpointError(
                f"{where or 'The video processor'} sets num_frames to {moving['num_frames']!r}; "
                "videos are sampled at a rate. Give fps, min_frames and max_frames instead."
            )
        # Files of transformers say false of do_sample_frames, and name the rate all the same.
        every = moving.get("do_sample_frames") is False and moving.get("fps", 0) is None
        clip = VideoSettings(
            pixels=_area(moving, _VIDEO_PIXELS, where),
            fps=None if every else float(moving.get("fps") or default.fps),
            min_frames=moving.get("min_frames") or default.min_frames,
            max_frames=moving.get("max_frames") or default.max_frames,
        )
        return cls(**values, pixels=_area(config, _IMAGE_PIXELS, where), video=clip)

    def to_dict(self) -> dict[str, Any]:
        """Settings as ``preprocessor_config.json`` holds them."""
        left_out = ("video", "pixels", "tokens_per_second")
        fields = [f.name for f in dataclasses.fields(self) if f.name not in left_out]
        values = {name: getattr(self, name) for name in fields}
        return values | {
            "image_processor_type": NAME,
            "do_convert_rgb": True,
            "size": {"shortest_edge": self.pixels[0], "longest_edge": self.pixels[1]},
        }

    def video_dict(self) -> dict[str, Any]:
        """Settings as ``video_preprocessor_config.json`` holds them."""
        least, most = self.video.pixels
        return self.to_dict() | {
            "video_processor_type": "Qwen2VLVideoProcessor",
            "size": {"shortest_edge": least, "longest_edge": most},
            "fps": self.video.fps,
            "min_frames": self.video.min_frames,
            "max_frames": self.video.max_frames,
            "do_sample_frames": self.video.fps is not None,
        }


def _area(config: Mapping[str, Any], default: tuple[int, int], where: str) -> tuple[int, int]:
    """The bounds, spelt in any of the ways files have: min_pixels beside or inside size, or
    size.shortest_edge, which is an area here."""
    size = config.get("size") or {}
    if not isinstance(size, Mapping):
        raise CheckpointError(
            f"{where or 'The image processor'} gives size as {size!r}; it must be an object with "
            "shortest_edge and longest_edge, the smallest and largest area in pixels."
        )
    found = []
    for names, fallback in zip(
        (("min_pixels", "shortest_edge"), ("max_pixels", "longest_edge")), default, strict=True
    ):
        values = (config.get(names[0]), size.get(names[1]), size.get(names[0]), fallback)
        found.append(int(next(value for value in values if value is not None)))
    return found[0], found[1]
