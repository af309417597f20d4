"""Losses: arrays in, ``(loss, metrics)`` out; no model, no config, no mesh.

``metrics`` maps names to `Ratio` (a sum and its count), so that they add up over micro-batches,
devices and steps. ``metrics["loss"]`` is a Ratio, or a tuple of them when terms have different
denominators, and ``loss`` is the sum of their means.
"""

from aa_jax.losses.base import Loss, Metrics, Ratio, ratio, total_loss
from aa_jax.losses.logps import TokenLogps, response_logps, sequence_logps
from aa_jax.losses.preference import PREFERENCE_LOSSES, Pairs, preference_loss
from aa_jax.losses.reward import reward_loss
from aa_jax.losses.sft import sft_loss

__all__ = [
    "PREFERENCE_LOSSES",
    "Loss",
    "Metrics",
    "Pairs",
    "Ratio",
    "TokenLogps",
    "preference_loss",
    "ratio",
    "response_logps",
    "reward_loss",
    "sequence_logps",
    "sft_loss",
    "total_loss",
]
