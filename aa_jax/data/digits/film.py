"""Films of handwritten digits: one digit after the other, each moving a little while it is shown.

The order is in time alone: where a digit stands says nothing. Two frames per digit at two frames
per second, so a digit is one temporal patch of Qwen2-VL; a short film ends in blank frames.
"""

import io
from collections.abc import Sequence

import numpy as np
from jaxtyping import UInt8

from aa_jax.data.digits.images import CELL, Digits
from aa_jax.errors import DataError

SIDE = 2 * CELL
RATE = 2  # frames per second
FRAMES_PER_DIGIT = 2
LEAST_FRAMES = 4  # what Qwen2-VL's sampling takes at least
_CORNERS = ((0, 0), (0, CELL), (CELL, 0), (CELL, CELL))
_MOVES = ((0, 0), (0, 1), (1, 0), (0, -1), (-1, 0))
PATHS = len(_CORNERS) * len(_MOVES)


def render(
    digits: Digits, sources: Sequence[int], paths: Sequence[int]
) -> UInt8[np.ndarray, "F 16 16 3"]:
    """Draws a film.

    Args:
        digits: from :func:`~aa_jax.data.digits.images.load_digits`.
        sources: image ids in the order they appear.
        paths: per digit the corner it stands in and the pixel it moves by, below :data:`PATHS`.

    Raises:
        DataError: no digits.
    """
    if not len(sources):
        raise DataError("a film shows at least one digit.")
    frames = []
    for source, path in zip(sources, paths, strict=True):
        (top, left), (down, right) = _CORNERS[path // len(_MOVES)], _MOVES[path % len(_MOVES)]
        for step in range(FRAMES_PER_DIGIT):
            y = min(max(top + step * down, 0), SIDE - CELL)
            x = min(max(left + step * right, 0), SIDE - CELL)
            frame = np.zeros((SIDE, SIDE), np.uint8)
            frame[y : y + CELL, x : x + CELL] = digits.pixels[source]
            frames.append(frame)
    frames += [np.zeros((SIDE, SIDE), np.uint8)] * max(0, LEAST_FRAMES - len(frames))
    return np.repeat(np.stack(frames)[..., None], 3, axis=-1)


def encode(frames: UInt8[np.ndarray, "F H W 3"]) -> bytes:
    """A lossless video file in memory (FFV1 in Matroska)."""
    import av

    stream = io.BytesIO()
    with av.open(stream, "w", format="matroska") as container:
        video = container.add_stream("ffv1", rate=RATE)
        video.height, video.width = frames.shape[1:3]
        video.pix_fmt = "bgr0"
        for frame in frames:
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
            container.mux(video.encode(picture))
        container.mux(video.encode())
    return stream.getvalue()
