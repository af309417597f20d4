"""Learning from judgments in words: which tokens of a response does the criticism mean?"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from aa_jax.losses.base import Loss, Ratio, counted, ratio, total_loss
from aa_jax.losses.stable import log1mexp


def inappropriate_tokens(
    judged_logps: Float[Array, "N R"],
    logps: Float[Array, "N R"],
    mask: Float[Array, "N R"],
    *,
    threshold: float = 1.1,
) -> Float[Array, "N R"]:
    r"""Tokens that a negative judgment is about (CUT, Xu et al. 2023, arXiv:2312.14591, §3).

    .. math:: U = \{t : p(y_t \mid x, j^-, y_{<t}) > \lambda\, p(y_t \mid x, y_{<t})\}

    Told what is wrong with the response, the model finds its wrong tokens more likely.

    Args:
      judged_logps: log p of the tokens when the prompt shows the negative judgment j⁻.
      logps: log p of the same tokens without it.
      mask: 0 on padding.
      threshold: λ >= 1; 1.1 in the authors' code.

    Returns:
      1 on inappropriate tokens, 0 elsewhere; no gradient.
    """
    gap = jax.lax.stop_gradient(counted(judged_logps, mask) - counted(logps, mask))
    return ((gap > jnp.log(threshold)) & (mask != 0)).astype(jnp.float32)


def cut_loss(
    judged_logps: Float[Array, "N R"],
    logps: Float[Array, "N R"],
    mask: Float[Array, "N R"],
    negative: Float[Array, "N"],
    *,
    threshold: float = 1.1,
    unlikelihood_weight: float = 0.1,
    focus: float = 0.0,
    spans: Float[Array, "N R"] | None = None,
) -> Loss:
    r"""Contrastive unlikelihood training (Xu et al. 2023, arXiv:2312.14591, §3).

    .. math:: L = -\frac1N \sum_t \log p(y_t \mid x, j)
      - \frac1{N^-} \left(\sum_{t \notin U} \log p(y_t \mid x)
      + \alpha \sum_{t \in U} p(y_t \mid x)^\gamma \log(1 - p(y_t \mid x))\right)

    The first sum is the likelihood of every response behind its judgment, good or bad; the second
    is over responses with a negative judgment, read without it. The authors' code halves the sum
    when there are such responses, and has γ = 0. align-anything and TRL have no CUT.

    Args:
      judged_logps: log p of the response's tokens when the prompt shows its judgment.
      logps: log p of the same tokens without the judgment; only read where `negative`.
      mask: 0 on padding.
      negative: 1 where the judgment finds fault with the response.
      threshold: λ, see `inappropriate_tokens`.
      unlikelihood_weight: α.
      focus: γ, of the dynamic weight p^γ.
      spans: 1 on tokens that a judgment marks as wrong, in place of U.

    Returns:
      The loss, and per-token metrics ``loss`` (two terms), ``judged_nll``, ``contrast`` and
      ``inappropriate`` (share of the tokens of negative responses).
    """
    mask = mask.astype(jnp.float32)
    judged = ratio(-judged_logps, mask)
    faulty = mask * negative[:, None]
    if spans is None:
        spans = inappropriate_tokens(judged_logps, logps, faulty, threshold=threshold)
    plain = counted(logps, faulty)
    weight = unlikelihood_weight
    if focus:
        weight = weight * jax.lax.stop_gradient(jnp.exp(focus * plain))
    terms = jnp.where(spans > 0, -weight * log1mexp(plain), -plain)
    contrast = ratio(terms, faulty)
    metrics = {
        "loss": (judged, contrast),
        "judged_nll": judged,
        "contrast": contrast,
        "inappropriate": ratio(spans, faulty),
    }
    return total_loss(metrics["loss"]), metrics


def d2o_loss(
    own_logps: Float[Array, "N K"],
    own_ref_logps: Float[Array, "N K"],
    own_mask: Float[Array, "N K"],
    rejected_logps: Float[Array, "N"],
    rejected_ref_logps: Float[Array, "N"],
    mask: Float[Array, "N"],
    *,
    beta: float = 0.1,
    alpha: float = 0.1,
) -> Loss:
    r"""Distributional dispreference optimisation (Duan et al. 2024, arXiv:2403.03419).

    .. math:: -\log\sigma\left(\frac{\beta}{K} \sum_{i=1}^K
      \log\frac{\pi(y_i)}{\pi_{r^-}(y_i)} - \alpha \log\frac{\pi(y_l)}{\pi_{r^+}(y_l)}\right)

    The only human label is y_l, a response (or the negative span of one) that a judgment rejects;
    the K responses y_i are the model's own. With K = 1 and one reference it is DPO.

    Args:
      own_logps: log π of the model's own responses.
      own_ref_logps: log π_{r−} of them: the reference with the harmful behaviour, i.e. before
        training.
      own_mask: 0 where a prompt has fewer than K.
      rejected_logps: log π of the rejected response or span.
      rejected_ref_logps: log π_{r+} of it: the reference with the helpful behaviour.
      mask: 0 on rows that only fill the batch.
      beta: β.
      alpha: α.

    Returns:
      The loss, and per-row metrics ``loss``, ``margin``, ``chosen_rewards`` (of own responses),
      ``rejected_rewards`` and ``accuracy``.
    """
    own_mask = own_mask.astype(jnp.float32) * mask[:, None]
    ratios = counted(own_logps, own_mask) - jax.lax.stop_gradient(counted(own_ref_logps, own_mask))
    own = beta * jnp.sum(ratios * own_mask, -1) / jnp.maximum(jnp.sum(own_mask, -1), 1)
    reference = jax.lax.stop_gradient(counted(rejected_ref_logps, mask))
    rejected = alpha * (counted(rejected_logps, mask) - reference)
    losses = ratio(-jax.nn.log_sigmoid(own - rejected), mask)
    own, rejected = jax.lax.stop_gradient((own, rejected))
    metrics: dict[str, Ratio] = {
        "loss": losses,
        "margin": ratio(own - rejected, mask),
        "chosen_rewards": ratio(own, mask),
        "rejected_rewards": ratio(rejected, mask),
        "accuracy": ratio(0.5 * (jnp.sign(own - rejected) + 1), mask),
    }
    return total_loss(losses), metrics
