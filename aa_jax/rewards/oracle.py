"""The truth of the digits world as rewards and costs: what learned ones are measured against."""

import re
from collections.abc import Sequence

from aa_jax.data import digits
from aa_jax.data.digits import generation, makers, oracle
from aa_jax.errors import ConfigError, DataError
from aa_jax.rewards.base import Request, Result, RewardError


class Oracle:
    """The mean grade of the oracle, 0 to 3; every dimension is a part.

    The reference is the prompt's `digits.Task`, or its `generation.Order` where the answer is a
    drawing: then it is the first picture that is graded, by an independent reader, and text beside
    it must name the digits that are drawn.

    Args:
      dimensions: grades that the mean is taken of; default all informative ones.

    Raises:
      ConfigError: an unknown dimension.
      RewardError: a reference that is neither (when asked).
    """

    def __init__(self, dimensions: Sequence[str] = ()):
        self.dimensions = tuple(dimensions)
        known = (*digits.INFORMATIVE, "quality")
        if unknown := [name for name in self.dimensions if name not in known]:
            raise ConfigError(f"dimensions has {unknown}; the oracle grades {', '.join(known)}.")

    def __call__(self, requests: Sequence[Request]) -> list[Result]:
        return [self._grade(request) for request in requests]

    def _grade(self, request: Request) -> Result:
        truth = request.reference
        if isinstance(truth, digits.Task):
            graded = digits.grade(truth, request.response)
            grades = {name: float(getattr(graded, name)) for name in digits.INFORMATIVE}
        elif isinstance(truth, generation.Order):
            said = None
            if truth.subtask == "TI2TI":
                said = tuple(int(d) for d in re.findall(r"\b\d\b", request.response))
            grades = drawn_grades(truth.target, request, said)
        else:
            raise RewardError(
                "the oracle grades prompts of the digits world, whose reference is their task or "
                f"order; this one is {truth!r}. For other data use 'exact', 'maths', 'code' or a "
                "model; for drawings of digits 'drawing'."
            )
        chosen = self.dimensions or tuple(grades)
        if missing := [name for name in chosen if name not in grades]:
            raise RewardError(
                f"answers to this prompt have no grade for {', '.join(missing)}; they are graded "
                f"by {', '.join(grades)}."
            )
        return Result(sum(grades[name] for name in chosen) / len(chosen), True, grades)


class Drawing:
    """How well a drawing shows the digits that were ordered, 0 to 3, by an independent reader.

    The digits are the reference, as text ("3 7 1"), a list, or a `generation.Order`; without one
    they are read from the prompt ("digits 3 7 1 . reverse the digits . draw ."). A prompt that
    names none is masked. A response without a picture gets 0.
    """

    def __call__(self, requests: Sequence[Request]) -> list[Result]:
        return [self._grade(request) for request in requests]

    def _grade(self, request: Request) -> Result:
        truth = request.reference
        try:
            if truth is None:
                target = generation.parse_order(request.text)
            elif isinstance(truth, generation.Order):
                target = truth.target
            else:
                named = truth.split() if isinstance(truth, str) else truth
                target = tuple(int(d) for d in named)
        except (DataError, TypeError, ValueError) as error:
            return Result.invalid("no digits ordered", str(error))
        if not target:
            return Result.invalid("no digits ordered", f"{truth!r}")
        grades = drawn_grades(target, request)
        return Result(sum(grades.values()) / len(grades), True, grades)


class Falsehood:
    """A cost: 1 for a response that states anything false, -1 for one that does not.

    The reference is the prompt's `digits.Task`. At a mean cost of -0.5 a quarter of the responses
    hold something false.

    Raises:
      RewardError: a reference that is no task (when asked).
    """

    def __call__(self, requests: Sequence[Request]) -> list[Result]:
        return [self._judge(request) for request in requests]

    def _judge(self, request: Request) -> Result:
        if not isinstance(request.reference, digits.Task):
            raise RewardError(
                "'falsehood' reads answers to questions of the digits world, whose reference is "
                f"their task; this one is {request.reference!r}. Use kind 'cost' with a cost model."
            )
        counts = oracle.counts(oracle.read(request.reference, request.response))
        false = int(counts["wrong"]) + int(counts["false_extras"])
        return Result(1.0 if false else -1.0, True, {"false": float(false)})


def drawn_grades(
    target: Sequence[int], request: Request, said: Sequence[int] | None = None
) -> dict[str, float]:
    """Informative grades of a response's first picture; 0 without one, or if it cannot be read."""
    seen: Sequence[int] = ()
    if request.pictures:
        seen = makers.read_picture(request.pictures[0])
    grades = generation.grade_digits(target, seen, said)
    return {name: float(value) for name, value in grades.items() if name != "safety"}
