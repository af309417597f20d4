"""The truth of the digits world as a reward: what a learned reward is measured against."""

from collections.abc import Sequence

from aa_jax.data import digits
from aa_jax.rewards.base import Request, Result, RewardError


class Oracle:
    """The mean grade of the oracle, 0 to 3; the reference is the prompt's `digits.Task`.

    Raises:
      RewardError: a reference that is no task (when asked).
    """

    def __call__(self, requests: Sequence[Request]) -> list[Result]:
        return [self._grade(request) for request in requests]

    def _grade(self, request: Request) -> Result:
        if not isinstance(request.reference, digits.Task):
            raise RewardError(
                "the oracle grades prompts of the digits world, whose reference is their task; "
                f"this one is {request.reference!r}. For other data use 'exact', 'maths', 'code' "
                "or a model."
            )
        return Result(float(digits.overall(request.reference, request.response)))
