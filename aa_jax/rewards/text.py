"""Rewards that look at the text alone: form, length, exact match."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from aa_jax.errors import ConfigError
from aa_jax.rewards.base import Request, Result, RewardError

TAGS = ("<think>", "</think>", "<answer>", "</answer>")
_FORM = re.compile(r"\s*<think>(.*?)</think>\s*<answer>(.*?)</answer>\s*", re.DOTALL)
_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)


def well_formed(text: str) -> bool:
    """Whether a text is one ``<think>…</think>`` and one ``<answer>…</answer>``, nothing else.

    White space may stand around the blocks. Each tag stands exactly once, and neither block is
    blank: an empty thought or answer is the cheapest way to earn a reward for form.
    """
    match = _FORM.fullmatch(text)
    if match is None or any(text.count(tag) != 1 for tag in TAGS):
        return False
    return bool(match[1].strip() and match[2].strip())


def answer_of(text: str, where: str = "answer") -> str | None:
    """The part of a response that is judged; None if there is none, or more than one.

    Args:
      text: a response.
      where: "answer": the ``<answer>`` block behind the last ``</think>``; two such blocks are no
        answer, since otherwise several guesses would be worth more than one. "text": everything.
    """
    if where == "text":
        return text.strip() or None
    blocks = _ANSWER.findall(text.rpartition("</think>")[2])
    return blocks[0].strip() or None if len(blocks) == 1 else None


class Format:
    """``value`` for a well-formed response, else 0; see `well_formed`."""

    def __init__(self, *, value: int | float = 1.0):
        self.value = float(value)

    def __call__(self, requests: Sequence[Request]) -> list[Result]:
        return [Result(self.value * well_formed(request.response)) for request in requests]


class ExactMatch:
    """1 if the answer is the reference (or one of several), else 0.

    Runs of white space count as one space. Without a reference the sample is invalid.

    Args:
      where: which part of the response is the answer, see `answer_of`.
      ignore_case: compare case-folded.
      ignore_spaces: compare without any white space.
    """

    def __init__(
        self, *, where: str = "text", ignore_case: bool = False, ignore_spaces: bool = False
    ):
        check_where(where)
        self.where, self.ignore_case, self.ignore_spaces = where, ignore_case, ignore_spaces

    def __call__(self, requests: Sequence[Request]) -> list[Result]:
        return [self._judge(request) for request in requests]

    def _judge(self, request: Request) -> Result:
        golds = request.reference
        golds = list(golds) if isinstance(golds, (list, tuple)) else [golds]
        golds = [self._normal(str(gold)) for gold in golds if gold is not None]
        golds = [gold for gold in golds if gold]
        if not golds:
            return Result.invalid("no reference", f"the reference is {request.reference!r}")
        answer = answer_of(request.response, self.where)
        return Result(float(answer is not None and self._normal(answer) in golds))

    def _normal(self, text: str) -> str:
        text = ("" if self.ignore_spaces else " ").join(text.split())
        return text.casefold() if self.ignore_case else text


def soft_overlong(length: int | float, max_length: int, cache: int) -> float:
    """DAPO's soft overlong punishment (Yu et al., 2025, equation 13), in [-1, 0].

    With L = ``max_length`` and C = ``cache``::

        0                      length <= L - C
        (L - C - length) / C   L - C < length <= L
        -1                     L < length
    """
    if length > max_length:
        return -1.0
    over = length - (max_length - cache)
    return -over / cache if over > 0 else 0.0


class Overlong:
    """`soft_overlong` of the response's length in tokens, ``meta["response_tokens"]``.

    Args:
      max_length: L, from which on the punishment is full, tokens.
      cache: C, how many tokens before L it sets in; 0 makes it a step.

    Raises:
      ConfigError: lengths that make no sense.
    """

    def __init__(self, *, max_length: int, cache: int):
        if not 0 <= cache <= max_length or not max_length:
            raise ConfigError(
                f"max_length={max_length}, cache={cache}: the punishment sets in at max_length - "
                "cache tokens, so 0 <= cache <= max_length and max_length > 0."
            )
        self.max_length, self.cache = max_length, cache

    def __call__(self, requests: Sequence[Request]) -> list[Result]:
        return [self._judge(request) for request in requests]

    def _judge(self, request: Request) -> Result:
        length = tokens_of(request)
        return Result(soft_overlong(length, self.max_length, self.cache), parts={"tokens": length})


class Length:
    """The response's length in tokens; a weight gives a token its price.

    Args:
      most: longer ones count as this many; None: no limit.
    """

    def __init__(self, *, most: int | None = None):
        self.most = most

    def __call__(self, requests: Sequence[Request]) -> list[Result]:
        most = float("inf") if self.most is None else self.most
        return [Result(min(tokens_of(request), most)) for request in requests]


def tokens_of(request: Request) -> float:
    """Length of the response in tokens.

    Raises:
      RewardError: the rollout did not say.
    """
    length: Any = request.meta.get("response_tokens")
    if length is None:
        raise RewardError(
            "a length reward reads meta['response_tokens'], which this request does not have (it "
            f"has {', '.join(request.meta) or 'nothing'}). Put the number of sampled tokens there."
        )
    return float(length)


def check_where(where: str) -> None:
    """Refuses a part of a response that does not exist."""
    if where not in ("answer", "text"):
        raise ConfigError(f"where={where!r} is not one of 'answer', 'text'.")
