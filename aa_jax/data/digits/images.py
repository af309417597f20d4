"""Real handwritten digits (scikit-learn's 1,797 8x8 images), split by image, and strips of them.

The split is by *source image*: no pixel of a test digit is ever seen in training, also not
shifted. Source: E. Alpaydin and C. Kaynak, "Optical Recognition of Handwritten Digits", UCI 1998,
as distributed with scikit-learn (no download).
"""

import functools
import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int, UInt8
from PIL import Image

from aa_jax.errors import DataError

CELL = 8  # pixels per side of one digit, and so of one patch
MAX_DIGITS = 5
SPLITS = {"train": 1200, "validation": 200, "test": 397}
# The nine one-pixel shifts (down, right) of the augmentation; the first one is "as it is".
SHIFTS = ((0, 0),) + tuple((y, x) for y in (-1, 0, 1) for x in (-1, 0, 1) if (y, x) != (0, 0))


@dataclass(frozen=True, eq=False)
class Digits:
    """The digit images and their split.

    Attributes:
        pixels: grey values 0-255, ink is bright, background 0.
        labels: the digit each image shows.
        splits: split name -> ids (rows of ``pixels``), disjoint, ascending.
    """

    pixels: UInt8[np.ndarray, "images 8 8"]
    labels: Int[np.ndarray, " images"]
    splits: dict[str, np.ndarray]

    def split(self, name: str) -> Int[np.ndarray, " ids"]:
        """Ids of a split.

        Raises:
            DataError: there is no such split.
        """
        if name not in self.splits:
            raise DataError(f"the digits are split into {', '.join(self.splits)}; got {name!r}.")
        return self.splits[name]


@functools.lru_cache(maxsize=4)
def load_digits(seed: int = 0) -> Digits:
    """The 1,797 images, split 1,200 / 200 / 397, stratified by label.

    Args:
        seed: of the split. Change it only to study the split itself: models and feedback made
            under different seeds have seen each other's test images.
    """
    from sklearn.datasets import load_digits as load

    bunch = load()
    # 17 grey levels (0..16) spread over 0..255.
    pixels = np.rint(bunch.images * (255.0 / 16.0)).astype(np.uint8)
    labels = bunch.target.astype(np.int64)
    return Digits(pixels, labels, split_by_label(labels, SPLITS, seed))


def split_by_label(
    labels: Int[np.ndarray, " images"], sizes: dict[str, int], seed: int
) -> dict[str, np.ndarray]:
    """Disjoint ids per split; within each split the labels are as frequent as overall (+-1).

    Every image gets a rank in [0, 1) inside its own class (random order); sorting all images by
    that rank and cutting at the sizes takes the same share of every class.

    Raises:
        DataError: the sizes do not add up to the number of images.
    """
    if sum(sizes.values()) != len(labels):
        raise DataError(
            f"split sizes {sizes} add up to {sum(sizes.values())}, but there are {len(labels)} "
            "images. Every image must belong to exactly one split."
        )
    # RandomState: numpy guarantees its stream for ever, so a split never moves under a user.
    random = np.random.RandomState(seed)
    rank = np.empty(len(labels))
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        rank[random.permutation(members)] = (np.arange(len(members)) + 0.5) / len(members)
    order = np.argsort(rank, kind="stable")
    splits, start = {}, 0
    for name, size in sizes.items():
        splits[name] = np.sort(order[start : start + size])
        start += size
    return splits


def shift_image(image: UInt8[np.ndarray, "8 8"], shift: int) -> UInt8[np.ndarray, "8 8"]:
    """``image`` moved by ``SHIFTS[shift]`` pixels; the uncovered row or column is background."""
    down, right = SHIFTS[shift]
    padded = np.pad(image, 1)
    return padded[1 - down : 1 - down + CELL, 1 - right : 1 - right + CELL]


def check_max_digits(max_digits: int) -> None:
    """Raises DataError unless the canvas size is one this world offers (1 to 5 digits)."""
    if max_digits not in range(1, MAX_DIGITS + 1):
        raise DataError(f"max_digits is 1 to {MAX_DIGITS}, got {max_digits}.")


def render_strip(
    digits: Digits,
    sources: Sequence[int],
    max_digits: int,
    shifts: Sequence[int] | None = None,
) -> Image.Image:
    """Draws a strip of handwritten digits on a square canvas.

    The canvas is a grid of ``max_digits`` x ``max_digits`` cells of 8x8 pixels; digit *i* fills
    column *i* of the middle row (the upper one of the two if the number of rows is even). With
    patch size 8 each digit is exactly one patch; unused cells are black.

    Args:
        digits: from :func:`load_digits`.
        sources: image ids, left to right.
        max_digits: cells per side of the canvas.
        shifts: per digit an index into :data:`SHIFTS`; None draws them as they are.

    Returns:
        An RGB image of ``8 * max_digits`` pixels per side.

    Raises:
        DataError: no digits, or more than fit.
    """
    check_max_digits(max_digits)
    if not 1 <= len(sources) <= max_digits:
        raise DataError(
            f"a strip on this canvas holds 1 to {max_digits} digits, got {len(sources)}. "
            "Raise max_digits, and rebuild the processor and the model for the larger canvas."
        )
    canvas = np.zeros((CELL * max_digits, CELL * max_digits), np.uint8)
    top = CELL * ((max_digits - 1) // 2)
    for column, source in enumerate(sources):
        cell = digits.pixels[source]
        if shifts is not None:
            cell = shift_image(cell, shifts[column])
        canvas[top : top + CELL, CELL * column : CELL * (column + 1)] = cell
    return Image.fromarray(np.repeat(canvas[:, :, None], 3, axis=2))


def png_bytes(image: Image.Image) -> bytes:
    """The image as a PNG file in memory (lossless)."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()
