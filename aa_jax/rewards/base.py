"""What a reward is: requests in, results out; and what happens when it fails.

A reward is any callable ``reward(requests) -> results``, one result per request. Rules that hold
for every reward, because `guard` applies them:

==========================  ======================================================================
NaN or infinite value       invalid, counted under "not finite"
``None``                    invalid, "skipped": how a function says it cannot judge this one
exception                   the batch is asked again one by one; those that raise are invalid
an `AaJaxError`             raised: the set-up is wrong, and training on masked samples hides that
wrong number of results     raised: nobody knows which value belongs to which request
empty response              scored like any other, and counted under "empty"
==========================  ======================================================================

A reward that judges every request by itself and leaves the device alone may say so by an attribute
``overlaps = True``: it is then asked about some responses, in a thread of its own, while others are
still being written.

Invalid means *masked*: the sample takes part in no advantage and no loss. It is what a sample gets
that could not be judged (its gold answer is unreadable, the server is down), never a verdict on the
response: a policy that could make its own samples invalid would learn to do so instead of being
wrong, so whatever a response does to its judge (hang, crash, flood) is a valid, low value.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, UInt8
from PIL import Image

from aa_jax.data.example import Example, Message, Part, message
from aa_jax.errors import AaJaxError, ConfigError

log = logging.getLogger(__name__)

PICTURE = "<image>"  # stands in a response's text where it holds a picture


class RewardError(AaJaxError):
    """A reward cannot be computed as set up: no isolation, no server, wrong number of results."""


@dataclasses.dataclass(frozen=True)
class Request:
    """One response to be judged.

    Attributes:
      prompt: what was answered: text, or an `Example` with its conversation and media.
      response: the answer's text, without its end token.
      reference: the truth to judge by: a gold answer, unit tests, a task, or None.
      meta: anything else, e.g. ``response_tokens`` (length in tokens).
      pictures: what the response draws, in order; `PICTURE` stands in its text for each.
    """

    prompt: str | Example
    response: str
    reference: Any = None
    meta: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    pictures: tuple[UInt8[np.ndarray, "H W 3"], ...] = ()

    @property
    def text(self) -> str:
        """The prompt's last turn as text."""
        if isinstance(self.prompt, str):
            return self.prompt
        return self.prompt.messages[-1].text if self.prompt.messages else ""

    @property
    def example(self) -> Example:
        """The prompt as a conversation; plain text is one user turn."""
        if isinstance(self.prompt, str):
            return Example((message("user", self.prompt),))
        return self.prompt

    @property
    def answered(self) -> Example:
        """The prompt with the response behind it, pictures in their places.

        Raises:
          RewardError: the text has places for another number of pictures.
        """
        example = self.example
        if not self.pictures:
            return example.replace(responses=(self.response,))
        texts = self.response.split(PICTURE)
        if len(texts) != len(self.pictures) + 1:
            raise RewardError(
                f"a response with {len(self.pictures)} pictures has {len(texts) - 1} places for "
                f"them: {PICTURE} must stand in its text once for each."
            )
        parts = [Part("text", text=texts[0])]
        for k, text in enumerate(texts[1:]):
            parts += [Part("image", index=len(example.media) + k), Part("text", text=text)]
        answer = Message("assistant", tuple(p for p in parts if p.type != "text" or p.text))
        media = (*example.media, *map(Image.fromarray, self.pictures))
        return example.replace(responses=(answer,), media=media)


@dataclasses.dataclass(frozen=True)
class Result:
    """What a reward says about one response.

    Attributes:
      value: the reward; 0 and without meaning when invalid.
      valid: False masks the sample.
      parts: named figures behind the value, for tables and curves.
      reason: why it is invalid, in a few words that can be counted; None when valid.
      detail: the full story of this one case, for the log.
    """

    value: int | float = 0.0
    valid: bool = True
    parts: Mapping[str, int | float] = dataclasses.field(default_factory=dict)
    reason: str | None = None
    detail: str = ""

    @classmethod
    def invalid(cls, reason: str, detail: str = "", parts: Mapping[str, float] | None = None):
        """A masked sample."""
        return cls(0.0, False, dict(parts or {}), reason, detail)


Reward = Callable[[Sequence[Request]], Sequence[Result | float | None]]


@dataclasses.dataclass(frozen=True)
class Scores:
    """The results of a batch as arrays.

    Attributes:
      values: [N] float32, 0 where invalid.
      valid: [N] bool.
      parts: name -> [N] float32, NaN where a result has no such part.
      reasons: [N], None where valid.
      counts: requests, valid, empty, and one "invalid: <reason>" per reason that occurred.
    """

    values: Float[np.ndarray, " N"]
    valid: Bool[np.ndarray, " N"]
    parts: Mapping[str, Float[np.ndarray, " N"]]
    reasons: tuple[str | None, ...]
    counts: Mapping[str, int]

    def figures(self) -> dict[str, float]:
        """Means over the valid samples, and counts, as floats for a line of metrics."""
        found = {name.replace(": ", "/"): float(count) for name, count in self.counts.items()}
        if self.valid.any():
            found["mean"] = float(self.values[self.valid].mean())
            found["std"] = float(self.values[self.valid].std())
        for name, values in self.parts.items():
            known = self.valid & np.isfinite(values)
            if known.any():
                found[f"part/{name}"] = float(values[known].mean())
                found[f"std/{name}"] = float(values[known].std())
        return {f"reward/{name}": value for name, value in found.items()}


def evaluate(reward: Reward, requests: Sequence[Request]) -> Scores:
    """Asks a reward about a batch; failures are masked, counted, and logged once per call.

    Raises:
      AaJaxError: the reward's set-up is wrong, see the module's table.
    """
    return collected(requests, guard(reward, requests))


def collected(requests: Sequence[Request], results: Sequence[Result]) -> Scores:
    """The checked results of a batch as arrays; failures are counted, and logged once."""
    counts = Counter(requests=len(requests), valid=sum(result.valid for result in results))
    counts["empty"] = sum(not request.response.strip() for request in requests)
    first: dict[str, str] = {}
    for result in results:
        if not result.valid:
            counts[f"invalid: {result.reason}"] += 1
            first.setdefault(str(result.reason), result.detail)
    if first:
        log.warning(
            "%d of %d rewards are invalid, their samples are masked: %s",
            len(results) - counts["valid"],
            len(results),
            "; ".join(
                f"{counts[f'invalid: {reason}']} {reason}" + (f" (first: {detail})" * bool(detail))
                for reason, detail in first.items()
            ),
        )
    names = dict.fromkeys(name for result in results for name in result.parts)
    return Scores(
        np.array([result.value for result in results], np.float32),
        np.array([result.valid for result in results], bool),
        {
            name: np.array([result.parts.get(name, np.nan) for result in results], np.float32)
            for name in names
        },
        tuple(result.reason for result in results),
        dict(counts),
    )


def guard(reward: Reward, requests: Sequence[Request]) -> list[Result]:
    """One checked result per request, whatever the reward does; see the module's table.

    Raises:
      RewardError: the reward returned another number of results.
      AaJaxError: raised by the reward itself.
    """
    if not requests:
        return []
    try:
        answers = list(reward(requests))
    except AaJaxError:
        raise
    except Exception as error:  # a reward is often somebody's own function: it may raise anything
        if len(requests) > 1:
            return [guard(reward, [request])[0] for request in requests]
        kind = type(error).__name__
        return [Result.invalid(f"exception {kind}", f"{kind}: {error}"[:500])]
    if len(answers) != len(requests):
        raise RewardError(
            f"{name_of(reward)} returned {len(answers)} results for {len(requests)} requests. A "
            "reward returns one result per request, in their order; give None to skip one."
        )
    return [_checked(answer) for answer in answers]


def _checked(answer: Any) -> Result:
    if answer is None:
        return Result.invalid("skipped")
    try:
        if not isinstance(answer, Result):
            if isinstance(answer, (str, bytes)):  # float("3") would hide a mistake
                raise TypeError
            answer = Result(float(answer))
        value = float(answer.value)
        parts = {str(name): float(part) for name, part in answer.parts.items()}
    except (TypeError, ValueError):
        return Result.invalid("not a number", f"{answer!r}"[:200])
    if not answer.valid:
        reason = answer.reason or "unknown reason"
        return dataclasses.replace(answer, value=0.0, valid=False, parts=parts, reason=reason)
    if not math.isfinite(value):
        return Result.invalid("not finite", f"the value is {value}", parts)
    return dataclasses.replace(answer, value=value, valid=True, parts=parts, reason=None)


def name_of(reward: Any) -> str:
    """A reward's name for messages."""
    return getattr(reward, "__name__", None) or type(reward).__name__


def overlaps(reward: Any) -> bool:
    """Whether a reward may be asked while responses are being written, see the module's text."""
    return bool(getattr(reward, "overlaps", False))


def close(reward: Any) -> None:
    """Ends the worker processes and connections of a reward that has any."""
    if callable(end := getattr(reward, "close", None)):
        end()


class Weighted:
    """A weighted sum: ``sum_i weight_i * value_i``; invalid if a part that counts is invalid.

    Parts are the unweighted values under their names, and the parts of those as "name/part". A
    reward of weight 0 is computed and reported (a monitor) but masks nothing.

    Args:
      rewards: name -> reward.
      weights: name -> weight; those left out have weight 1.

    Raises:
      ConfigError: no rewards, a weight that is not finite, or one for a reward that is not there.
    """

    def __init__(self, rewards: Mapping[str, Reward], weights: Mapping[str, Any] | None = None):
        unknown = sorted(set(weights or {}) - set(rewards))
        if unknown or not rewards:
            raise ConfigError(
                f"weights are given for {', '.join(unknown) or 'nothing'}, but the rewards are "
                f"{', '.join(rewards) or 'none'}. Name each reward, then its weight."
            )
        self.rewards = dict(rewards)
        self.weights = {name: float((weights or {}).get(name, 1.0)) for name in rewards}
        for name, weight in self.weights.items():
            if not math.isfinite(weight):
                raise ConfigError(f"the weight of reward {name!r} is {weight}; give a number.")

    @property
    def overlaps(self) -> bool:
        """Whether all parts do."""
        return all(overlaps(reward) for reward in self.rewards.values())

    def __call__(self, requests: Sequence[Request]) -> list[Result]:
        columns = {name: guard(reward, requests) for name, reward in self.rewards.items()}
        return [
            self._sum({name: column[i] for name, column in columns.items()})
            for i in range(len(requests))
        ]

    def _sum(self, found: Mapping[str, Result]) -> Result:
        parts: dict[str, float] = {}
        for name, result in found.items():
            if result.valid:
                parts[name] = result.value
            parts |= {f"{name}/{part}": value for part, value in result.parts.items()}
        for name, result in found.items():
            if not result.valid and self.weights[name]:
                return Result.invalid(f"{name}: {result.reason}", result.detail, parts)
        # A monitor's value may be missing; 0 * it would be wrong only in being NaN.
        total = sum(self.weights[name] * parts[name] for name in found if self.weights[name])
        return Result(float(total), True, parts)

    def close(self) -> None:
        """Closes every reward of the sum."""
        for reward in self.rewards.values():
            close(reward)


class Clipped:
    """A reward limited to [low, high]; the part "unclipped" keeps what it was.

    Raises:
      ConfigError: no limits, or low above high.
    """

    def __init__(
        self, reward: Reward, low: int | float | None = None, high: int | float | None = None
    ):
        if low is None and high is None:
            raise ConfigError("clipping needs low, high, or both.")
        if low is not None and high is not None and not low <= high:
            raise ConfigError(f"a reward cannot be clipped to [{low}, {high}]: low is above high.")
        self.reward = reward
        self.low = -math.inf if low is None else low
        self.high = math.inf if high is None else high

    @property
    def overlaps(self) -> bool:
        """Whether the reward does."""
        return overlaps(self.reward)

    def __call__(self, requests: Sequence[Request]) -> list[Result]:
        return [self._clip(result) for result in guard(self.reward, requests)]

    def _clip(self, result: Result) -> Result:
        if not result.valid:
            return result
        value = float(min(max(result.value, self.low), self.high))
        return dataclasses.replace(
            result, value=value, parts={**result.parts, "unclipped": result.value}
        )

    def close(self) -> None:
        """Closes the reward."""
        close(self.reward)
