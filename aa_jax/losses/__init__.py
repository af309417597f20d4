"""Losses: arrays in, ``(loss, metrics)`` out; no model, no config, no mesh.

``metrics`` maps names to `Ratio` (a sum and its count), so that they add up over micro-batches,
devices and steps. ``metrics["loss"]`` is a Ratio, or a tuple of them when terms have different
denominators, and ``loss`` is the sum of their means.
"""

from aa_jax.losses.advantages import (
    bilevel_gae,
    gae,
    kl_estimate,
    shaped_rewards,
    whiten,
)
from aa_jax.losses.base import Loss, Metrics, Ratio, mix, ratio, total_loss
from aa_jax.losses.controllers import adaptive_kl, fixed_kl
from aa_jax.losses.cost import cost_loss
from aa_jax.losses.diffusion import diffusion_preference_loss, diffusion_sft_loss
from aa_jax.losses.groups import group_advantages, leave_one_out, reinforce_plus_plus
from aa_jax.losses.judgments import cut_loss, d2o_loss
from aa_jax.losses.logps import TokenLogps, response_logps, sequence_logps
from aa_jax.losses.ordinal import ordered_thresholds, ordinal_loss
from aa_jax.losses.policy import POLICY_LOSSES, policy_loss, value_loss
from aa_jax.losses.preference import (
    PREFERENCE_LOSSES,
    Pairs,
    needs_reference,
    pair_up,
    preference_loss,
    wpo_weights,
)
from aa_jax.losses.reward import reward_loss
from aa_jax.losses.sft import sft_loss
from aa_jax.losses.unpaired import UNPAIRED_LOSSES, Unpaired, reference_kl, unpaired_loss

__all__ = [
    "POLICY_LOSSES",
    "PREFERENCE_LOSSES",
    "UNPAIRED_LOSSES",
    "Loss",
    "Metrics",
    "Pairs",
    "Ratio",
    "TokenLogps",
    "Unpaired",
    "adaptive_kl",
    "bilevel_gae",
    "cost_loss",
    "cut_loss",
    "d2o_loss",
    "diffusion_preference_loss",
    "diffusion_sft_loss",
    "fixed_kl",
    "gae",
    "group_advantages",
    "kl_estimate",
    "leave_one_out",
    "mix",
    "needs_reference",
    "ordered_thresholds",
    "ordinal_loss",
    "pair_up",
    "policy_loss",
    "preference_loss",
    "ratio",
    "reference_kl",
    "reinforce_plus_plus",
    "response_logps",
    "reward_loss",
    "sequence_logps",
    "sft_loss",
    "shaped_rewards",
    "total_loss",
    "unpaired_loss",
    "value_loss",
    "whiten",
    "wpo_weights",
]
