"""Learning directly from preference pairs: DPO and its relatives.

A variant is a function of `Pairs` and its own options that returns one loss per pair; it joins by
an entry in `PREFERENCE_LOSSES`. Notation: Δ_w and Δ_l are the log-ratios
``log π(y|x) − log π_ref(y|x)`` of the chosen and the rejected response, Δ = Δ_w − Δ_l.

===================  ================================================================
file                 losses
===================  ================================================================
margin.py            of Δ alone: sigmoid (DPO, cDPO), sigmoid_norm, robust, ipo, hinge,
                     exo, dpop, discopop
pointwise.py         of Δ_w and Δ_l each: nca, bco, sppo, apo_zero, apo_down
transport.py         of sorted batches: aot, aot_unpaired
reference_free.py    without a reference: simpo, cpo, orpo
divergence.py        f-DPO: other divergences for the losses of margin.py
weighting.py         WPO weights for any of them
===================  ================================================================
"""

from aa_jax.losses.preference.divergence import DIVERGENCES, with_divergence
from aa_jax.losses.preference.loss import (
    ALIASES,
    PREFERENCE_LOSSES,
    REFERENCE_FREE,
    check_variant,
    find_variant,
    needs_reference,
    preference_loss,
)
from aa_jax.losses.preference.pairs import (
    Pairs,
    log_ratios,
    mean_log_ratios,
    mean_logps,
    pair_up,
)
from aa_jax.losses.preference.weighting import wpo_weights

__all__ = [
    "ALIASES",
    "DIVERGENCES",
    "PREFERENCE_LOSSES",
    "REFERENCE_FREE",
    "Pairs",
    "check_variant",
    "find_variant",
    "log_ratios",
    "mean_log_ratios",
    "mean_logps",
    "needs_reference",
    "pair_up",
    "preference_loss",
    "with_divergence",
    "wpo_weights",
]
