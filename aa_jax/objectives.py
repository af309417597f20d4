"""Where a model meets a loss: ``objective(params, batch, **roles) -> (loss, metrics)``.

A builder takes a `aa_jax.models.functional.Model` and the loss's options and returns a pure
function for the step builder. Roles are further parameter trees, frozen during the step.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from aa_jax import losses
from aa_jax.errors import ConfigError, DataError
from aa_jax.losses.preference import check_variant
from aa_jax.losses.unpaired import check_unpaired, needs_kl
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


def preference(
    model: Model,
    *,
    variant: str = "sigmoid",
    beta: float | None = None,
    sft_coef: float | None = None,
    weighting: str | None = None,
    entropy: bool = False,
    chunk: int | None = None,
    **options: Any,
) -> Objective:
    """Direct preference optimisation and its relatives, with and without a reference.

    The batch holds chosen and rejected behind one prompt (S = 2) or in consecutive rows (S = 1).
    The reference's log-probabilities are ``batch["ref_logps"]`` [B, S], computed once with
    `compute_ref_logps`; without them they are computed in the step from the role ``reference``.
    Reference-free losses (`aa_jax.losses.preference.REFERENCE_FREE`) want neither.

    Args:
      model: the model, of policy and reference.
      variant: key of `aa_jax.losses.PREFERENCE_LOSSES`.
      beta: see the variant; None is its default.
      sft_coef: weight of the likelihood of the chosen responses; None is what belongs to the
        variant.
      weighting: "wpo" weights pairs by how likely the policy is to produce them.
      entropy: also report the mean entropy per response token.
      chunk: tokens per block of logits, see `aa_jax.kernels.linear_logprob`.
      **options: the variant's other options (label_smoothing, gamma, ...), and divergence, alpha
        and optimism of `aa_jax.losses.preference_loss`.

    Returns:
      ``objective(params, batch, reference=None)``; see `aa_jax.losses.preference_loss` for the
      metrics.

    Raises:
      ConfigError: unknown variant, or an option out of range or not the variant's.
    """
    given = {name: value for name, value in options.items() if name != "optimism"}
    check_variant(variant, beta=beta, **given)
    if weighting not in (None, "wpo"):
        raise ConfigError(f"There is no weighting {weighting!r}; there is 'wpo', or None.")
    compare = losses.needs_reference(variant)
    reference_logps = compute_ref_logps(model, chunk=chunk)

    def objective(params: Params, batch: Batch, reference: Params | None = None) -> losses.Loss:
        ref_logps = None
        if compare and "ref_logps" in batch:
            ref_logps = jnp.asarray(batch["ref_logps"])
        elif compare and reference is not None:
            ref_logps = reference_logps(reference, batch)
        elif compare:
            raise DataError(
                f"The preference loss {variant!r} compares with a reference: put its "
                "log-probabilities into the batch as 'ref_logps' (objectives.compute_ref_logps) or "
                "give the step reference=<params>."
            )
        tokens, squares = response_tokens(
            model, params, batch, squares=weighting == "wpo", need_entropy=entropy, chunk=chunk
        )
        logps, lengths = losses.sequence_logps(tokens.logps, tokens.mask)
        sequence_mask = jnp.asarray(batch["sequence_mask"])
        weights = None
        if squares is not None:
            weights = losses.wpo_weights(tokens.logps, squares, tokens.mask)
            weights = weights.reshape(-1, 2).prod(-1)
        loss, metrics = losses.preference_loss(
            losses.pair_up(logps, ref_logps, lengths, sequence_mask),
            variant=variant,
            beta=beta,
            sft_coef=sft_coef,
            weights=weights,
            **options,
        )
        return loss, metrics | _entropy(tokens, sequence_mask)

    return objective


dpo = preference


def kto(
    model: Model,
    *,
    variant: str = "kto",
    beta: float = 0.1,
    entropy: bool = False,
    chunk: int | None = None,
    **options: Any,
) -> Objective:
    """Learning from responses marked good or bad: KTO and its relatives.

    The batch holds one response per row and ``label`` [B] (1 desirable, 0 undesirable). For the KL
    estimate of KTO it holds under ``mismatched`` a second batch: the same prompts, each with the
    response of another example. Reference log-probs are ``ref_logps`` [B, 1] of either batch, or
    come from the role ``reference``. No gradient flows through the mismatched rows.

    Args:
      model: the model, of policy and reference.
      variant: key of `aa_jax.losses.UNPAIRED_LOSSES`.
      beta: strength of the pull to the reference.
      entropy: also report the mean entropy per response token.
      chunk: tokens per block of logits, see `aa_jax.kernels.linear_logprob`.
      **options: the variant's other options, e.g. desirable_weight.

    Returns:
      ``objective(params, batch, reference=None)``; see `aa_jax.losses.unpaired_loss` for the
      metrics.

    Raises:
      ConfigError: unknown variant, or an option out of range or not the variant's.
    """
    check_unpaired(variant, beta=beta, **options)
    with_kl = needs_kl(variant)
    reference_logps = compute_ref_logps(model, chunk=chunk)

    def reference_of(batch: Batch, reference: Params | None) -> Float[Array, "B S"]:
        if "ref_logps" in batch:
            return jnp.asarray(batch["ref_logps"])
        if reference is None:
            raise DataError(
                f"The loss {variant!r} compares with a reference: put its log-probabilities into "
                "the batch (and into its 'mismatched' part) as 'ref_logps', see "
                "objectives.compute_ref_logps, or give the step reference=<params>."
            )
        return reference_logps(reference, batch)

    def objective(params: Params, batch: Batch, reference: Params | None = None) -> losses.Loss:
        extra = {}
        if with_kl:
            if "mismatched" not in batch:
                raise DataError(
                    f"The loss {variant!r} estimates a KL divergence on mismatched pairs of prompt "
                    "and response, but the batch has none: add them as 'mismatched' (the recipe "
                    "'kto' does), or use the variant 'apo_zero_unpaired', which has no such term."
                )
            others = batch["mismatched"]
            drift = reference_logps(jax.lax.stop_gradient(params), others)
            kl = losses.reference_kl(
                drift.reshape(-1),
                reference_of(others, reference).reshape(-1),
                jnp.asarray(others["sequence_mask"]).reshape(-1),
            )
            extra = {"kl": kl}
        tokens = token_logps(model, params, batch, need_entropy=entropy, chunk=chunk)
        logps, _ = losses.sequence_logps(tokens.logps, tokens.mask)
        sequence_mask = jnp.asarray(batch["sequence_mask"])
        label = jnp.asarray(batch["label"], jnp.float32).reshape(-1)
        examples = losses.Unpaired(
            logps.reshape(-1),
            reference_of(batch, reference).reshape(-1),
            label,
            sequence_mask.reshape(-1),
        )
        loss, metrics = losses.unpaired_loss(
            examples, variant=variant, beta=beta, **options, **extra
        )
        return loss, metrics | _entropy(tokens, sequence_mask)

    return objective


def cut(
    model: Model,
    *,
    threshold: float = 1.1,
    unlikelihood_weight: float = 0.1,
    focus: float = 0.0,
    entropy: bool = False,
    chunk: int | None = None,
) -> Objective:
    """Contrastive unlikelihood training on judged responses (CUT).

    The batch holds one response per row behind its judgment, under ``plain`` a second batch with
    the same responses and no judgment in the prompt, and ``negative`` [B] (1: the judgment finds
    fault). Media are encoded once for both.

    Args:
      model: the model.
      threshold: λ, see `aa_jax.losses.inappropriate_tokens`.
      unlikelihood_weight: α.
      focus: γ.
      entropy: also report the mean entropy per response token.
      chunk: tokens per block of logits, see `aa_jax.kernels.linear_logprob`.

    Returns:
      ``objective(params, batch)``; see `aa_jax.losses.cut_loss` for the metrics.

    Raises:
      ConfigError: an option out of range.
    """
    if threshold < 1 or unlikelihood_weight < 0 or focus < 0:
        raise ConfigError(
            f"cut: threshold {threshold} must be at least 1, unlikelihood_weight "
            f"{unlikelihood_weight} and focus {focus} not negative."
        )

    def objective(params: Params, batch: Batch) -> losses.Loss:
        if "plain" not in batch or "negative" not in batch:
            raise DataError(
                "CUT reads each response with and without its judgment: read the data with the "
                "task 'judgment' (the recipe 'cut' does), from a template with language feedback."
            )
        plain = batch["plain"]
        features = model.encode_media(params, batch["media"]) if "media" in batch else None
        judged = token_logps(model, params, batch, features, need_entropy=entropy, chunk=chunk)
        alone = token_logps(model, params, plain, features, chunk=chunk)
        sequence_mask = jnp.asarray(batch["sequence_mask"])
        mask = judged.mask * sequence_mask[..., None]
        loss, metrics = losses.cut_loss(
            judged.logps[:, 0],
            alone.logps[:, 0],
            mask[:, 0],
            jnp.asarray(batch["negative"], jnp.float32).reshape(-1),
            threshold=threshold,
            unlikelihood_weight=unlikelihood_weight,
            focus=focus,
        )
        return loss, metrics | _entropy(judged, sequence_mask)

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
        pairs = losses.pair_up(scores, zeros, zeros, sequence_mask)
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


def cost(model: Model, *, sign_coef: float = 1.0, regularization: float = 0.0) -> Objective:
    """Cost modelling (Safe RLHF, Safe RLHF-V); parameters are a score model's.

    The batch is one of preferences whose "chosen" is the *more harmful* response, and holds
    ``signs`` (> 0 unsafe, < 0 safe), one per response: the template ``SafeRLHF_V_Cost`` reads both.

    Args:
      model: the backbone.
      sign_coef: weight of the signs.
      regularization: weight of the mean squared cost.

    Returns:
      ``objective(params, batch)``; see `aa_jax.losses.cost_loss` for the metrics.
    """

    def objective(params: Params, batch: Batch) -> losses.Loss:
        if "signs" not in batch:
            raise DataError(
                "A cost model needs for each response whether it is safe: read the data with the "
                "template SafeRLHF_V_Cost (response_1_harmless_rate, response_2_harmless_rate), or "
                "one whose extra() gives 'signs'."
            )
        scores = heads.score(model, params, batch)
        sequence_mask = jnp.asarray(batch["sequence_mask"])
        zeros = jnp.zeros_like(scores)
        pairs = losses.pair_up(scores, zeros, zeros, sequence_mask)
        signs = jnp.asarray(batch["signs"], jnp.float32).reshape(-1, 2)
        return losses.cost_loss(
            pairs.chosen,
            pairs.rejected,
            signs[:, 0],
            signs[:, 1],
            pairs.mask,
            sign_coef=sign_coef,
            regularization=regularization,
        )

    return objective


# The dimensions that align-anything grades in text answers.
GRADED = ("prompt_following", "objective_rules", "clarity", "information_richness", "safety")


def graded(
    model: Model, *, dimensions: Sequence[str] = GRADED, regularization: float = 0.0
) -> Objective:
    """Reward modelling from grades: one score per dimension explains the grade given there.

    Parameters are a score model's whose head has a column per dimension, see
    `heads.init_grade_head`. The batch holds one response per row and ``<dimension>_rate`` [B] for
    each dimension, a grade from 0 or -1 for none.

    Args:
      model: the backbone.
      dimensions: names, in the order of the head's columns.
      regularization: weight of the mean squared score.

    Returns:
      ``objective(params, batch)``; see `aa_jax.losses.ordinal_loss` for the metrics, and
      ``accuracy/<dimension>``.

    Raises:
      ConfigError: no dimension, or one twice.
    """
    if not dimensions or len(set(dimensions)) != len(dimensions):
        raise ConfigError(f"graded: dimensions must be named once each, got {tuple(dimensions)}.")

    def objective(params: Params, batch: Batch) -> losses.Loss:
        scores = heads.grade_scores(model, params, batch)[:, 0]
        grades = jnp.stack([jnp.asarray(batch[f"{name}_rate"]) for name in dimensions], axis=1)
        mask = (grades >= 0) * jnp.asarray(batch["sequence_mask"])
        thresholds = losses.ordered_thresholds(params["score_head"]["thresholds"])
        most = thresholds.shape[-1]
        grades = jnp.clip(grades, 0, most).astype(jnp.int32)
        loss, metrics = losses.ordinal_loss(scores, grades, thresholds, mask)
        for k, name in enumerate(dimensions):
            one = losses.ordinal_loss(
                *(x[:, k : k + 1] for x in (scores, grades)), thresholds[k : k + 1],
                mask[:, k : k + 1],
            )[1]  # fmt: skip
            metrics[f"accuracy/{name}"] = one["accuracy"]
        if regularization:
            pull = losses.ratio(regularization * scores**2, mask)
            metrics["loss"] = (metrics["loss"], pull)
            loss = losses.total_loss(metrics["loss"])
        return loss, metrics

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
    return response_tokens(model, params, batch, features, **options)[0]


def response_tokens(
    model: Model,
    params: Params,
    batch: Batch,
    features: Float[Array, "B F D"] | None = None,
    *,
    squares: bool = False,
    **options: Any,
) -> tuple[losses.TokenLogps, Float[Array, "B S R"] | None]:
    """`token_logps`, and with ``squares`` log Σ_v π(v)² of each token's distribution (for WPO).

    ``log Σ p² = lse(2z) − 2 lse(z)``: one more pass of the hidden states over the head, at half the
    temperature, without gradient.
    """
    hidden = model.hidden_states(params, batch, features)
    arrays = [jnp.asarray(batch[key]) for key in ("target_positions", "targets", "loss_mask")]
    head = model.head(params)
    tokens = losses.response_logps(hidden, head, *arrays, **options)
    if not squares:
        return tokens, None
    options = options | {"temperature": options.get("temperature", 1.0) / 2, "need_entropy": False}
    fixed = jax.lax.stop_gradient((hidden, head))
    doubled = losses.response_logps(*fixed, *arrays, **options)
    return tokens, doubled.lse - 2 * jax.lax.stop_gradient(tokens.lse)


def _entropy(tokens: losses.TokenLogps, sequence_mask: Float[Array, "B S"]) -> losses.Metrics:
    if tokens.entropy is None:
        return {}
    entropy = jax.lax.stop_gradient(tokens.entropy)
    return {"entropy": losses.ratio(entropy, tokens.mask * sequence_mask[..., None])}
