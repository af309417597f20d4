"""Maximum likelihood of responses: supervised fine-tuning and feedback modelling."""

from jaxtyping import Array, Float

from aa_jax.losses.base import Loss, Ratio, counted, ratio, total_loss


def sft_loss(
    logps: Float[Array, "B S R"],
    loss_mask: Float[Array, "B S R"],
    sequence_mask: Float[Array, "B S"],
    *,
    lse: Float[Array, "B S R"] | None = None,
    z_loss: float = 0.0,
) -> Loss:
    r"""Token mean of the negative log-likelihood.

    .. math::
      L = -\frac{\sum_t w_t \log p_t}{\sum_t w_t} + \zeta \frac{\sum_t w_t \mathrm{lse}_t^2}
          {\sum_t w_t}

    Feedback modelling (Align Anything, arXiv:2412.15838: ``-log p(c | x, y)`` of the language
    feedback c on a response y) is this loss with the feedback as the response.
    The z-loss is PaLM's (Chowdhery et al. 2022, arXiv:2204.02311, §5, with ζ = 1e-4).

    The mean is over all tokens of the whole batch, as in Hugging Face's causal-LM loss on one
    micro-batch; unlike there it stays so under gradient accumulation. align-anything also trains
    on the assistant header of the template, here the mask holds the response alone.

    Args:
      logps: log-probability per response slot.
      loss_mask: token weights w; 0 on padding.
      sequence_mask: 0 on sequences that only fill the batch.
      lse: log-partition sums, needed by the z-loss.
      z_loss: ζ.

    Returns:
      The loss, and metrics ``loss``, ``nll`` (per token, in nats), ``response_tokens`` (per
      sequence) and, if asked for, ``z_loss`` (the mean of lse²).
    """
    weights = loss_mask * sequence_mask[..., None]
    nll = ratio(-logps, weights)
    metrics = {
        "loss": nll,
        "nll": nll,
        "response_tokens": ratio((loss_mask != 0).sum(-1).astype(weights.dtype), sequence_mask),
    }
    if z_loss:
        metrics["z_loss"] = ratio(counted(lse, weights) ** 2, weights)
        metrics["loss"] = Ratio(nll.total + z_loss * metrics["z_loss"].total, nll.count)
    return total_loss(metrics["loss"]), metrics
