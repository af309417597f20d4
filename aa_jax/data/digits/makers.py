"""Media made of digits, and independent readers that say which digits a medium shows.

A maker draws, dials or films a sequence. The reader knows nothing of how it was made: pictures are
read by a support vector machine trained on the training images alone, tones by Goertzel filters,
films by the same classifier frame by frame.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from aa_jax.data.digits import dtmf, film
from aa_jax.data.digits.images import CELL, load_digits, png_bytes, render_strip
from aa_jax.errors import DataError

_INK = 255 * 0.06  # mean grey of a cell that holds a digit; the faintest training image has more


@dataclass(frozen=True)
class Maker:
    """One output medium.

    Attributes:
        kind: image, audio or video.
        verb: the word of the instruction.
        make: ``(digits, split, rng, max_digits) -> medium`` (PIL image, samples, frames).
        spoil: ``(medium, rng) -> medium`` that is hard to read.
        read: medium -> digits as an independent reader sees them.
        encode: medium -> bytes of a file.
    """

    kind: str
    verb: str
    make: Callable[[Sequence[int], str, np.random.Generator, int], Any]
    spoil: Callable[[Any, np.random.Generator], Any]
    read: Callable[[Any], tuple[int, ...]]
    encode: Callable[[Any], bytes]


@functools.lru_cache(maxsize=1)
def _classifier():
    from sklearn.svm import SVC

    digits = load_digits()
    ids = digits.split("train")
    return SVC(gamma=0.001, C=10).fit(_vectors(digits.pixels[ids]), digits.labels[ids])


def _vectors(cells: np.ndarray) -> np.ndarray:
    """Grey cells [N, 8, 8] 0-255 -> [N, 64] 0-16, the scale of the data set."""
    return np.asarray(cells, np.float64).reshape(len(cells), -1) * (16.0 / 255.0)


def read_cells(cells: np.ndarray) -> tuple[int, ...]:
    """Which digit each grey cell [N, 8, 8] shows."""
    return tuple(int(d) for d in _classifier().predict(_vectors(cells)))


def read_picture(picture: Image.Image | np.ndarray) -> tuple[int, ...]:
    """Digits in the middle row of a square picture, left to right, up to the first blank cell.

    Raises:
        DataError: the edges are no multiple of a cell.
    """
    grey = np.asarray(picture, np.float64)
    grey = grey.mean(axis=-1) if grey.ndim == 3 else grey
    side = len(grey)
    if grey.shape != (side, side) or side % CELL:
        raise DataError(f"a picture of digits is a square of {CELL}-pixel cells, got {grey.shape}.")
    count = side // CELL
    top = CELL * ((count - 1) // 2)
    row = grey[top : top + CELL].reshape(CELL, count, CELL).swapaxes(0, 1)
    inked = row.mean(axis=(1, 2)) > _INK
    shown = count if inked.all() else int(np.argmin(inked))
    return read_cells(row[:shown]) if shown else ()


def read_film(frames: np.ndarray) -> tuple[int, ...]:
    """Digits of a film [F, 16, 16, 3], one per two frames; blank frames end it."""
    grey = np.asarray(frames, np.float64).mean(axis=-1)
    cells = []
    for frame in grey[:: film.FRAMES_PER_DIGIT]:
        if frame.mean() * 4 <= _INK:
            break
        cells.append(frame[_window(frame)])
    return read_cells(np.stack(cells)) if cells else ()


def _window(frame: np.ndarray) -> tuple[slice, slice]:
    """The quarter with the most ink: a digit enters in a corner."""
    corners = [(y, x) for y in (0, CELL) for x in (0, CELL)]
    y, x = max(corners, key=lambda at: frame[at[0] : at[0] + CELL, at[1] : at[1] + CELL].sum())
    return slice(y, y + CELL), slice(x, x + CELL)


def _sources(digits: Sequence[int], split: str, rng: np.random.Generator) -> list[int]:
    world = load_digits()
    ids = world.split(split)
    of = {d: ids[world.labels[ids] == d] for d in set(digits)}
    return [int(of[d][int(rng.random() * len(of[d]))]) for d in digits]


def _draw(digits, split, rng, max_digits) -> Image.Image:
    return render_strip(load_digits(), _sources(digits, split, rng), max_digits)


def _smear(picture: Image.Image, rng: np.random.Generator) -> Image.Image:
    pixels = np.asarray(picture, np.float64)
    noise = rng.uniform(0, 255, pixels.shape[:2])[..., None]
    return Image.fromarray(np.rint(0.4 * pixels + 0.6 * noise).astype(np.uint8))


def _film(digits, split, rng, max_digits) -> np.ndarray:
    del max_digits  # a film has no canvas that could be full
    paths = [int(rng.integers(film.PATHS)) for _ in digits]
    return film.render(load_digits(), _sources(digits, split, rng), paths)


def _dial(digits, split, rng, max_digits) -> np.ndarray:
    del split, max_digits  # no image to hold out, no canvas
    return dtmf.dial(digits, rng)


MAKERS = {
    "image": Maker("image", "draw", _draw, _smear, read_picture, png_bytes),
    "audio": Maker(
        "audio",
        "dial",
        _dial,
        lambda samples, rng: (samples + rng.normal(size=samples.shape)).clip(-1, 1).astype("f4"),
        dtmf.listen,
        dtmf.wav_bytes,
    ),
    "video": Maker(
        "video",
        "animate",
        _film,
        lambda frames, rng: rng.integers(0, 256, frames.shape).astype(np.uint8),
        read_film,
        film.encode,
    ),
}
