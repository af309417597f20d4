"""Log-mel spectrograms as Whisper's feature extractor makes them, in numpy.

Radford et al., "Robust Speech Recognition via Large-Scale Weak Supervision" (2022), section 2.2.
The result equals the numpy path of transformers' `WhisperFeatureExtractor`; only the frames that
hear anything are transformed, so a short clip does not cost 30 seconds of FFTs.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from aa_jax.data.audio import audio_length, decode_audio
from aa_jax.data.example import InvalidRow
from aa_jax.data.images import read_json
from aa_jax.errors import CheckpointError

NAME = "WhisperFeatureExtractor"
_FLOOR = 1e-10
_HIGHEST = 8000.0  # Hz, whatever the sampling rate
# Settings that would change the features, with the only values handled.
_NEUTRAL: dict[str, Any] = {"dither": 0.0, "padding_side": "right", "do_normalize": False}


@dataclasses.dataclass(frozen=True)
class AudioProcessor:
    """Settings of one feature extractor; call it with mono samples.

    Attributes:
      feature_size: mel bands.
      sampling_rate: Hz.
      hop_length: samples between two frames.
      chunk_length: seconds every clip is padded to.
      n_fft: samples of one frame.
      padding_value: of the samples that fill the chunk.
    """

    feature_size: int = 80
    sampling_rate: int = 16000
    hop_length: int = 160
    chunk_length: int = 30
    n_fft: int = 400
    padding_value: float = 0.0

    @property
    def samples(self) -> int:
        """Samples of a chunk."""
        return self.chunk_length * self.sampling_rate

    @property
    def frames(self) -> int:
        """Frames of every output."""
        return self.samples // self.hop_length

    def frame_count(self, samples: int) -> int:
        """Frames of a clip of this many samples that are not padding."""
        return min(-(-min(samples, self.samples) // self.hop_length), self.frames)

    def width(self, frames: int) -> int:
        """Frames that decide a clip's features: its own and the two of padding that the tower's
        convolutions reach, as a multiple of the tower's stride."""
        return min(-(-(frames + 2) // 4) * 4, self.frames)

    def feature_count(self, samples: int, where: str = "") -> int:
        """Features, and so placeholder tokens, of a clip in Qwen2-Audio: one convolution and one
        pooling halve the frames, each rounding as its kernel does.

        Raises:
          InvalidRow: the clip is longer than a chunk, or too short for one feature.
        """
        self._check(samples, where)
        count = ((self.frame_count(samples) - 1) // 2 + 1 - 2) // 2 + 1
        if count < 1:
            raise InvalidRow(
                "audio too short",
                f"{where or 'A row'}: the audio clip is {samples} samples long at "
                f"{self.sampling_rate} Hz, too short for one feature. Remove the row.",
            )
        return count

    def _check(self, samples: int, where: str) -> None:
        if samples > self.samples:
            raise InvalidRow(
                "audio too long",
                f"{where or 'A row'}: the audio clip lasts {samples / self.sampling_rate:.1f} s, "
                f"the model hears {self.chunk_length} s. Cut it into clips that fit; nothing is "
                "dropped from its end unasked.",
            )

    def __call__(
        self, waveform: Float[np.ndarray, " samples"], *, truncate: bool = False, where: str = ""
    ) -> Float[np.ndarray, "mels frames"]:
        """Mono samples at `sampling_rate` -> log-mel features, padded to the chunk.

        Args:
          waveform: in about [-1, 1].
          truncate: cut a clip longer than the chunk, as transformers does by default.
          where: ``file:row`` for the error.

        Raises:
          InvalidRow: the clip is too long and may not be cut.
        """
        if not truncate:
            self._check(len(waveform), where)
        waveform = np.asarray(waveform[: self.samples], np.float32)
        half = self.n_fft // 2
        # The last frame that reaches into the clip; the reflection at the chunk's end is needed
        # only when the clip comes near it.
        heard = min((len(waveform) + half) // self.hop_length + 1, self.frames)
        if len(waveform) + half >= self.samples or self.padding_value:
            heard = self.frames
        length = self.samples if heard == self.frames else (heard - 1) * self.hop_length + half
        padded = np.full(length, self.padding_value, np.float32)
        padded[: len(waveform)] = waveform[:length]
        padded = np.pad(padded, (half, half if heard == self.frames else 0), mode="reflect")
        windows = np.lib.stride_tricks.sliding_window_view(padded.astype(np.float64), self.n_fft)
        spectrum = np.fft.rfft(windows[:: self.hop_length][:heard] * _hann(self.n_fft))
        # Kept in single precision between the transform and its power, as the reference is.
        power = np.abs(spectrum.astype(np.complex64), dtype=np.float64) ** 2
        mels = np.maximum(_FLOOR, power @ self._filters).T
        logs = np.full((self.feature_size, self.frames), np.float32(np.log10(_FLOOR)))
        logs[:, :heard] = np.log10(mels)
        logs = np.maximum(logs, logs.max() - 8.0)
        return (logs + 4.0) / 4.0

    def prepare(
        self, item: Any, *, features: bool, root: str | None = None, where: str = ""
    ) -> tuple[int, int, Float[np.ndarray, "mels frames"] | None]:
        """A clip of a dataset -> (features in the text, frames that are not padding, log-mels).

        Args:
          item: any reference to the clip, see `decode_audio`.
          features: False works out lengths alone, from the header.
          root: folder of relative paths.
          where: ``file:row`` for errors.

        Raises:
          MediaError: it cannot be read.
          InvalidRow: it is too long or too short.
        """
        if not features:
            length = audio_length(item, self.sampling_rate, root=root, where=where)
            return self.feature_count(length, where), self.frame_count(length), None
        samples = decode_audio(item, self.sampling_rate, root=root, where=where)
        count, frames = self.feature_count(len(samples), where), self.frame_count(len(samples))
        return count, frames, self(samples, where=where)

    @property
    def _filters(self) -> Float[np.ndarray, "bins mels"]:
        return mel_filters(1 + self.n_fft // 2, self.feature_size, self.sampling_rate)

    @classmethod
    def from_dict(cls, config: Mapping[str, Any], where: str = "") -> AudioProcessor:
        """Settings as in ``preprocessor_config.json``.

        Raises:
          CheckpointError: another class, or settings whose features are made differently.
        """
        kind = config.get("feature_extractor_type")
        if kind != NAME:
            raise CheckpointError(
                f"{where or 'The folder'} names the feature extractor {kind!r}; audio is prepared "
                f"as {NAME} does. Use a checkpoint of a supported family."
            )
        for name, value in _NEUTRAL.items():
            if config.get(name) not in (None, value):
                raise CheckpointError(
                    f"{where or 'The folder'} sets {name} to {config[name]!r}; only {value!r} is "
                    "handled."
                )
        fields = {field.name for field in dataclasses.fields(cls)}
        return cls(**{k: v for k, v in config.items() if k in fields and v is not None})

    def to_dict(self) -> dict[str, Any]:
        """Settings as ``preprocessor_config.json`` holds them."""
        return dataclasses.asdict(self) | {
            "feature_extractor_type": NAME,
            "n_samples": self.samples,
            "nb_max_frames": self.frames,
            "padding_side": "right",
            "return_attention_mask": True,
        }


@functools.cache
def _hann(length: int) -> Float[np.ndarray, " n"]:
    """A periodic Hann window."""
    return np.hanning(length + 1)[:-1]


@functools.cache
def mel_filters(bins: int, mels: int, sampling_rate: int) -> Float[np.ndarray, "bins mels"]:
    """Triangular filters, evenly spaced on Slaney's mel scale (linear below 1 kHz, logarithmic
    above) and of equal area (Slaney, Auditory Toolbox, 1998)."""
    per_log = 27.0 / np.log(6.4)
    top = 15.0 + np.log(_HIGHEST / 1000.0) * per_log
    scale = np.linspace(0.0, top, mels + 2)
    edges = np.where(scale < 15.0, scale * 200.0 / 3.0, 1000.0 * np.exp((scale - 15.0) / per_log))
    frequencies = np.linspace(0, sampling_rate // 2, bins)
    widths = np.diff(edges)
    slopes = edges[None, :] - frequencies[:, None]
    rising, falling = -slopes[:, :-2] / widths[:-1], slopes[:, 2:] / widths[1:]
    return np.maximum(0.0, np.minimum(rising, falling)) * (2.0 / (edges[2:] - edges[:-2]))


def load_audio_processor(folder: Path) -> AudioProcessor | None:
    """The feature extractor of a checkpoint folder; None when it has none."""
    for name in ("preprocessor_config.json", "processor_config.json"):
        path = folder / name
        if not path.is_file():
            continue
        config = read_json(path)
        config = config.get("feature_extractor", config)
        if isinstance(config, Mapping) and config.get("feature_extractor_type") == NAME:
            return AudioProcessor.from_dict(config, str(path))
    return None
