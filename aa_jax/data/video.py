"""Reading videos: a file, bytes, or frames that are already decoded."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from aa_jax.data.example import Media
from aa_jax.data.media import read_bytes, reference, to_rgb
from aa_jax.errors import MediaError

_FIX = "Remove or repair the row, or convert the file (for example to H.264 in MP4)."


@dataclasses.dataclass(frozen=True)
class VideoInfo:
    """What is known without decoding pixels.

    Attributes:
      frames: number of frames.
      rate: frames per second.
      height: of a frame, pixels.
      width: of a frame, pixels.
    """

    frames: int
    rate: float
    height: int
    width: int


def video_info(value: Any, *, root: str | None = None, where: str = "") -> VideoInfo:
    """Length, rate and size of a video.

    Args:
      value: a file's bytes, its path, or a Media whose ``array`` is [frames, H, W, 3] uint8 with
        ``sampling_rate`` frames per second.
      root: folder that relative paths start at.
      where: ``file:row`` for errors.

    Raises:
      MediaError: the file is missing, damaged or holds no video.
    """
    media = _video(value, where)
    if media.array is not None:
        frames = _array(media, where)
        return VideoInfo(len(frames), float(media.sampling_rate or 1), *frames.shape[1:3])
    with _open(media, root, where) as container:
        stream = container.streams.video[0]
        # Some containers do not say; then the packets are counted, not decoded.
        count = stream.frames or sum(1 for packet in container.demux(stream) if packet.size)
        rate = float(stream.average_rate or stream.guessed_rate or 1)
        if not count:
            raise MediaError(f"{where or 'A row'}: the video holds no frames. {_FIX}")
        return VideoInfo(count, rate, stream.height, stream.width)


def read_frames(
    value: Any, indices: Sequence[int], *, root: str | None = None, where: str = ""
) -> list[Image.Image]:
    """The frames at ``indices`` (ascending) as RGB images.

    Raises:
      MediaError: see `video_info`; or the file ends before the last frame asked for.
    """
    media = _video(value, where)
    if media.array is not None:
        frames = _array(media, where)
        return [Image.fromarray(np.ascontiguousarray(frames[i])) for i in indices]
    wanted, found = {int(i) for i in indices}, {}
    import av

    with _open(media, root, where) as container:
        try:
            for number, frame in enumerate(container.decode(video=0)):
                if number in wanted:
                    found[number] = to_rgb(frame.to_image())
                if len(found) == len(wanted):
                    break
        except av.FFmpegError as error:
            raise MediaError(
                f"{where or 'A row'}: the video cannot be decoded: {error}. {_FIX}"
            ) from error
    if missing := sorted(wanted - set(found)):
        raise MediaError(
            f"{where or 'A row'}: the video ends before frame {missing[0]}, though it announces "
            f"more; it is truncated. {_FIX}"
        )
    return [found[int(i)] for i in indices]


def _video(value: Any, where: str) -> Media:
    media = reference(value, "video", where)
    if not isinstance(media, Media) or media.kind != "video":
        kind = media.kind if isinstance(media, Media) else f"an {type(media).__name__}"
        raise MediaError(f"{where or 'A row'}: expected a video, found {kind}.")
    return media


def _array(media: Media, where: str) -> np.ndarray:
    frames = np.asarray(media.array)
    if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8 or not frames.size:
        raise MediaError(
            f"{where or 'A row'}: decoded video frames must be [frames, height, width, 3] uint8, "
            f"got {list(frames.shape)} {frames.dtype}."
        )
    return frames


def _open(media: Media, root: str | None, where: str) -> Any:
    import av

    data = read_bytes(media, root, where)
    try:
        container = av.open(io.BytesIO(data))
    except (av.FFmpegError, ValueError) as error:
        raise MediaError(
            f"{where or 'A row'}: cannot read the video, {len(data)} bytes: {error}. {_FIX}"
        ) from error
    if not container.streams.video:
        container.close()
        raise MediaError(f"{where or 'A row'}: the file holds no video stream. {_FIX}")
    return container
