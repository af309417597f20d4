"""Prompt sets of the LLF stages, made from the prompt set before and the answers to it.

Works on any Example: a dataset row read through a template or a prompt of the digits world. Media
are shared, not copied.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from aa_jax.data import llf_prompts
from aa_jax.data.example import Example


class Lazy(Sequence):
    """A sequence whose items are made on access, so that a prompt set holds no images."""

    def __init__(self, length: int, make: Callable[[int], Any]):
        self._length, self._make = length, make

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(self._length))]
        if not 0 <= index < self._length:
            raise IndexError(f"item {index} of {self._length}")
        return self._make(index)


def critique_prompts(
    prompts: Sequence[Example],
    responses: Sequence[Mapping[str, Any]],
    wording: Mapping[str, str] | None = None,
) -> Sequence[Example]:
    """(x, y) for every prompt x and its sampled response y (`responses[i]["text"]`)."""

    def make(index: int) -> Example:
        prompt = prompts[index]
        *before, last = prompt.messages
        asked = llf_prompts.critique(last.text, responses[index]["text"], last.media, wording)
        return prompt.replace(messages=(*before, *asked), responses=())

    return Lazy(len(prompts), make)


def refine_prompts(
    prompts: Sequence[Example],
    responses: Sequence[Mapping[str, Any]],
    feedback: Sequence[Mapping[str, Any]],
    wording: Mapping[str, str] | None = None,
    part: str = "refinement",
) -> Sequence[Example]:
    """x, y and what the feedback says should change.

    Args:
      prompts: the prompts x.
      responses: y, by `text`.
      feedback: c, by `text`.
      wording: see `aa_jax.data.llf_prompts`.
      part: what of c the model is shown: "refinement", or "all" (critique and refinement).
    """

    def make(index: int) -> Example:
        prompt = prompts[index]
        *before, last = prompt.messages
        advice = feedback[index]["text"]
        if part == "refinement":
            # Feedback without its marks is shown whole rather than as an empty instruction.
            advice = llf_prompts.split_feedback(advice, wording)[1] or advice
        asked = llf_prompts.refine(
            last.text, responses[index]["text"], advice.strip(), last.media, wording
        )
        return prompt.replace(messages=(*before, *asked), responses=())

    return Lazy(len(prompts), make)
