"""Images of any size as LLaVA-NeXT reads them: the whole image, and tiles of a larger copy.

The pixels are bit for bit those of transformers' PIL image processor. The order of an image's
features depends on its size alone and is worked out here, so that the model only gathers.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from PIL import Image

from aa_jax.data.images import ImageProcessor, read_json
from aa_jax.data.prepared import Prepared
from aa_jax.errors import CheckpointError

NAME = "LlavaNextImageProcessor"
_PINPOINTS = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))

Size = tuple[int, int]  # (height, width), pixels or patches


@dataclasses.dataclass(frozen=True)
class AnyresProcessor:
    """Settings of a LLaVA-NeXT image processor.

    Attributes:
      tile: how a tile is made; its output has one fixed size.
      pinpoints: (height, width) of the canvases a larger copy may fill, in pixels.
    """

    tile: ImageProcessor
    pinpoints: tuple[Size, ...] = _PINPOINTS

    fixed_size = None  # the number of features depends on the image

    def canvas(self, height: int, width: int) -> Size:
        """The pinpoint that keeps most of an image of this size, and of those wastes least."""

        def fit(point: Size) -> tuple[int, int]:
            scale = min(point[1] / width, point[0] / height)
            kept = min(int(width * scale) * int(height * scale), width * height)
            return kept, kept - point[0] * point[1]

        return max(self.pinpoints, key=fit)

    def grid(self, height: int, width: int) -> Size:
        """Rows and columns of tiles of an image of this size."""
        edge_h, edge_w = self.tile.fixed_size
        canvas = self.canvas(height, width)
        return canvas[0] // edge_h, canvas[1] // edge_w

    def tiles(self, height: int, width: int) -> int:
        """Tiles of an image of this size, the whole image included."""
        rows, columns = self.grid(height, width)
        return 1 + rows * columns

    def features(self, height: int, width: int, side: int) -> Int[np.ndarray, " F"]:
        """Which of the tiles' features the tokens of an image stand for, in reading order.

        A tile has side² patches and then the end of a row: number ``t (side² + 1) + p`` is patch p
        of tile t, tile 0 the whole image.

        Args:
          height: of the image, pixels.
          width: of the image, pixels.
          side: patches along an edge of a tile.
        """
        rows, columns = self.grid(height, width)
        each = side * side + 1
        y, x = np.mgrid[: rows * side, : columns * side]
        tile = 1 + (y // side) * columns + x // side
        table = tile * each + (y % side) * side + x % side
        top, left = _padding((height, width), table.shape)
        table = table[top : table.shape[0] - top, left : table.shape[1] - left]
        ends = np.full((len(table), 1), each - 1)
        joined = np.concatenate([table, ends], axis=1)
        return np.concatenate([np.arange(each - 1), joined.ravel()]).astype(np.int32)

    def prepare(self, image: Image.Image | None, size: Size, patch: int) -> Prepared:
        """What the tokens and the tower need of an image.

        Args:
          image: RGB; None leaves its pixels out.
          size: of the image.
          patch: edge of a patch, pixels.
        """
        side, tiles = self.tile.fixed_size[0] // patch, self.tiles(*size)
        order = self.features(*size, side)
        return Prepared(
            len(order),
            size=self.tile.fixed_size,
            pixels=None if image is None else self(image),
            tiles=tiles,
            features=order,
            made=tiles * (side * side + 1),
        )

    def __call__(self, image: Image.Image) -> Float[np.ndarray, "tiles 3 H W"]:
        """RGB image -> the whole image and its tiles, normalised."""
        canvas = self.canvas(image.height, image.width)
        height, width = _within(image.height, image.width, canvas)
        large = image.resize((width, height), resample=self.tile.resample)
        pasted = Image.new("RGB", (canvas[1], canvas[0]))
        pasted.paste(large, ((canvas[1] - width) // 2, (canvas[0] - height) // 2))
        edge_h, edge_w = self.tile.fixed_size
        whole = self.tile.size
        short = whole.get("shortest_edge")
        size = (short, short) if short else (whole["width"], whole["height"])
        pieces = [image.resize(size, resample=self.tile.resample)]
        for top in range(0, canvas[0], edge_h):
            for left in range(0, canvas[1], edge_w):
                pieces.append(pasted.crop((left, top, left + edge_w, top + edge_h)))
        return np.stack([self.tile(piece) for piece in pieces])

    @classmethod
    def from_dict(cls, config: Mapping[str, Any], where: str = "") -> AnyresProcessor:
        """Settings as in ``preprocessor_config.json``.

        Raises:
          CheckpointError: tiles without a fixed size, or pinpoints that are no whole tiles.
        """
        tile = ImageProcessor.from_dict(config, where)
        points = config.get("image_grid_pinpoints") or _PINPOINTS
        if tile.fixed_size is None or any(
            side % edge or not side
            for point in points
            for side, edge in zip(point, tile.fixed_size, strict=True)
        ):
            raise CheckpointError(
                f"{where or 'The image processor'} has tiles of {tile.fixed_size} and "
                f"image_grid_pinpoints {[list(point) for point in points]}; each must be whole "
                "tiles high and wide, and crop_size must say how large a tile is."
            )
        return cls(tile, tuple((int(height), int(width)) for height, width in points))

    def to_dict(self) -> dict[str, Any]:
        """Settings as ``preprocessor_config.json`` holds them."""
        return self.tile.to_dict() | {
            "image_grid_pinpoints": [list(point) for point in self.pinpoints],
            "do_pad": True,
        }


def load_anyres(folder: Path, config: Mapping[str, Any], where: str) -> AnyresProcessor:
    """The processor of a folder, whose config.json must name the same pinpoints.

    Raises:
      CheckpointError: it does not, or see `AnyresProcessor.from_dict`.
    """
    made = AnyresProcessor.from_dict(config, where)
    path = folder / "config.json"
    points = read_json(path).get("image_grid_pinpoints") if path.is_file() else None
    if points and tuple(map(tuple, points)) != made.pinpoints:
        raise CheckpointError(
            f"{path} has image_grid_pinpoints {points}, but {where} has "
            f"{[list(point) for point in made.pinpoints]}: images would be cut in another way than "
            "the model was trained on. Make the two the same."
        )
    return made


def _within(height: int, width: int, canvas: Size) -> Size:
    """The largest size of these proportions inside a canvas."""
    across, down = canvas[1] / width, canvas[0] / height
    if across < down:
        return min(math.ceil(height * across), canvas[0]), canvas[1]
    return canvas[0], min(math.ceil(width * down), canvas[1])


def _padding(image: Size, patches: Sequence[int]) -> Size:
    """Rows of patches above (and below), columns left (and right), that hold no image."""
    (height, width), (rows, columns) = image, patches
    if width / height > columns / rows:
        return (rows - int(round(height * (columns / width), 7))) // 2, 0
    return 0, (columns - int(round(width * (rows / height), 7))) // 2
