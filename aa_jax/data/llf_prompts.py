"""The three prompts of learning from language feedback: answer x, criticise y, refine y.

The same functions serve the annotated datasets and the digits world; only ``wording`` differs.
Format of the targets as in the align-anything dataset: ``##Critique: ... ##Refinement: ...``.
Source: Ji et al., "Align Anything", section 3 (feedback modelling, self-improving).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from aa_jax.data.example import Message, Part, message
from aa_jax.errors import DataError

WORDING = {
    "answer": "{prompt}",
    "critique": "##Prompt: {prompt}\n##Response: {response}\nYour critique and refinement:",
    "refine": (
        "{critique}\nNow improve your response to the first message, following this critique and "
        "its suggestions."
    ),
    "judged": "{prompt}\n(Write the response about which this was said: {critique})",
    "critique_mark": "##Critique:",
    "refinement_mark": "##Refinement:",
}


def _fill(wording: Mapping[str, str] | None, key: str, **fields: str) -> str:
    if wording is not None and (unknown := sorted(set(wording) - set(WORDING))):
        raise DataError(
            f"Unknown wording {', '.join(unknown)}: the prompts of language feedback are "
            f"{', '.join(WORDING)}."
        )
    template = {**WORDING, **(wording or {})}[key]
    missing = [name for name in fields if f"{{{name}}}" not in template]
    if missing:
        raise DataError(
            f"The wording of {key!r} leaves out {', '.join('{' + m + '}' for m in missing)}: "
            f"{template!r}. The model would not see what it is asked about."
        )
    # One pass, so braces inside the fields stay as they are.
    return re.sub(r"\{(\w+)\}", lambda m: fields.get(m[1], m[0]), template)


def answer(
    prompt: str, media: Sequence[Part] = (), wording: Mapping[str, str] | None = None
) -> tuple[Message, ...]:
    """x: one user turn."""
    return (message("user", _fill(wording, "answer", prompt=prompt), media),)


def critique(
    prompt: str,
    response: str,
    media: Sequence[Part] = (),
    wording: Mapping[str, str] | None = None,
) -> tuple[Message, ...]:
    """(x, y): one user turn that shows prompt and response and asks for language feedback."""
    return (message("user", _fill(wording, "critique", prompt=prompt, response=response), media),)


def refine(
    prompt: str,
    response: str,
    critique: str,
    media: Sequence[Part] = (),
    wording: Mapping[str, str] | None = None,
) -> tuple[Message, ...]:
    """x / y / c: the answer stands as the assistant's turn, the feedback is the next user turn."""
    return (
        *answer(prompt, media, wording),
        message("assistant", response),
        message("user", _fill(wording, "refine", critique=critique)),
    )


def judged(
    messages: Sequence[Message], critique: str, wording: Mapping[str, str] | None = None
) -> tuple[Message, ...]:
    """(x, j): the conversation whose last turn also shows the judgment of the answer to come.

    Source: Xu et al. 2023, "Reasons to Reject? Aligning Language Models with Judgments", section 3.
    """
    last = messages[-1]
    text = _fill(wording, "judged", prompt=last.text, critique=critique)
    return (*messages[:-1], message(last.role, text, last.media))


def join_feedback(critique: str, refinement: str, wording: Mapping[str, str] | None = None) -> str:
    """Critique and refinement as one feedback text, with their marks."""
    marks = {**WORDING, **(wording or {})}
    parts = ((marks["critique_mark"], critique), (marks["refinement_mark"], refinement))
    return "\n".join(f"{mark} {text.strip()}" for mark, text in parts if text and text.strip())


def split_feedback(feedback: str, wording: Mapping[str, str] | None = None) -> tuple[str, str]:
    """Feedback text -> (critique, refinement); without marks all of it is the critique."""
    marks = {**WORDING, **(wording or {})}
    head, _, tail = feedback.partition(marks["refinement_mark"])
    return head.replace(marks["critique_mark"], "", 1).strip(), tail.strip()
