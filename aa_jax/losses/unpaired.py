"""Learning from single responses that are marked good or bad: KTO and its relatives.

Notation: Δ is the log-ratio ``log π(y|x) − log π_ref(y|x)`` of a response.
"""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from aa_jax.errors import ConfigError
from aa_jax.losses.base import Loss, Ratio, counted, ratio, total_loss
from aa_jax.losses.stable import masked_mean


class Unpaired(NamedTuple):
    """N marked responses.

    Attributes:
      logps: log π of the response, summed over its tokens, in nats.
      ref_logps: log π_ref of it; no gradient flows through it.
      label: 1 desirable, 0 undesirable.
      mask: 0 on responses that only fill the batch.
    """

    logps: Float[Array, "N"]
    ref_logps: Float[Array, "N"]
    label: Float[Array, "N"]
    mask: Float[Array, "N"]


class RunningMean(NamedTuple):
    """Mean of everything seen so far, as a state that goes in and comes out.

    Attributes:
      mean: shape [].
      count: sum of the weights it was made of, shape [].
    """

    mean: Float[Array, ""] | float = 0.0
    count: Float[Array, ""] | float = 0.0

    def update(
        self, values: Float[Array, "*shape"], weights: Float[Array, "*shape"]
    ) -> "RunningMean":
        """The state with these values taken in; no gradient."""
        new = ratio(jax.lax.stop_gradient(values), weights)
        count = self.count + new.count
        step = (new.total - self.mean * new.count) / jnp.where(count == 0, 1, count)
        return RunningMean(self.mean + step, count)


def reference_kl(
    logps: Float[Array, "N"], ref_logps: Float[Array, "N"], mask: Float[Array, "N"]
) -> Float[Array, ""]:
    r"""KTO's estimate of KL(π || π_ref) (arXiv:2402.01306), without gradient.

    .. math:: \max\left(0, \frac1n \sum_i \log\frac{\pi(y_j|x_i)}{\pi_{ref}(y_j|x_i)}\right)

    on prompts with the response of *another* prompt of the batch or data set. Under accumulation
    it is the mean of the micro-batch, as in the paper; over devices it is the mean of all.
    """
    ratios = counted(logps, mask) - counted(ref_logps, mask)
    return jax.lax.stop_gradient(jax.nn.relu(masked_mean(ratios, mask)))


def kto(
    batch: Unpaired,
    *,
    beta: float = 0.1,
    kl: float | Float[Array, ""] = 0.0,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Float[Array, "N"]:
    r"""Kahneman-Tversky optimisation (Ethayarajh et al. 2024, arXiv:2402.01306, eq. 7).

    .. math:: \lambda_D\,(1 - \sigma(\beta(\Delta - z_0)))\;\text{desirable},\quad
      \lambda_U\,(1 - \sigma(\beta(z_0 - \Delta)))\;\text{undesirable}

    The same as TRL's ``kto``. align-anything subtracts the undesirable term, which raises bad
    responses, and keeps the KL of the last batch of an epoch only.

    Args:
      batch: the responses.
      beta: strength of the pull to the reference.
      kl: z_0, see `reference_kl`.
      desirable_weight: λ_D. The paper advises λ_D n_D / (λ_U n_U) in [1, 3/2].
      undesirable_weight: λ_U.
    """
    delta = batch.logps - batch.ref_logps - kl
    good = desirable_weight * jax.nn.sigmoid(-beta * delta)
    bad = undesirable_weight * jax.nn.sigmoid(beta * delta)
    return jnp.where(batch.label > 0.5, good, bad)


def apo_zero_unpaired(
    batch: Unpaired,
    *,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Float[Array, "N"]:
    r"""`kto` with z_0 = 0: APO-zero (arXiv:2408.06266, eq. 7) side by side, TRL's
    ``apo_zero_unpaired``."""
    return kto(
        batch,
        beta=beta,
        desirable_weight=desirable_weight,
        undesirable_weight=undesirable_weight,
    )


def bco_unpaired(
    batch: Unpaired, *, beta: float = 0.1, delta: float | Float[Array, ""] | None = None
) -> Float[Array, "N"]:
    r"""BCO (arXiv:2404.04656) on single responses, averaged over both kinds together.

    .. math:: -\log\sigma(r - \delta)\;\text{desirable},\quad
      -\log\sigma(\delta - r)\;\text{undesirable}, \quad r = \beta\Delta

    TRL's BCO trainer (1.13), except for its weights of prompts.

    Args:
      batch: the responses.
      beta: strength of the pull to the reference.
      delta: the reward shift; None is half the mean reward of desirable plus half that of
        undesirable responses of this batch (of the kind there is, if only one). TRL's is the mean
        over all responses so far: ``state.update(beta * Δ, mask).mean`` of a `RunningMean`.
    """
    rewards = beta * (batch.logps - batch.ref_logps)
    if delta is None:
        kinds = (batch.mask * (batch.label > 0.5), batch.mask * (batch.label <= 0.5))
        means = [masked_mean(rewards, kind) for kind in kinds]
        there = sum((kind.sum() > 0).astype(jnp.float32) for kind in kinds)
        delta = jax.lax.stop_gradient(sum(means) / jnp.maximum(there, 1))
    sign = jnp.where(batch.label > 0.5, 1.0, -1.0)
    return -jax.nn.log_sigmoid(sign * (rewards - delta))


UNPAIRED_LOSSES: dict[str, Callable[..., Float[Array, "N"]]] = {
    "kto": kto,
    "apo_zero_unpaired": apo_zero_unpaired,
    "bco": bco_unpaired,
}


def check_unpaired(variant: str, **options: Any) -> None:
    """Raises ConfigError, listing the choices, unless the variant exists and takes the options."""
    if variant not in UNPAIRED_LOSSES:
        raise ConfigError(
            f"There is no loss of unpaired responses {variant!r}; choose one of "
            f"{sorted(UNPAIRED_LOSSES)}."
        )
    accepted = [*inspect.signature(UNPAIRED_LOSSES[variant]).parameters][1:]
    for name in options:
        if name not in accepted:
            raise ConfigError(f"The loss {variant!r} takes no {name}, only {accepted}; drop it.")
    for name in ("beta", "desirable_weight", "undesirable_weight"):
        if options.get(name) is not None and options[name] <= 0:
            raise ConfigError(f"{name} must be positive, got {options[name]}.")


def needs_kl(variant: str) -> bool:
    """Whether the loss takes the KL estimate, i.e. needs mismatched responses."""
    check_unpaired(variant)
    return "kl" in inspect.signature(UNPAIRED_LOSSES[variant]).parameters


def unpaired_loss(
    batch: Unpaired, *, variant: str = "kto", beta: float = 0.1, **options: Any
) -> Loss:
    """Mean of a variant over desirable and undesirable responses together.

    Args:
      batch: the responses.
      variant: key of `UNPAIRED_LOSSES`.
      beta: of the variant; also the scale of the implicit rewards in the metrics.
      **options: the variant's other options, e.g. ``kl``.

    Returns:
      The loss, and per-response metrics ``loss``, ``chosen_rewards``, ``rejected_rewards`` (of
      desirable and undesirable responses), ``chosen_logps``, ``rejected_logps``, ``kl`` (if given)
      and ``accuracy``: how often the reward lies on the right side of β times the KL.

    Raises:
      ConfigError: unknown variant or option, or a value out of range.
    """
    check_unpaired(variant, beta=beta, **options)
    mask = batch.mask.astype(jnp.float32)
    label = counted(batch.label, mask)
    batch = Unpaired(
        counted(batch.logps, mask),
        jax.lax.stop_gradient(counted(batch.ref_logps, mask)),
        label,
        mask,
    )
    losses = ratio(UNPAIRED_LOSSES[variant](batch, beta=beta, **options), mask)
    good, bad = mask * (label > 0.5), mask * (label <= 0.5)
    logps = jax.lax.stop_gradient(batch.logps)
    rewards = beta * (logps - batch.ref_logps)
    shift = beta * jnp.asarray(options.get("kl", 0.0), jnp.float32)
    right = 0.5 * (1 + jnp.sign((rewards - shift) * jnp.where(label > 0.5, 1.0, -1.0)))
    metrics = {
        "loss": losses,
        "accuracy": ratio(right, mask),
        "chosen_rewards": ratio(rewards, good),
        "rejected_rewards": ratio(rewards, bad),
        "chosen_logps": ratio(logps, good),
        "rejected_logps": ratio(logps, bad),
    }
    if "kl" in options:
        metrics["kl"] = Ratio(jnp.asarray(options["kl"], jnp.float32), jnp.float32(1))
    return total_loss(losses), metrics
