"""Decoding audio: bytes, a path or samples of a datasets column -> mono float32 samples.

The rules are those of `transformers.audio_utils.load_audio` (and so of librosa): channels are
averaged, then the clip is resampled with soxr at high quality to exactly
``ceil(samples * wanted / given)`` samples.
"""

from __future__ import annotations

import io
import math
from typing import Any

import numpy as np
from jaxtyping import Float

from aa_jax.data.example import Media
from aa_jax.data.media import read_bytes, reference
from aa_jax.errors import MediaError

_FIX = "Remove or repair the row."
_MOST_CHANNELS = 8
# Float samples lie in [-1, 1]; anything far beyond is integers that were cast without scaling.
_LOUDEST = 16.0
_STREAMED = (0, 0xFFFFFFFF)  # sizes a writer leaves when it does not know the length yet


def decode_audio(
    value: Any, sampling_rate: int, *, root: str | None = None, where: str = ""
) -> Float[np.ndarray, " samples"]:
    """Any audio value (see `aa_jax.data.media.reference`) -> mono samples in about [-1, 1].

    Args:
      value: encoded bytes (WAV, FLAC, OGG, MP3, ...), a path, or ``{"array", "sampling_rate"}``.
      sampling_rate: wanted, Hz.
      root: folder that relative paths start at.
      where: ``file:row`` for the error.

    Raises:
      MediaError: missing, truncated, corrupt, empty or not audio, naming ``where``.
    """
    media = _audio(value, where)
    where = where or "A row"
    if media.array is not None:
        samples, rate = _from_array(media, where), media.sampling_rate
    else:
        samples, rate = _from_file(media, root, where)
    if not samples.size:
        raise MediaError(f"{where}: the audio clip holds no samples. {_FIX}")
    if not np.isfinite(samples).all():
        raise MediaError(f"{where}: the audio clip holds NaN or infinite samples. {_FIX}")
    return resample(samples, rate, sampling_rate)


def audio_length(
    value: Any, sampling_rate: int, *, root: str | None = None, where: str = ""
) -> int:
    """Samples `decode_audio` returns, from the header alone."""
    media = _audio(value, where)
    if media.array is not None:
        count, rate = len(_from_array(media, where or "A row")), media.sampling_rate
    else:
        import soundfile

        data = read_bytes(media, root, where)
        try:
            info = soundfile.info(io.BytesIO(data))
        except (soundfile.SoundFileError, RuntimeError) as error:
            raise _unreadable(media, data, where or "A row", error) from error
        count, rate = info.frames, info.samplerate
    return math.ceil(count * sampling_rate / rate)


def resample(
    samples: Float[np.ndarray, " samples"], given: int, wanted: int
) -> Float[np.ndarray, " resampled"]:
    """Band-limited resampling between two rates in Hz, to ceil(samples * wanted / given)."""
    if given == wanted:
        return np.ascontiguousarray(samples, np.float32)
    import soxr

    length = math.ceil(len(samples) * wanted / given)
    out = soxr.resample(samples, given, wanted, quality="HQ")
    return np.pad(out, (0, max(0, length - len(out))))[:length].astype(np.float32)


def _audio(value: Any, where: str) -> Media:
    media = reference(value, "audio", where)
    if not isinstance(media, Media) or media.kind != "audio":
        kind = media.kind if isinstance(media, Media) else type(media).__name__
        raise MediaError(f"{where or 'A row'}: expected audio, found {kind}.")
    return media


def _from_array(media: Media, where: str) -> Float[np.ndarray, " samples"]:
    """Samples that a datasets column has decoded: [S], [C, S] or [S, C]."""
    samples = np.asarray(media.array)
    rate = media.sampling_rate
    if not isinstance(rate, int) or rate < 1:
        raise MediaError(
            f"{where}: the audio samples come without a sampling rate (it is {rate!r}). Give the "
            'column as {"array", "sampling_rate"} with the rate in Hz, or as an encoded file.'
        )
    if samples.dtype == np.int16:
        samples = samples.astype(np.float32) / 32768.0
    elif samples.dtype == np.int32:
        samples = (samples / 2147483648.0).astype(np.float32)
    elif not np.issubdtype(samples.dtype, np.floating):
        raise MediaError(
            f"{where}: the audio samples are of type {samples.dtype}; float samples in [-1, 1], "
            "int16 and int32 are read. Convert the column."
        )
    if samples.ndim == 2 and min(samples.shape) <= _MOST_CHANNELS:
        samples = samples.mean(axis=int(np.argmin(samples.shape)))
    if samples.ndim != 1:
        raise MediaError(
            f"{where}: the audio samples have shape {samples.shape}; one clip is [samples], or "
            f"[channels, samples] with up to {_MOST_CHANNELS} channels."
        )
    samples = samples.astype(np.float32)
    loudest = np.max(np.abs(samples), initial=0.0, where=np.isfinite(samples))
    if loudest > _LOUDEST:
        raise MediaError(
            f"{where}: the audio samples reach {loudest:g}, but float samples lie in [-1, 1]. They "
            "look like integers; divide them by the largest of their type."
        )
    return samples


def _from_file(
    media: Media, root: str | None, where: str
) -> tuple[Float[np.ndarray, " samples"], int]:
    import soundfile

    data = read_bytes(media, root, where)
    _check_wav(data, media, where)
    try:
        with soundfile.SoundFile(io.BytesIO(data)) as file:
            rate, announced = file.samplerate, file.frames
            samples = file.read(dtype="float32", always_2d=True)
    except (soundfile.SoundFileError, RuntimeError) as error:
        raise _unreadable(media, data, where, error) from error
    if 0 < announced < 2**62 and len(samples) < announced:
        raise MediaError(
            f"{where}: the audio clip{_name(media)} is truncated: {len(samples)} of {announced} "
            f"samples are there. {_FIX}"
        )
    return samples.T.mean(axis=0) if samples.shape[1] > 1 else samples[:, 0], rate


def _check_wav(data: bytes, media: Media, where: str) -> None:
    """The decoder takes a WAV file that ends early for a shorter one; its header knows better."""
    if data[:4] != b"RIFF" or data[8:12] != b"WAVE":
        return
    at = 12
    while at + 8 <= len(data):
        name, size = data[at : at + 4], int.from_bytes(data[at + 4 : at + 8], "little")
        if name == b"data":
            if size not in _STREAMED and at + 8 + size > len(data):
                raise MediaError(
                    f"{where}: the audio clip{_name(media)} is truncated: its header announces "
                    f"{size} bytes of samples, {len(data) - at - 8} are there. {_FIX}"
                )
            return
        at += 8 + size + size % 2
    raise MediaError(f"{where}: the audio clip{_name(media)} is a WAV file without samples. {_FIX}")


def _name(media: Media) -> str:
    return f" ({media.path})" if media.path else ""


def _unreadable(media: Media, data: bytes, where: str, error: Exception) -> MediaError:
    return MediaError(
        f"{where}: cannot decode the audio clip{_name(media)}, {len(data)} bytes: {error}. WAV, "
        f"FLAC, OGG and MP3 are read; convert other formats. {_FIX}"
    )
