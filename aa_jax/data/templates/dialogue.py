"""Preference sets whose responses are whole dialogues, or packed into one text column."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from typing import Any

from aa_jax.data.example import Example, InvalidRow, Message, message
from aa_jax.data.templates.base import Side, Template, _Media, _where, column, text_column
from aa_jax.errors import DataError

Turn = tuple[str, str]
_HH = re.compile(r"\n\n(Human|Assistant): ?")
_ROLES = {"Human": "user", "Assistant": "assistant"}


@dataclasses.dataclass(frozen=True)
class Dialogues(Template):
    """``chosen`` and ``rejected`` are dialogues that part at their last turn.

    Read are Anthropic's HH-RLHF (texts of ``\\n\\nHuman: ...\\n\\nAssistant: ...``) and lists of
    ``{"role", "content"}`` (UltraFeedback binarized and its kind). The turns before the last are
    the conversation.
    """

    def dialogue(self, row: Mapping[str, Any], side: Side) -> list[Turn]:
        """The turns of one side.

        Raises:
          DataError: neither form.
        """
        value = column(row, side.text, "dialogue")
        if isinstance(value, str):
            pieces = _HH.split(value)
            turns = [
                (_ROLES[role], text.strip())
                for role, text in zip(pieces[1::2], pieces[2::2], strict=True)
            ]
            if turns and not pieces[0].strip():
                return turns
        elif isinstance(value, (list, tuple)):
            try:
                return [(str(turn["role"]), str(turn["content"])) for turn in value]
            except (TypeError, KeyError):
                pass
        raise DataError(
            f"{_where(row)}: {side.text[0]!r} is no dialogue: expected a text of "
            "'\\n\\nHuman: ... \\n\\nAssistant: ...', or a list of {'role', 'content'}. For plain "
            "texts use the template chosen_rejected."
        )

    def _example(self, row, sides, order, decode) -> Example:
        read = [self.dialogue(row, side) for side in (sides or self.pair[:1])]
        for turns in read:
            if len(turns) < 2 or turns[-1][0] != "assistant" or turns[-2][0] != "user":
                raise InvalidRow(
                    "no answer to a prompt",
                    f"{_where(row)}: a dialogue does not end with a user's turn and its answer.",
                )
        if any(turns[:-1] != read[0][:-1] for turns in read):
            raise InvalidRow(
                "different prompts",
                f"{_where(row)}: chosen and rejected differ before their last turn.",
            )
        answers = [turns[-1][1] for turns in read] if sides else []
        if any(not answer.strip() for answer in answers):
            raise InvalidRow("empty response", f"{_where(row)}: a response is empty.")
        earlier = tuple(message(role, text) for role, text in read[0][:-1])
        # A system message of the template, unless the dialogue brings its own.
        start = () if read[0][0][0] == "system" else self._system()
        return Example(start + earlier, tuple(answers), (), _where(row), self.extra(row, order))


@dataclasses.dataclass(frozen=True)
class PackedColumn(Template):
    """RLHF-V: question, chosen and rejected are a JSON object in one text column.

    Attributes:
      packed: names of that column.
    """

    packed: tuple[str, ...] = ("text",)

    def _unpacked(self, row: Mapping[str, Any]) -> Mapping[str, Any]:
        value = column(row, self.packed, "packed texts")
        if isinstance(value, str):
            try:
                value = json.loads(value)
            except ValueError as error:
                raise InvalidRow(
                    "broken JSON", f"{_where(row)}: {self.packed[0]!r} is no JSON: {error}."
                ) from error
        if not isinstance(value, Mapping):
            raise DataError(f"{_where(row)}: {self.packed[0]!r} holds no JSON object.")
        rest = {name: v for name, v in row.items() if name not in self.packed}
        wide = type(row)({**rest, **value})
        wide.__dict__.update(getattr(row, "__dict__", {}))
        return wide

    def prompt_text(self, row: Mapping[str, Any]) -> str:
        return super().prompt_text(self._unpacked(row))

    def _response(self, row: Mapping[str, Any], side: Side, media: _Media) -> Message:
        text = text_column(self._unpacked(row), side.text, "response")
        if not text.strip():
            raise InvalidRow("empty response", f"{_where(row)}: {side.text[0]} is empty.")
        return message("assistant", text)


_SIDES = (Side(("chosen",)), Side(("rejected",)))

DIALOGUE_TEMPLATES: dict[str, Template] = {
    "HH-RLHF": Dialogues(pair=_SIDES),
    "UltraFeedback": Dialogues(pair=_SIDES),
    "RLHF-V": PackedColumn(
        question=("question",), media=(("image", ("image",)),), pair=_SIDES, strip=("<image>",)
    ),
}
