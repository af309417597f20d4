"""Learning directly from preference pairs: DPO and its relatives.

A variant is a function of `Pairs` and its own options that returns one loss per pair; it joins by
an entry in `PREFERENCE_LOSSES`. Notation: Δ_w and Δ_l are the log-ratios
``log π(y|x) − log π_ref(y|x)`` of the chosen and the rejected response, Δ = Δ_w − Δ_l.
"""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from aa_jax.errors import ConfigError, DataError
from aa_jax.losses.base import Loss, Ratio, counted, ratio, total_loss
from aa_jax.losses.reward import pair_metrics


class Pairs(NamedTuple):
    """P preference pairs.

    Attributes:
      chosen: log π of the preferred response, summed over its tokens, in nats.
      rejected: log π of the other response.
      ref_chosen: log π_ref of the preferred response; no gradient flows through it.
      ref_rejected: log π_ref of the other response.
      chosen_length: number of tokens of the preferred response.
      rejected_length: number of tokens of the other.
      mask: 0 on pairs that only fill the batch.
    """

    chosen: Float[Array, "P"]
    rejected: Float[Array, "P"]
    ref_chosen: Float[Array, "P"]
    ref_rejected: Float[Array, "P"]
    chosen_length: Float[Array, "P"]
    rejected_length: Float[Array, "P"]
    mask: Float[Array, "P"]


def pair_up(
    logps: Float[Array, "B S"],
    ref_logps: Float[Array, "B S"],
    lengths: Float[Array, "B S"],
    sequence_mask: Float[Array, "B S"],
) -> Pairs:
    """Sequences in the order chosen, rejected, chosen, ... as pairs.

    Rows that share a prompt hold both (S = 2); otherwise two consecutive rows do (S = 1).

    Raises:
      DataError: the number of sequences is odd.
    """
    if logps.size % 2:
        raise DataError(
            f"A preference batch holds chosen and rejected in turn, but this one has {logps.size} "
            "sequences; collate it with the layout 'preference' or 'preference_rows'."
        )
    logps, ref, lengths, mask = (
        x.astype(jnp.float32).reshape(-1, 2) for x in (logps, ref_logps, lengths, sequence_mask)
    )
    ref = jax.lax.stop_gradient(ref)
    return Pairs(
        *(logps[:, 0], logps[:, 1], ref[:, 0], ref[:, 1]),
        *(lengths[:, 0], lengths[:, 1], mask[:, 0] * mask[:, 1]),
    )


def log_ratios(pairs: Pairs) -> tuple[Float[Array, "P"], Float[Array, "P"]]:
    """(Δ_w, Δ_l)."""
    return pairs.chosen - pairs.ref_chosen, pairs.rejected - pairs.ref_rejected


def mean_log_ratios(pairs: Pairs) -> tuple[Float[Array, "P"], Float[Array, "P"]]:
    """(Δ_w / length, Δ_l / length): log-ratios per token."""
    chosen, rejected = log_ratios(pairs)
    return (
        chosen / jnp.maximum(pairs.chosen_length, 1),
        rejected / jnp.maximum(pairs.rejected_length, 1),
    )


def sigmoid(pairs: Pairs, *, beta: float = 0.1, label_smoothing: float = 0.0) -> Float[Array, "P"]:
    r"""DPO (Rafailov et al. 2023, eq. 7), with cDPO's label noise (Mitchell 2023).

    .. math:: -(1-\varepsilon)\log\sigma(\beta\Delta) - \varepsilon\log\sigma(-\beta\Delta)

    TRL's ``sigmoid`` takes no smoothing since 1.x; align-anything leaves out the first response
    token and shifts the span by the template's suffix.

    Args:
      pairs: the pairs.
      beta: strength of the pull to the reference.
      label_smoothing: ε, probability that a label is wrong, in [0, 0.5).
    """
    chosen, rejected = log_ratios(pairs)
    return _smoothed(beta * (chosen - rejected), label_smoothing)


def sigmoid_norm(
    pairs: Pairs, *, beta: float = 0.1, label_smoothing: float = 0.0
) -> Float[Array, "P"]:
    r"""Length-normalised DPO: log-ratios per token (Tülu 3, arXiv:2411.15124, §5).

    .. math:: -\log\sigma\left(\beta\,(\Delta_w / |y_w| - \Delta_l / |y_l|)\right)

    The same as TRL's ``sigmoid_norm``.
    """
    chosen, rejected = mean_log_ratios(pairs)
    return _smoothed(beta * (chosen - rejected), label_smoothing)


def robust(pairs: Pairs, *, beta: float = 0.1, label_smoothing: float = 0.0) -> Float[Array, "P"]:
    r"""Robust DPO (arXiv:2403.00409): unbiased when labels are flipped at rate ε.

    .. math:: \frac{-(1-\varepsilon)\log\sigma(\beta\Delta) + \varepsilon\log\sigma(-\beta\Delta)}
      {1 - 2\varepsilon}

    The same as TRL's ``robust``.
    """
    chosen, rejected = log_ratios(pairs)
    logits = beta * (chosen - rejected)
    clean, flipped = -jax.nn.log_sigmoid(logits), -jax.nn.log_sigmoid(-logits)
    return ((1 - label_smoothing) * clean - label_smoothing * flipped) / (1 - 2 * label_smoothing)


def ipo(pairs: Pairs, *, beta: float = 0.1) -> Float[Array, "P"]:
    r"""IPO (Azar et al. 2023, arXiv:2310.12036, eq. 17), on log-ratios per token.

    .. math:: \left(\Delta_w / |y_w| - \Delta_l / |y_l| - \frac{1}{2\beta}\right)^2

    β is the paper's τ. The division by lengths is TRL's, confirmed there by the authors; OpenRLHF
    uses sums.
    """
    chosen, rejected = mean_log_ratios(pairs)
    return (chosen - rejected - 1 / (2 * beta)) ** 2


def hinge(pairs: Pairs, *, beta: float = 0.1) -> Float[Array, "P"]:
    r"""Hinge (SLiC, arXiv:2305.10425; on log-ratios in RSO, arXiv:2309.06657).

    .. math:: \max(0,\; 1 - \beta\Delta)

    The same as TRL's ``hinge``.
    """
    chosen, rejected = log_ratios(pairs)
    return jax.nn.relu(1 - beta * (chosen - rejected))


PREFERENCE_LOSSES: dict[str, Callable[..., Float[Array, "P"]]] = {
    "sigmoid": sigmoid,
    "sigmoid_norm": sigmoid_norm,
    "robust": robust,
    "ipo": ipo,
    "hinge": hinge,
}


def check_variant(variant: str, **options: Any) -> None:
    """Raises ConfigError, listing the choices, unless the variant exists and takes the options."""
    if variant not in PREFERENCE_LOSSES:
        raise ConfigError(
            f"There is no preference loss {variant!r}; choose one of {sorted(PREFERENCE_LOSSES)}."
        )
    accepted = [*inspect.signature(PREFERENCE_LOSSES[variant]).parameters][1:]
    for name in options:
        if name not in accepted:
            raise ConfigError(
                f"The preference loss {variant!r} takes no {name}, only {accepted}; drop it."
            )
    smoothing = options.get("label_smoothing", 0.0)
    if not 0 <= smoothing < 0.5:
        raise ConfigError(
            f"label_smoothing is the probability of a wrong label and must lie in [0, 0.5), got "
            f"{smoothing}."
        )
    if options.get("beta", 1.0) <= 0:
        raise ConfigError(f"beta must be positive, got {options['beta']}.")


def preference_loss(
    pairs: Pairs,
    *,
    variant: str = "sigmoid",
    beta: float = 0.1,
    sft_coef: float = 0.0,
    **options: float,
) -> Loss:
    r"""Mean of a variant over the pairs, plus ``sft_coef`` times the likelihood of the chosen.

    The likelihood term is the token mean ``-Σ log π(y_w) / Σ |y_w|`` (Pang et al. 2024,
    arXiv:2404.19733, average per pair instead; TRL's ``sft`` term is this one).

    Args:
      pairs: see `pair_up`.
      variant: key of `PREFERENCE_LOSSES`.
      beta: of the variant; also the scale of the implicit rewards β·Δ in the metrics.
      sft_coef: weight of the likelihood term.
      **options: the variant's other options.

    Returns:
      The loss, and per-pair metrics ``loss`` (two terms with ``sft_coef``), ``accuracy`` (ties
      count half; TRL counts them as wrong), ``margin``, ``chosen_rewards``, ``rejected_rewards``,
      ``chosen_logps``, ``rejected_logps``, and with ``sft_coef`` ``preference_loss`` and
      ``sft_loss`` (per token).

    Raises:
      ConfigError: unknown variant or option, or a value out of range.
    """
    check_variant(variant, beta=beta, **options)
    pairs = Pairs(*(counted(x, pairs.mask) for x in pairs[:-1]), pairs.mask)
    losses = ratio(PREFERENCE_LOSSES[variant](pairs, beta=beta, **options), pairs.mask)
    chosen, rejected = log_ratios(pairs)
    metrics = {"loss": losses}
    metrics |= pair_metrics(beta * chosen, beta * rejected, pairs.mask)
    metrics["chosen_logps"] = ratio(jax.lax.stop_gradient(pairs.chosen), pairs.mask)
    metrics["rejected_logps"] = ratio(jax.lax.stop_gradient(pairs.rejected), pairs.mask)
    if sft_coef:
        count = ratio(pairs.chosen_length, pairs.mask).total
        nll = Ratio(-ratio(pairs.chosen, pairs.mask).total, count)
        metrics |= {"preference_loss": losses, "sft_loss": nll}
        metrics["loss"] = (losses, Ratio(sft_coef * nll.total, nll.count))
    return total_loss(metrics["loss"]), metrics


def _smoothed(logits: Float[Array, "P"], epsilon: float) -> Float[Array, "P"]:
    right, wrong = -jax.nn.log_sigmoid(logits), -jax.nn.log_sigmoid(-logits)
    return (1 - epsilon) * right + epsilon * wrong if epsilon else right
