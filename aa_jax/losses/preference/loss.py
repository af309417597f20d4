"""`preference_loss`: any variant by name, with what may be added to each of them."""

import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from aa_jax.errors import ConfigError
from aa_jax.losses.base import Loss, Ratio, counted, ratio, total_loss
from aa_jax.losses.preference.divergence import DIVERGENCES, with_divergence
from aa_jax.losses.preference.margin import (
    discopop,
    dpop,
    exo,
    hinge,
    ipo,
    robust,
    sigmoid,
    sigmoid_norm,
)
from aa_jax.losses.preference.pairs import Pairs, log_ratios, mean_logps
from aa_jax.losses.preference.pointwise import apo_down, apo_zero, bco, bco_pair, nca, sppo
from aa_jax.losses.preference.reference_free import cpo, orpo, simpo
from aa_jax.losses.preference.transport import aot, aot_unpaired
from aa_jax.losses.reward import pair_metrics

Variant = Callable[..., Float[Array, "P"]]

# These read the policy's log-probs alone.
REFERENCE_FREE: dict[str, Variant] = {"simpo": simpo, "cpo": cpo, "orpo": orpo}

PREFERENCE_LOSSES: dict[str, Variant] = {
    "sigmoid": sigmoid,
    "sigmoid_norm": sigmoid_norm,
    "robust": robust,
    "ipo": ipo,
    "hinge": hinge,
    "exo": exo,
    "dpop": dpop,
    "discopop": discopop,
    "nca": nca,
    "bco": bco,
    "bco_pair": bco_pair,
    "sppo": sppo,
    "apo_zero": apo_zero,
    "apo_down": apo_down,
    "aot": aot,
    "aot_unpaired": aot_unpaired,
    **REFERENCE_FREE,
}

# Other names the same losses go by in TRL.
ALIASES = {"exo_pair": "exo", "nca_pair": "nca", "sppo_hard": "sppo"}

# Those that are functions of the reward difference, so that another divergence has a meaning.
OF_THE_MARGIN = (
    "sigmoid", "sigmoid_norm", "robust", "ipo", "hinge", "exo", "dpop", "discopop"
)  # fmt: skip

# Weight of the likelihood of the chosen that belongs to a loss as its paper states it.
SFT_COEF = {"cpo": 1.0, "orpo": 1.0}

# Their implicit reward is per token.
PER_TOKEN = ("simpo", "orpo")


def find_variant(variant: str) -> Variant:
    """A loss by name, or by the name TRL gives it.

    Raises:
      ConfigError: there is none; lists those there are.
    """
    name = ALIASES.get(variant, variant)
    if name not in PREFERENCE_LOSSES:
        raise ConfigError(
            f"There is no preference loss {variant!r}; choose one of {sorted(PREFERENCE_LOSSES)}."
        )
    return PREFERENCE_LOSSES[name]


def needs_reference(variant: str) -> bool:
    """Whether the loss compares with a reference."""
    find_variant(variant)
    return variant not in REFERENCE_FREE


def check_variant(
    variant: str, *, divergence: str = "reverse_kl", alpha: float = 0.5, **options: Any
) -> None:
    """Raises ConfigError, listing the choices, unless the variant exists and takes the options."""
    accepted = [*inspect.signature(find_variant(variant)).parameters][1:]
    for name in options:
        if name not in accepted:
            raise ConfigError(
                f"The preference loss {variant!r} takes no {name}, only {accepted}; drop it."
            )
    if "label_smoothing" in options:
        smoothing, zero_allowed = options["label_smoothing"], find_variant(variant) is not exo
        if not 0 <= smoothing < 0.5 or not (smoothing or zero_allowed):
            interval = "[0, 0.5)" if zero_allowed else "(0, 0.5)"
            raise ConfigError(
                "label_smoothing is the probability of a wrong label and must lie in "
                f"{interval}, got {smoothing}."
            )
    beta = options.get("beta")
    if beta is not None and beta <= 0:
        raise ConfigError(f"beta must be positive, got {beta}.")
    if divergence not in DIVERGENCES:
        raise ConfigError(f"There is no divergence {divergence!r}; choose one of {[*DIVERGENCES]}.")
    if divergence != "reverse_kl" and ALIASES.get(variant, variant) not in OF_THE_MARGIN:
        raise ConfigError(
            f"The preference loss {variant!r} has no form with divergence={divergence!r}; it "
            f"needs one of {sorted(OF_THE_MARGIN)}."
        )
    if divergence == "alpha" and not 0 < alpha <= 1:
        raise ConfigError(f"alpha of the alpha divergence must lie in (0, 1], got {alpha}.")


def preference_loss(
    pairs: Pairs,
    *,
    variant: str = "sigmoid",
    beta: float | None = None,
    sft_coef: float | None = None,
    divergence: str = "reverse_kl",
    alpha: float = 0.5,
    weights: Float[Array, "P"] | None = None,
    optimism: float = 0.0,
    explored: Float[Array, "P"] | None = None,
    **options: Any,
) -> Loss:
    r"""Mean of a variant over the pairs, plus what was asked for besides.

    The likelihood term ``sft_coef`` is the token mean ``-Σ log π(y_w) / Σ |y_w|`` (Pang et al.
    2024, arXiv:2404.19733, average per pair instead; TRL's ``sft`` term is this one).

    The optimistic term is that of SELM (Zhang et al. 2024, arXiv:2405.19332, and its code) for
    online DPO, ``+ α β E[log π(y) − log π_ref(y)]`` over responses y sampled from the reference,
    i.e. the last iterate: what it already says is made a little less likely, unless a preference
    speaks for it.

    Args:
      pairs: see `pair_up`.
      variant: key of `PREFERENCE_LOSSES`.
      beta: of the variant, which has its own default; also the scale of the implicit rewards in
        the metrics.
      sft_coef: weight of the likelihood term; None is 1 for ``cpo`` and ``orpo``, else 0.
      divergence: key of `DIVERGENCES`, for the losses of the margin (f-DPO).
      alpha: of the alpha divergence.
      weights: factor of each pair's loss, e.g. of `wpo_weights`; the mean stays over pairs.
      optimism: SELM's α, 0.001 there.
      explored: log π(y) − log π_ref(y) of the reference's samples; None takes the mean of both
        responses of the pair, which in online DPO are such samples.
      **options: the variant's other options.

    Returns:
      The loss, and per-pair metrics ``loss`` (a tuple with further terms), ``accuracy`` (ties
      count half; TRL counts them as wrong), ``margin``, ``chosen_rewards``, ``rejected_rewards``,
      ``chosen_logps``, ``rejected_logps``, and with further terms ``preference_loss``,
      ``sft_loss`` (per token), ``optimism`` (log-ratio per response).

    Raises:
      ConfigError: unknown variant or option, or a value out of range.
    """
    if beta is not None:
        options["beta"] = beta
    check_variant(variant, divergence=divergence, alpha=alpha, **options)
    function = find_variant(variant)
    beta = options.get("beta", inspect.signature(function).parameters["beta"].default)
    pairs = Pairs(*(counted(x, pairs.mask) for x in pairs[:-1]), pairs.mask)

    values = function(with_divergence(pairs, divergence, alpha), **options)
    if weights is not None:
        values = values * jax.lax.stop_gradient(counted(weights, pairs.mask))
    losses = ratio(values, pairs.mask)
    metrics = {"loss": losses}
    rewards = mean_logps(pairs) if variant in PER_TOKEN else log_ratios(pairs)
    metrics |= pair_metrics(*(beta * x for x in rewards), pairs.mask)
    metrics["chosen_logps"] = ratio(jax.lax.stop_gradient(pairs.chosen), pairs.mask)
    metrics["rejected_logps"] = ratio(jax.lax.stop_gradient(pairs.rejected), pairs.mask)

    terms = [losses]
    sft_coef = SFT_COEF.get(variant, 0.0) if sft_coef is None else sft_coef
    if sft_coef:
        count = ratio(pairs.chosen_length, pairs.mask).total
        nll = Ratio(-ratio(pairs.chosen, pairs.mask).total, count)
        metrics["sft_loss"] = nll
        terms.append(Ratio(sft_coef * nll.total, nll.count))
    if optimism:
        explored = sum(log_ratios(pairs)) / 2 if explored is None else explored
        metrics["optimism"] = ratio(jnp.asarray(explored), pairs.mask)
        scaled = optimism * beta * metrics["optimism"].total
        terms.append(Ratio(scaled, metrics["optimism"].count))
    if len(terms) > 1:
        metrics |= {"preference_loss": losses, "loss": tuple(terms)}
    return total_loss(metrics["loss"]), metrics
