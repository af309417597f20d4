"""Where a model meets a loss: ``objective(params, batch, **roles) -> (loss, metrics)``.

A builder takes a `aa_jax.models.functional.Model` and the loss's options and returns a pure
function for the step builder. Roles are further parameter trees, frozen during the step.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from aa_jax import losses
from aa_jax.errors import DataError
from aa_jax.losses.preference import check_variant, pair_up
from aa_jax.models import heads
from aa_jax.models.functional import Batch, Model, Params

Objective = Callable[..., losses.Loss]


def sft(
    model: Model, *, z_loss: float = 0.0, entropy: bool = False, chunk: int | None = None
) -> Objective:
    """Supervised fine-tuning, and feedback modelling: the same on other responses.

    Args:
      model: the model.
      z_loss: weight of the squared log-partition sum.
      entropy: also report the mean entropy per token.
      chunk: tokens per block of logits, see `aa_jax.kernels.linear_logprob`.

    Returns:
      ``objective(params, batch)``; see `aa_jax.losses.sft_loss` for the metrics.
    """

    def objective(params: Params, batch: Batch) -> losses.Loss:
        tokens = token_logps(model, params, batch, need_entropy=entropy, chunk=chunk)
        sequence_mask = jnp.asarray(batch["sequence_mask"])
        loss, metrics = losses.sft_loss(
            tokens.logps, tokens.mask, sequence_mask, lse=tokens.lse, z_loss=z_loss
        )
        return loss, metrics | _entropy(tokens, sequence_mask)

    return objective


def dpo(
    model: Model,
    *,
    beta: float = 0.1,
    variant: str = "sigmoid",
    label_smoothing: float = 0.0,
    sft_coef: float = 0.0,
    entropy: bool = False,
    chunk: int | None = None,
) -> Objective:
    """Direct preference optimisation and its relatives.

    The batch holds chosen and rejected behind one prompt (S = 2) or in consecutive rows (S = 1).
    The reference's log-probabilities are ``batch["ref_logps"]`` [B, S], computed once with
    `compute_ref_logps`; without them they are computed in the step from the role ``reference``.

    Args:
      model: the model, of policy and reference.
      beta: see `aa_jax.losses.preference`.
      variant: key of `aa_jax.losses.PREFERENCE_LOSSES`.
      label_smoothing: probability that a label is wrong, for variants that take it.
      sft_coef: weight of the likelihood of the chosen responses.
      entropy: also report the mean entropy per response token.
      chunk: tokens per block of logits, see `aa_jax.kernels.linear_logprob`.

    Returns:
      ``objective(params, batch, reference=None)``; see `aa_jax.losses.preference_loss` for the
      metrics.

    Raises:
      ConfigError: unknown variant, or an option out of range or not the variant's.
    """
    options = {"label_smoothing": label_smoothing} if label_smoothing else {}
    check_variant(variant, beta=beta, **options)
    reference_logps = compute_ref_logps(model, chunk=chunk)

    def objective(params: Params, batch: Batch, reference: Params | None = None) -> losses.Loss:
        if "ref_logps" in batch:
            ref_logps = jnp.asarray(batch["ref_logps"])
        elif reference is not None:
            ref_logps = reference_logps(reference, batch)
        else:
            raise DataError(
                "DPO compares with a reference: put its log-probabilities into the batch as "
                "'ref_logps' (objectives.compute_ref_logps) or give the step reference=<params>."
            )
        tokens = token_logps(model, params, batch, need_entropy=entropy, chunk=chunk)
        logps, lengths = losses.sequence_logps(tokens.logps, tokens.mask)
        sequence_mask = jnp.asarray(batch["sequence_mask"])
        loss, metrics = losses.preference_loss(
            pair_up(logps, ref_logps, lengths, sequence_mask),
            variant=variant,
            beta=beta,
            sft_coef=sft_coef,
            **options,
        )
        return loss, metrics | _entropy(tokens, sequence_mask)

    return objective


def reward(model: Model, *, regularization: float = 0.0, centering: float = 0.0) -> Objective:
    """Reward modelling; parameters are a score model's, {"model": ..., "score_head": ...}.

    The batch is one of preferences, as for `dpo`, and may hold "margin", one per pair.

    Args:
      model: the backbone.
      regularization: weight of the mean squared reward.
      centering: weight of the squared sum of a pair's rewards.

    Returns:
      ``objective(params, batch)``; see `aa_jax.losses.reward_loss` for the metrics.
    """

    def objective(params: Params, batch: Batch) -> losses.Loss:
        scores = heads.score(model, params, batch)
        sequence_mask = jnp.asarray(batch["sequence_mask"])
        zeros = jnp.zeros_like(scores)
        pairs = pair_up(scores, zeros, zeros, sequence_mask)
        margin = None
        if "margin" in batch:
            # One per pair, or the same on both of its sequences.
            margin = jnp.asarray(batch["margin"]).reshape(pairs.mask.shape[0], -1)[:, 0]
        return losses.reward_loss(
            pairs.chosen,
            pairs.rejected,
            pairs.mask,
            margin=margin,
            regularization=regularization,
            centering=centering,
        )

    return objective


def compute_ref_logps(
    model: Model, *, chunk: int | None = None
) -> Callable[[Params, Batch], Float[Array, "B S"]]:
    """``fn(params, batch) -> [B, S]``: the log-probability of each response, without gradients."""

    def compute(params: Params, batch: Batch) -> Float[Array, "B S"]:
        tokens = token_logps(model, params, batch, chunk=chunk)
        return jax.lax.stop_gradient(losses.sequence_logps(tokens.logps, tokens.mask)[0])

    return compute


def token_logps(
    model: Model,
    params: Params,
    batch: Batch,
    features: Float[Array, "B F D"] | None = None,
    **options: Any,
) -> losses.TokenLogps:
    """Log-probabilities of the batch's responses.

    Args:
      model: the model.
      params: its parameters.
      batch: with target_positions, targets and loss_mask [B, S, R].
      features: encoded media, to share them between calls.
      **options: see `aa_jax.losses.response_logps`.
    """
    hidden = model.hidden_states(params, batch, features)
    arrays = (jnp.asarray(batch[key]) for key in ("target_positions", "targets", "loss_mask"))
    return losses.response_logps(hidden, model.head(params), *arrays, **options)


def _entropy(tokens: losses.TokenLogps, sequence_mask: Float[Array, "B S"]) -> losses.Metrics:
    if tokens.entropy is None:
        return {}
    entropy = jax.lax.stop_gradient(tokens.entropy)
    return {"entropy": losses.ratio(entropy, tokens.mask * sequence_mask[..., None])}
