"""Rewards: what a response is worth, whether that can be known, and why.

`base` is the protocol; `evaluate` asks a reward about a batch and counts what fails; `build` makes
rewards as a config names them.
"""

from aa_jax.rewards.base import (
    Clipped,
    Request,
    Result,
    Reward,
    RewardError,
    Scores,
    Weighted,
    close,
    evaluate,
)
from aa_jax.rewards.code import CodeTests
from aa_jax.rewards.maths import Maths
from aa_jax.rewards.text import ExactMatch, Format, Length, Overlong, soft_overlong

__all__ = [
    "Clipped",
    "CodeTests",
    "ExactMatch",
    "Format",
    "Length",
    "Maths",
    "Overlong",
    "Request",
    "Result",
    "Reward",
    "RewardError",
    "Scores",
    "Weighted",
    "close",
    "evaluate",
    "soft_overlong",
]
