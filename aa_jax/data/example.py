"""What a dataset row becomes: a conversation, its responses, and the media they refer to."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

from aa_jax.errors import DataError

MEDIA_TYPES = ("image", "audio", "video")


@dataclasses.dataclass(frozen=True)
class Part:
    """A piece of a message: text, or a reference to ``Example.media[index]``."""

    type: str
    text: str | None = None
    index: int | None = None

    def __post_init__(self):
        if self.type == "text" and self.text is None:
            raise DataError('A text part needs a text; write Part("text", text="...").')
        if self.type != "text" and (self.type not in MEDIA_TYPES or self.index is None):
            raise DataError(
                f"Part(type={self.type!r}, index={self.index}) is not valid: the type is one of "
                f"text, {', '.join(MEDIA_TYPES)}, and a media part needs its index in the media."
            )


@dataclasses.dataclass(frozen=True)
class Message:
    """One turn of a conversation; role is ``system``, ``user`` or ``assistant``."""

    role: str
    content: tuple[Part, ...]

    @property
    def text(self) -> str:
        """The text parts joined; media parts are left out."""
        return "".join(part.text for part in self.content if part.type == "text")

    @property
    def media(self) -> tuple[Part, ...]:
        """The media parts, in order of appearance."""
        return tuple(part for part in self.content if part.type != "text")


def message(role: str, text: str, media: Sequence[Part] = ()) -> Message:
    """A turn whose media (if any) stand before its text, as the datasets and templates have it."""
    return Message(role, (*media, Part("text", text=text)))


@dataclasses.dataclass(frozen=True)
class Media:
    """A media file that is not decoded: its bytes, or where they are.

    Attributes:
      kind: ``image``, ``audio`` or ``video``.
      data: the encoded file, or None when ``path`` says where it is.
      path: file path; relative paths start at the folder of the dataset file.
      mime: e.g. ``audio/wav`` where known.
      array: samples [..., channels or time] of an audio column that came already decoded.
      sampling_rate: Hz of ``array``.
    """

    kind: str
    data: bytes | None = None
    path: str | None = None
    mime: str | None = None
    array: Any = None
    sampling_rate: int | None = None


@dataclasses.dataclass(frozen=True)
class Example:
    """A conversation up to the response, and its responses.

    Attributes:
      messages: the conversation; the last message is what the responses answer.
      responses: one for supervised, (chosen, rejected) for a preference, () for a prompt. A plain
        string is accepted and becomes an assistant message.
      media: decoded media (PIL images) or ``Media`` (audio, video), in order of appearance:
        first those of the messages, then those of the responses.
      where: ``file:row``, for error messages.
      meta: anything else the template read (labels, margins, models, ...).
    """

    messages: tuple[Message, ...]
    responses: tuple[Message | str, ...] = ()
    media: tuple[Any, ...] = ()
    where: str = ""
    meta: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        responses = tuple(
            message("assistant", r) if isinstance(r, str) else r for r in self.responses
        )
        object.__setattr__(self, "responses", responses)

    @property
    def shown(self) -> frozenset[int]:
        """Which of the media a message or a response shows."""
        turns = (*self.messages, *self.responses)
        return frozenset(part.index for turn in turns for part in turn.media)

    def replace(self, **changes) -> Example:
        """A copy with some fields changed.

        Media that only replaced messages or responses showed leave with them, as far as they stand
        at the end; the others keep their numbers.
        """
        made = dataclasses.replace(self, **changes)
        if "media" in changes or not changes.keys() & {"messages", "responses"}:
            return made
        unseen = self.shown - made.shown
        kept = len(made.media)
        while kept - 1 in unseen:
            kept -= 1
        return dataclasses.replace(made, media=made.media[:kept])


class Row(dict):
    """A dataset row that knows where it came from.

    Attributes:
      where: ``file:row``.
      root: folder that relative media paths of this row start at, or None.
    """

    where: str = ""
    root: str | None = None

    @classmethod
    def of(cls, values: Mapping[str, Any], where: str = "", root: str | None = None) -> Row:
        """Wraps ``values``; a Row keeps what it knows unless told otherwise."""
        row = cls(values)
        row.where = where or getattr(values, "where", "")
        row.root = root or getattr(values, "root", None)
        return row


class InvalidRow(DataError):
    """A row that carries no training signal as asked (a tie, an empty response, too long).

    It is dropped and counted under ``reason``, unless the caller is strict.
    """

    def __init__(self, reason: str, detail: str):
        super().__init__(detail)
        self.reason = reason


@dataclasses.dataclass
class Report:
    """How many rows were read, kept and dropped, with one example per reason."""

    rows: int = 0
    kept: int = 0
    dropped: dict[str, int] = dataclasses.field(default_factory=dict)
    first: dict[str, str] = dataclasses.field(default_factory=dict)

    def drop(self, error: InvalidRow) -> None:
        """Counts one dropped row."""
        self.dropped[error.reason] = self.dropped.get(error.reason, 0) + 1
        self.first.setdefault(error.reason, str(error))

    def __str__(self) -> str:
        if not self.dropped:
            return f"{self.kept} examples from {self.rows} rows, none dropped"
        reasons = ", ".join(f"{n} {reason}" for reason, n in sorted(self.dropped.items()))
        return (
            f"{self.kept} examples from {self.rows} rows; dropped {reasons}; for example "
            f"{json.dumps(self.first, ensure_ascii=False)}"
        )
