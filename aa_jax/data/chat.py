"""Conversation -> text by the checkpoint's own chat template, with special tokens kept apart.

A field of the data may hold text that looks like a special token (``<image>``, ``</s>``). Such text
is protected while the template is rendered, so that afterwards every special token in the text is
one the template itself wrote.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from aa_jax.data.example import Message, Part
from aa_jax.errors import CheckpointError, DataError

# Unicode noncharacters: never assigned, never exchanged, so never in a dataset.
OPEN, CLOSE = "\ufdd0", "\ufdd1"
_RESERVED = str.maketrans(dict.fromkeys("\ufdd0\ufdd1\ufdd2\ufdd3", "\ufffd"))
_PROTECTED = re.compile(f"{OPEN}(\\d+){CLOSE}")
_PROBE = "\ufdd4"


class ChatTemplate:
    """Renders conversations.

    Args:
      tokenizer: a Hugging Face fast tokenizer, used for its Jinja sandbox and named tokens.
      source: the Jinja template; None renders ``ROLE: text`` lines.
      placeholders: media kind -> special token that stands for it in the text.
      protected: special tokens that must not arise from the text of a message.
    """

    def __init__(
        self,
        tokenizer: Any,
        source: str | None,
        placeholders: dict[str, str],
        protected: Sequence[str],
    ):
        self._tokenizer, self.source, self.placeholders = tokenizer, source, dict(placeholders)
        # The longest first, so that a token is not hidden by a shorter one it begins with.
        self.protected = sorted(set(protected), key=lambda token: (-len(token), token))
        self._pattern = re.compile("|".join(map(re.escape, self.protected)) or r"(?!)")
        self._index = {token: i for i, token in enumerate(self.protected)}
        self._parts = source is not None and self._takes_parts()

    def protect(self, text: str) -> str:
        """Hides special tokens; the identity for text without any."""
        text = text.translate(_RESERVED)  # should a file hold them all the same
        return self._pattern.sub(lambda m: f"{OPEN}{self._index[m[0]]}{CLOSE}", text)

    def reveal(self, text: str) -> str:
        """Undoes ``protect``."""
        return _PROTECTED.sub(lambda m: self.protected[int(m[1])], text)

    def specials(self, text: str) -> list[re.Match[str]]:
        """The special tokens the template wrote into a rendered text."""
        return list(self._pattern.finditer(text))

    def render(
        self, messages: Sequence[Message], *, generation_prompt: bool, where: str = ""
    ) -> str:
        """The conversation as (protected) text.

        Args:
          messages: the turns.
          generation_prompt: end with the header of the assistant's turn.
          where: ``file:row`` for the error.

        Raises:
          DataError: the template refuses the conversation, or the checkpoint lacks a modality.
        """
        if self.source is None:
            lines = [f"{m.role.upper()}: {self._as_text(m, where)}\n" for m in messages]
            return "".join(lines) + ("ASSISTANT: " if generation_prompt else "")
        content = self._as_parts if self._parts else self._as_text
        turns = [{"role": m.role, "content": content(m, where)} for m in messages]
        try:
            return self._apply(turns, generation_prompt)
        except ImportError:
            raise
        except Exception as error:  # Jinja's errors, and whatever raise_exception() was given
            raise DataError(
                f"{where or 'A conversation'}: the chat template of this checkpoint refuses the "
                f"turns {', '.join(m.role for m in messages)}: {error}. Use a template of the data "
                "without this turn (often the system message), or another chat template."
            ) from error

    def _apply(self, turns: list[dict[str, Any]], generation_prompt: bool) -> str:
        return self._tokenizer.apply_chat_template(
            turns,
            chat_template=self.source,
            tokenize=False,
            add_generation_prompt=generation_prompt,
        )

    def _takes_parts(self) -> bool:
        """Whether message contents are lists of parts (multimodal templates) or plain text."""

        def shown(content: Any) -> bool:
            try:
                text = self._apply([{"role": "user", "content": content}], True)
            except ImportError:  # no template engine: that is not the template's fault
                raise
            except Exception:  # a template made for the other form fails in its own way
                return False
            return _PROBE in text and "'type'" not in text

        if shown([{"type": "text", "text": _PROBE}]):
            return True
        if not shown(_PROBE):
            raise CheckpointError(
                "The chat template of this checkpoint shows the text of a user message neither as "
                "a string nor as a list of parts. Pass another template with chat_template=..."
            )
        return False

    def _placeholder(self, part: Part, where: str) -> str:
        if part.type not in self.placeholders:
            have = ", ".join(("text", *self.placeholders))
            raise DataError(
                f"{where or 'A conversation'}: has an {part.type}, but this checkpoint reads "
                f"{have}. Use a model for this modality, or a text-only template of the data."
            )
        return self.placeholders[part.type]

    def _as_parts(self, message: Message, where: str) -> list[dict[str, str]]:
        parts = []
        for part in message.content:
            if part.type == "text":
                parts.append({"type": "text", "text": self.protect(part.text)})
            else:
                self._placeholder(part, where)
                parts.append({"type": part.type})
        return parts

    def _as_text(self, message: Message, where: str) -> str:
        pieces = []
        for part in message.content:
            if part.type == "text":
                pieces.append(self.protect(part.text))
            else:
                pieces.append(self._placeholder(part, where) + "\n")
        return "".join(pieces)
