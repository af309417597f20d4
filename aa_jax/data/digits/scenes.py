"""What carries the digits to the model: text, a strip of handwriting, dialled tones, a film.

Every scene has a ``kind`` (as in `aa_jax.data.example`, or "text"), plain fields (`to_dict`), its
media, the dataset column they stand in, and how it words a question. The task knows nothing of it.
"""

import zlib
from dataclasses import asdict, dataclass
from typing import ClassVar

import numpy as np
from PIL import Image

from aa_jax.data.digits import dtmf, film
from aa_jax.data.digits.images import (
    SHIFTS,
    SPLITS,
    load_digits,
    png_bytes,
    render_strip,
)
from aa_jax.data.example import Media
from aa_jax.errors import DataError

KINDS = ("image", "text", "audio", "video")


@dataclass(frozen=True)
class Scene:
    """A strip of handwritten digits: which images, moved how, on which canvas."""

    kind: ClassVar[str] = "image"
    sources: tuple[int, ...]
    shifts: tuple[int, ...]
    max_digits: int

    def render(self) -> Image.Image:
        """The image strip, see :func:`~aa_jax.data.digits.images.render_strip`."""
        return render_strip(load_digits(), self.sources, self.max_digits, self.shifts)

    def media(self) -> tuple:
        """What `aa_jax.data.example.Example` holds: decoded images, encoded files."""
        return (self.render(),)

    def columns(self) -> dict:
        """The media columns of a dataset row."""
        return {"image": {"bytes": png_bytes(self.render()), "path": None}}

    def ask(self, question: str) -> str:
        """The question as it is put to the model."""
        return question

    def to_dict(self) -> dict:
        """Plain JSON types."""
        return {
            "sources": list(self.sources),
            "shifts": list(self.shifts),
            "max_digits": self.max_digits,
        }

    @classmethod
    def from_dict(cls, values: dict) -> "Scene":
        """A scene from :meth:`to_dict`'s output, of whatever kind."""
        fields = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in values.items()
            if name != "kind"
        }
        return _SCENES[values.get("kind", "image")](**fields)


@dataclass(frozen=True)
class Written:
    """Digits in the text of the question."""

    kind: ClassVar[str] = "text"
    digits: tuple[int, ...]

    def media(self) -> tuple:
        """Nothing."""
        return ()

    def columns(self) -> dict:
        """Nothing."""
        return {}

    def ask(self, question: str) -> str:
        """The digits, then the question."""
        return f"digits {' '.join(map(str, self.digits))} . {question}"

    def to_dict(self) -> dict:
        """Plain JSON types."""
        return {"kind": self.kind, "digits": list(self.digits)}


@dataclass(frozen=True)
class Dialled:
    """Digits as telephone keys: :mod:`~aa_jax.data.digits.dtmf`, on a line of its own noise."""

    kind: ClassVar[str] = "audio"
    digits: tuple[int, ...]
    line: int  # seed of levels, phases and noise

    def render(self) -> np.ndarray:
        """Samples [S] float32 at 16 kHz."""
        return dtmf.dial(self.digits, np.random.default_rng((41, self.line)))

    def media(self) -> tuple:
        """One WAV file."""
        return (Media("audio", data=dtmf.wav_bytes(self.render())),)

    def columns(self) -> dict:
        """The audio column of the dataset."""
        return {"audio_path": {"bytes": dtmf.wav_bytes(self.render()), "path": None}}

    def ask(self, question: str) -> str:
        """The question as it is."""
        return question

    def to_dict(self) -> dict:
        """Plain JSON types."""
        return asdict(self) | {"kind": self.kind, "digits": list(self.digits)}


@dataclass(frozen=True)
class Film:
    """Handwritten digits one after the other, each moving: :mod:`~aa_jax.data.digits.film`."""

    kind: ClassVar[str] = "video"
    sources: tuple[int, ...]
    paths: tuple[int, ...]  # where each stands and moves to

    def render(self) -> np.ndarray:
        """Frames [F, 16, 16, 3] uint8."""
        return film.render(load_digits(), self.sources, self.paths)

    def media(self) -> tuple:
        """One video file."""
        return (Media("video", data=film.encode(self.render())),)

    def columns(self) -> dict:
        """The video column of the dataset."""
        return {"video_path": {"bytes": film.encode(self.render()), "path": None}}

    def ask(self, question: str) -> str:
        """The question as it is."""
        return question

    def to_dict(self) -> dict:
        """Plain JSON types."""
        return {"kind": self.kind, "sources": list(self.sources), "paths": list(self.paths)}


_SCENES = {scene.kind: scene for scene in (Scene, Written, Dialled, Film)}


def sample_scene(
    split: str,
    rng: np.random.Generator,
    max_digits: int = 3,
    kind: str = "image",
    min_digits: int = 1,
) -> tuple[tuple[int, ...], Scene | Written | Dialled | Film]:
    """Random digits of a split: their labels and the scene that shows them.

    Handwriting is split by source image, and strips are shifted by a pixel in train only. Where no
    image is shown, what is held out are sequences of digits: `sequence_split`.

    Raises:
        DataError: no such kind, or impossible numbers of digits.
    """
    if kind not in _SCENES:
        raise DataError(f"the digits are shown as {', '.join(KINDS)}; got {kind!r}.")
    if not 1 <= min_digits <= max_digits:
        raise DataError(
            f"min_digits must be from 1 to max_digits ({max_digits}); got {min_digits}."
        )
    if kind in ("text", "audio"):
        labels = _sample_sequence(split, rng, max_digits, min_digits)
        if kind == "text":
            return labels, Written(labels)
        return labels, Dialled(labels, int(rng.integers(2**31)))
    digits = load_digits()
    ids = digits.split(split)
    count = min_digits + int(rng.random() * (max_digits - min_digits + 1))
    sources = tuple(int(ids[int(rng.random() * len(ids))]) for _ in range(count))
    labels = tuple(int(digits.labels[source]) for source in sources)
    if kind == "video":
        return labels, Film(sources, tuple(int(rng.integers(film.PATHS)) for _ in sources))
    shifts = (0,) * count
    if split == "train":
        shifts = tuple(int(rng.random() * len(SHIFTS)) for _ in range(count))
    return labels, Scene(sources, shifts, max_digits)


def sequence_split(labels: tuple[int, ...]) -> str:
    """The split a sequence of digits belongs to, where no image is there to be held out.

    One in ten sequences of two and more digits is for validation, one in five for the test; single
    digits are all for training.
    """
    if len(labels) < 2:
        return "train"
    bucket = zlib.crc32(bytes(labels)) % 10
    return "validation" if bucket == 0 else "test" if bucket < 3 else "train"


def _sample_sequence(
    split: str, rng: np.random.Generator, max_digits: int, min_digits: int
) -> tuple[int, ...]:
    if split not in SPLITS:
        raise DataError(f"the digits are split into {', '.join(SPLITS)}; got {split!r}.")
    if max_digits < 2 and split != "train":
        raise DataError("single digits are all training data; use max_digits of 2 or more.")
    while True:
        count = min_digits + int(rng.random() * (max_digits - min_digits + 1))
        labels = tuple(int(d) for d in rng.integers(10, size=count))
        if sequence_split(labels) == split:
            return labels
