"""What a processor makes of text and media, before it becomes an example."""

from __future__ import annotations

import dataclasses

import numpy as np

from aa_jax.data.mrope import Grid


@dataclasses.dataclass(frozen=True)
class Tokens:
    """Token ids and the characters [start, end) each stands for."""

    ids: list[int]
    starts: list[int]
    ends: list[int]


@dataclasses.dataclass(frozen=True)
class Prepared:
    """One image, video or audio clip, ready for the tower.

    Attributes:
      count: features, and so placeholder tokens.
      size: (height, width) of the pixels, where every item of a batch needs the same.
      grid: its patches, where items of any size are packed.
      pixels: [3, H, W], or [N, K] patches, or log-mel features [mels, frames]; None when only
        lengths were asked for.
      frames: of a clip, those that are not padding.
      ids: [N] the image itself, where images are tokens of the text.
      tiles: pieces the tower reads one by one; then pixels are [tiles, 3, H, W].
      features: [count] which of the tiles' features each token stands for; None: one after the
        other.
      made: features the tiles give; None: as many as there are tokens.
    """

    count: int
    size: tuple[int, int] | None = None
    grid: Grid | None = None
    pixels: np.ndarray | None = None
    frames: int | None = None
    ids: np.ndarray | None = None
    tiles: int | None = None
    features: np.ndarray | None = None
    made: int | None = None
