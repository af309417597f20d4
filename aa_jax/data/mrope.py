"""Rotary positions with three axes (M-RoPE; Wang et al., 2024, section 2.1), on the host.

A text token has one number three times. The features of an image or video share the time, row and
column of their place in the grid, counted from where the text before them ended; the text after
them goes on behind the larger of the grid's height and width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from aa_jax.errors import MediaError


@dataclasses.dataclass(frozen=True)
class Grid:
    """Patches of one image or video, and how far apart its frames are in time.

    Attributes:
      frames: temporal patches (1 for an image).
      rows: rows of patches.
      columns: columns of patches.
      step: positions between two temporal patches: 1, but in Qwen2.5-VL's videos
        tokens_per_second x seconds per temporal patch, which need not be whole.
    """

    frames: int
    rows: int
    columns: int
    step: float = 1.0

    @property
    def patches(self) -> int:
        """Patches of all frames."""
        return self.frames * self.rows * self.columns

    def features(self, merge: int) -> int:
        """Features, and so placeholder tokens: one per merge x merge patches."""
        return self.patches // merge**2


def mrope_positions(
    feature_index: Int[np.ndarray, " P"], grids: Sequence[Grid], merge: int, where: str = ""
) -> tuple[Int[np.ndarray, "P 3"], int]:
    """Positions (time, row, column) of every token, and that of the token after them.

    Args:
      feature_index: which feature stands at a token, -1 is text; items follow one another in the
        order of ``grids``, each with its features side by side.
      grids: of the items.
      merge: edge of the square of patches behind one feature.
      where: ``file:row`` for the error.

    Raises:
      MediaError: tokens and grids disagree.
    """
    positions = np.zeros((len(feature_index), 3), np.int32)
    media = np.flatnonzero(feature_index >= 0)
    counts = [grid.features(merge) for grid in grids]
    if len(media) != sum(counts):
        raise MediaError(
            f"{where or 'An example'}: {len(media)} placeholder tokens stand for media of "
            f"{sum(counts)} features ({counts}); there must be one token per feature."
        )
    at = current = first = 0
    for grid, count in zip(grids, counts, strict=True):
        span = media[first : first + count]
        first += count
        start = int(span[0]) if count else at
        if count and int(span[-1]) - start + 1 != count:
            raise MediaError(
                f"{where or 'An example'}: text stands between the {count} placeholder tokens of "
                "one image or video; they must be side by side."
            )
        positions[at:start] = current + np.arange(start - at, dtype=np.int32)[:, None]
        current += start - at
        # As the model's own code: fractions of a step are cut off in float32.
        times = (np.arange(grid.frames) * np.float32(grid.step)).astype(np.int32)
        rows, columns = np.arange(grid.rows // merge), np.arange(grid.columns // merge)
        places = np.meshgrid(times, rows, columns, indexing="ij")
        positions[start : start + count] = current + np.stack(places, -1).reshape(-1, 3)
        current += max(grid.rows, grid.columns) // merge
        at = start + count
    rest = len(feature_index) - at
    positions[at:] = current + np.arange(rest, dtype=np.int32)[:, None]
    return positions, current + rest
