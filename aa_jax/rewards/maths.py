"""Mathematical answers, compared by what they mean: math-verify in worker processes."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path

from aa_jax.errors import ConfigError
from aa_jax.rewards.base import Request, Result
from aa_jax.rewards.text import answer_of, check_where
from aa_jax.rewards.workers import Died, Pool

log = logging.getLogger(__name__)

SCRIPT = Path(__file__).with_name("maths_worker.py")


class Maths:
    """1 if the answer is mathematically equal to the gold answer, else 0.

    The reference is the gold answer: LaTeX with or without delimiters, a number, or a text that
    ends in ``#### <answer>`` as in GSM8K. If it cannot be understood the sample is invalid; words
    are not understood (`aa_jax.rewards.ExactMatch` compares them). An answer that cannot be
    understood, is several answers, takes too long or crashes its worker is wrong.

    Args:
      where: which part of the response is the answer: "answer" (inside ``<answer>``) or "text".
      seconds: per comparison; loaded machines need a generous value.
      workers: processes; None: one per core but one, at most 8.
      most_characters: longer answers are wrong without being read.

    Raises:
      ConfigError: `where` or `seconds` makes no sense.
      RewardError: math-verify is not installed (when first asked).
    """

    overlaps = True

    def __init__(
        self,
        *,
        where: str = "answer",
        seconds: int | float = 15.0,
        workers: int | None = None,
        most_characters: int = 2000,
    ):
        check_where(where)
        if seconds <= 0:
            raise ConfigError(f"seconds={seconds}: a comparison needs some time.")
        self.where, self.most_characters = where, most_characters
        workers = workers or min(8, max(1, (os.cpu_count() or 2) - 1))
        self._pool = Pool(SCRIPT, workers=workers, seconds=float(seconds))

    def __call__(self, requests: Sequence[Request]) -> list[Result]:
        results: list[Result | None] = []
        tasks = []
        for request in requests:
            task = self._task(request)
            results.append(task if isinstance(task, Result) else None)
            if not isinstance(task, Result):
                tasks.append(task)
        # Samples of one prompt often agree: each different question is asked once.
        unique = list(dict.fromkeys(tasks))
        said = self._pool.map([{"gold": gold, "answer": answer} for gold, answer in unique])
        found = dict(zip(unique, map(_result, said), strict=True))
        answers = iter(tasks)
        return [found[next(answers)] if result is None else result for result in results]

    def _task(self, request: Request) -> tuple[str, str] | Result:
        gold = "" if request.reference is None else str(request.reference)
        gold = gold.rpartition("####")[2].strip()
        if not gold:
            return Result.invalid("no reference", f"the reference is {request.reference!r}")
        answer = answer_of(request.response, self.where) or ""
        if len(answer) > self.most_characters:
            answer = ""
        return gold, answer  # asked even without an answer: an unreadable gold must be found

    def close(self) -> None:
        """Ends the worker processes."""
        self._pool.close()


def _result(said: str | Died) -> Result:
    if isinstance(said, Died):
        if said.progress != "gold":
            return Result.invalid("unreadable gold", f"while the gold was read: {said}")
        return Result(0.0, parts={"stopped": 1.0}, detail=str(said))
    if said == "no gold":
        return Result.invalid("unreadable gold", "math-verify finds no expression in it")
    return Result(float(said == "right"), parts={"stopped": 0.0}, detail=said)
