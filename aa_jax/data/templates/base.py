"""The template: which columns of a row are the prompt, the media, the responses and the label."""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from aa_jax.data import llf_prompts
from aa_jax.data.example import Example, InvalidRow, Message, Part, message
from aa_jax.errors import DataError

Columns = tuple[str, ...]  # names one column goes by; the first one present counts


@dataclasses.dataclass(frozen=True)
class Side:
    """One response: its text column and its media columns ``(kind, names)``."""

    text: Columns = ()
    media: tuple[tuple[str, Columns], ...] = ()


def has(row: Mapping[str, Any], names: Columns) -> bool:
    """Whether the row has one of these columns."""
    return any(name in row for name in names)


def column(row: Mapping[str, Any], names: Columns, use: str = "") -> Any:
    """The value of the first of ``names`` that the row has.

    Raises:
      DataError: none of them; lists the columns looked for, those present and the nearest match.
    """
    for name in names:
        if name in row:
            return row[name]
    close = [c for n in names for c in difflib.get_close_matches(n, list(row), n=1, cutoff=0.6)]
    hint = f" The nearest match is {close[0]!r}." if close else ""
    wanted = " or ".join(map(repr, names)) + (f" for the {use}" if use else "")
    present = ", ".join(map(repr, row)) or "none"
    raise DataError(
        f"{_where(row)}: no column {wanted}; the columns are {present}.{hint} Choose the template "
        "that fits this dataset, or name the columns with columns={...}."
    )


def text_column(row: Mapping[str, Any], names: Columns, use: str = "") -> str:
    """Like ``column``, as text; null becomes the empty string."""
    value = column(row, names, use)
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, (Mapping, list, tuple, bytes)):
        raise DataError(
            f"{_where(row)}: the column of the {use or names[0]} holds a {type(value).__name__}, "
            "not text. Choose the template that fits this dataset."
        )
    return str(value)


def label_column(row: Mapping[str, Any], names: Columns, allowed: Sequence[int]) -> int:
    """An integer label out of ``allowed``.

    Raises:
      InvalidRow: any other value (ties, skipped annotations), reason ``invalid label``.
    """
    value = column(row, names, "label")
    try:
        number = None if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = None
    if number is None or number not in allowed:
        raise InvalidRow(
            "invalid label",
            f"{_where(row)}: the label {names[0]} is {value!r}, not one of "
            f"{', '.join(map(str, allowed))}.",
        )
    return int(number)


def _where(row: Mapping[str, Any]) -> str:
    return getattr(row, "where", "") or "A row"


class _Media:
    """Collects the media of one example and hands out the parts that refer to them."""

    def __init__(self, row: Mapping[str, Any]):
        self.row, self.items = row, []

    def parts(self, columns: Sequence[tuple[str, Columns]]) -> tuple[Part, ...]:
        from aa_jax.data.media import reference

        parts = []
        for kind, names in columns:
            values = column(self.row, names, kind)
            for value in values if isinstance(values, (list, tuple)) else [values]:
                if value is None:
                    raise InvalidRow(f"no {kind}", f"{_where(self.row)}: the {kind} is null.")
                parts.append(Part(kind, index=len(self.items)))
                self.items.append(reference(value, kind, _where(self.row)))
        return tuple(parts)


@dataclasses.dataclass(frozen=True)
class Template:
    """Row -> Example, for one dataset format.

    Attributes:
      question: names of the prompt column.
      media: input media ``(kind, names)``, placed before the prompt's text.
      response: the answer of a supervised row.
      pair: two responses. Without ``label`` they are (better, worse).
      label: names of the column that says which of the pair is better.
      labels: its two values, meaning the first, the second response is better.
      critiques: names of the language-feedback column of each response.
      critiqued: the responses these belong to; default: the pair.
      refinements: names of a separate refinement column, where there is one.
      system: system message, if the dataset's format has one.
      strip: markers removed from the prompt text (the media parts stand for them).
      clean: any other change to the prompt's text.
      meta: columns kept in ``Example.meta`` when present.
    """

    question: Columns = ("prompt",)
    media: tuple[tuple[str, Columns], ...] = ()
    response: Side | None = None
    pair: tuple[Side, Side] | None = None
    label: Columns = ()
    labels: tuple[int, int] = (1, 2)
    critiques: tuple[Columns, ...] = ()
    critiqued: tuple[Side, ...] = ()
    refinements: tuple[Columns, ...] = ()
    system: str | None = None
    strip: tuple[str, ...] = ()
    clean: Callable[[str], str] | None = None
    meta: Columns = ()

    # What a subclass may change -----------------------------------------------------------------

    def prompt_text(self, row: Mapping[str, Any]) -> str:
        """The user's text."""
        text = text_column(row, self.question, "prompt")
        for marker in self.strip:
            text = text.replace(marker, "")
        return self.clean(text) if self.clean else text.strip() if self.strip else text

    def order(self, row: Mapping[str, Any]) -> tuple[int, int]:
        """(better, worse) as indices into ``pair``."""
        if not self.label:
            return 0, 1
        better = self.labels.index(label_column(row, self.label, self.labels))
        return better, 1 - better

    def extra(self, row: Mapping[str, Any], order: tuple[int, int] | None) -> dict[str, Any]:
        """Meta data of the example."""
        return {name: row[name] for name in self.meta if name in row}

    # The readings of a row -----------------------------------------------------------------

    def supervised(self, row: Mapping[str, Any], *, decode: bool = True) -> Example:
        """Prompt and its answer; a preference row gives its better response.

        Raises:
          InvalidRow: empty response, or (for a preference row) no valid label.
          DataError: missing column.
        """
        side, order = self.response, None
        if self.pair and (side is None or not self._has_side(row, side)):
            if side is None or self._has_side(row, self.pair[0]):
                order = self.order(row)
                side = self.pair[order[0]]
        if side is None:
            raise DataError(f"{_where(row)}: this template has no supervised reading.")
        return self._example(row, [side], order, decode)

    def preference(self, row: Mapping[str, Any], *, decode: bool = True) -> Example:
        """Prompt and (chosen, rejected).

        Raises:
          InvalidRow: no valid label, an empty response, identical responses.
          DataError: missing column, or a format without preferences.
        """
        if self.pair is None:
            raise DataError(f"{_where(row)}: this template has no preference reading.")
        order = self.order(row)
        example = self._example(row, [self.pair[i] for i in order], order, decode)
        chosen, rejected = example.responses
        if not chosen.media and chosen.text.strip() == rejected.text.strip():
            raise InvalidRow("identical responses", f"{_where(row)}: both responses are equal.")
        return example

    def prompt(self, row: Mapping[str, Any], *, decode: bool = True) -> Example:
        """The conversation without a response, for sampling."""
        return self._example(row, [], None, decode)

    def unpaired(self, row: Mapping[str, Any], *, decode: bool = True) -> list[Example]:
        """A preference as two rows with ``meta["label"]`` 1 (better) and 0, as KTO wants them."""
        pair = self.preference(row, decode=decode)
        return [
            _alone(pair, number).replace(meta={**pair.meta, "label": label})
            for number, label in ((0, 1), (1, 0))
        ]

    def graded(self, row: Mapping[str, Any], *, decode: bool = True) -> list[Example]:
        """Responses with their grades on each dimension: one example per graded response.

        The grades are the columns ``<dimension>_rate_1`` and ``_2`` of the first and the second
        response; ``meta["<dimension>_rate"]`` has a response's own, -1 where it has none.

        Raises:
          InvalidRow: an empty response, no grades, or one that is not a number from 0.
          DataError: missing column, or a format without two responses.
        """
        if self.pair is None:
            raise DataError(f"{_where(row)}: this template has no two responses to be graded.")
        names = sorted({m[1] for name in row if (m := _RATE.fullmatch(str(name)))})
        if not names:
            present = ", ".join(map(repr, row))
            raise DataError(
                f"{_where(row)}: no column <dimension>_rate_1, such as 'clarity_rate_1', holds "
                f"grades; the columns are {present}."
            )
        examples = []
        for i, side in enumerate(self.pair):
            grades = {f"{name}_rate": _grade(row, f"{name}_rate_{i + 1}") for name in names}
            if max(grades.values()) >= 0:
                example = self._example(row, [side], None, decode)
                meta = {**example.meta, **grades, "response_index": i}
                examples.append(example.replace(meta=meta))
        if not examples:
            raise InvalidRow("no grades", f"{_where(row)}: neither response has a grade.")
        return examples

    def feedback(
        self,
        row: Mapping[str, Any],
        *,
        decode: bool = True,
        wording: Mapping[str, str] | None = None,
    ) -> list[Example]:
        """Feedback modelling, log P(c | x, y): one example per response that has feedback.

        The prompt shows x and y, the target is the language feedback
        ``##Critique: ... ##Refinement: ...``.

        Raises:
          InvalidRow: no feedback in this row.
          DataError: missing column, or a format without language feedback.
        """
        examples = []
        for i, response, critique in self._feedback_texts(row, wording):
            media = _Media(row)
            parts = media.parts(self.media)
            turns = llf_prompts.critique(self.prompt_text(row), response, parts, wording)
            example = Example(
                self._system() + turns,
                (critique,),
                tuple(media.items),
                _where(row),
                {**self.extra(row, None), "response_index": i},
            )
            examples.append(self._decoded(example, row, decode))
        return examples

    def judgment(
        self,
        row: Mapping[str, Any],
        *,
        decode: bool = True,
        wording: Mapping[str, str] | None = None,
    ) -> list[Example]:
        """Responses behind their judgments, log P(y | x, j): one example per response that has one.

        The judgment is the critique of the language feedback. ``meta["negative"]`` is 1 where it
        finds fault: of a labelled pair the worse response; without a label every response.
        ``meta["plain"]`` is the conversation without the judgment.

        Raises:
          InvalidRow: no feedback in this row, or no valid label.
          DataError: missing column, or a format without language feedback.
        """
        worse = self.order(row)[1] if self.label and not self.critiqued else None
        examples = []
        for i, response, feedback in self._feedback_texts(row, wording):
            critique, refinement = llf_prompts.split_feedback(feedback, wording)
            media = _Media(row)
            plain = self.messages(row, media)
            meta = {"negative": int(worse in (None, i)), "plain": plain, "response_index": i}
            example = Example(
                llf_prompts.judged(plain, critique or refinement, wording),
                (response,),
                tuple(media.items),
                _where(row),
                {**self.extra(row, None), **meta},
            )
            examples.append(self._decoded(example, row, decode))
        return examples

    def _feedback_texts(
        self, row: Mapping[str, Any], wording: Mapping[str, str] | None
    ) -> list[tuple[int, str, str]]:
        """(number, response, its language feedback) of every response that has any."""
        sides = self.critiqued or self.pair or ()
        if not self.critiques or not all(side.text for side in sides):
            raise DataError(f"{_where(row)}: this template has no language feedback.")
        found = []
        for i, (side, names) in enumerate(zip(sides, self.critiques, strict=True)):
            critique = text_column(row, names, "language feedback").strip()
            if self.refinements and has(row, self.refinements[i]):
                refinement = text_column(row, self.refinements[i], "refinement")
                critique = llf_prompts.join_feedback(critique, refinement, wording)
            response = text_column(row, side.text, "response")
            if critique and response.strip():
                found.append((i, response, critique))
        if not found:
            raise InvalidRow("no feedback", f"{_where(row)}: neither response has feedback.")
        return found

    # ---------------------------------------------------------------------------------------------

    def messages(self, row: Mapping[str, Any], media: _Media) -> tuple[Message, ...]:
        """The conversation up to the response."""
        parts = media.parts(self.media)
        return self._system() + (message("user", self.prompt_text(row), parts),)

    def _system(self) -> tuple[Message, ...]:
        return (message("system", self.system),) if self.system else ()

    @staticmethod
    def _has_side(row: Mapping[str, Any], side: Side) -> bool:
        names = [side.text] if side.text else [names for _, names in side.media]
        return all(has(row, n) for n in names)

    def _example(
        self,
        row: Mapping[str, Any],
        sides: Sequence[Side],
        order: tuple[int, int] | None,
        decode: bool,
    ) -> Example:
        media = _Media(row)
        messages = self.messages(row, media)
        if not any(part.index is not None or part.text.strip() for part in messages[-1].content):
            raise InvalidRow("empty prompt", f"{_where(row)}: the prompt is empty.")
        responses = tuple(self._response(row, side, media) for side in sides)
        example = Example(
            messages, responses, tuple(media.items), _where(row), self.extra(row, order)
        )
        return self._decoded(example, row, decode)

    def _response(self, row: Mapping[str, Any], side: Side, media: _Media) -> Message:
        text = text_column(row, side.text, "response") if side.text else ""
        parts = media.parts(side.media)
        if not parts and not text.strip():
            raise InvalidRow("empty response", f"{_where(row)}: {side.text[0]} is empty.")
        return message("assistant", text, parts) if text else Message("assistant", parts)

    @staticmethod
    def _decoded(example: Example, row: Mapping[str, Any], decode: bool) -> Example:
        if not decode or not example.media:
            return example
        from aa_jax.data.media import decode as decode_media

        return decode_media(example, getattr(row, "root", None))


def _alone(pair: Example, number: int) -> Example:
    """One response of a pair, without the media of the other."""
    response = pair.responses[number]
    others = {p.index for r in pair.responses if r is not response for p in r.media}
    kept = [i for i in range(len(pair.media)) if i not in others]
    place = {old: new for new, old in enumerate(kept)}

    def moved(turn: Message) -> Message:
        parts = (
            p if p.index is None else dataclasses.replace(p, index=place[p.index])
            for p in turn.content
        )
        return dataclasses.replace(turn, content=tuple(parts))

    return pair.replace(
        messages=tuple(map(moved, pair.messages)),
        responses=(moved(response),),
        media=tuple(pair.media[i] for i in kept),
    )


_RATE = re.compile(r"(.+)_rate_[12]")


def _grade(row: Mapping[str, Any], name: str) -> int:
    """A grade, or -1 where the column is absent or empty."""
    value = row.get(name)
    if value is None or value == "":
        return -1
    try:
        number = -2.0 if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = -2.0
    if math.isnan(number):
        return -1
    if number < 0 or number != int(number):
        raise InvalidRow(
            "invalid grade", f"{_where(row)}: {name} is {value!r}; a grade is 0, 1, 2, 3 or empty."
        )
    return int(number)


# The readings of a row by name, each giving a list of examples.
TASKS = ("supervised", "preference", "prompt", "feedback", "unpaired", "judgment", "graded")
WORDED = ("feedback", "judgment")  # those whose prompts have a wording


def read(template: Template, task: str, row: Mapping[str, Any], **kwargs) -> list[Example]:
    """Applies one reading; always a list, as feedback and unpaired give several examples.

    Raises:
      DataError: unknown task.
    """
    if task not in TASKS:
        raise DataError(f"Unknown task {task!r}; a template offers {', '.join(TASKS)}.")
    result = getattr(template, task)(row, **kwargs)
    return result if isinstance(result, list) else [result]
