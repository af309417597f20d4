"""Log-probabilities of responses from hidden states: where every model meets every algorithm."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int

from aa_jax.kernels.linear_logprob import linear_logprob
from aa_jax.losses.base import counted


class TokenLogps(NamedTuple):
    """Per response slot; B rows, S sequences per row, R slots per sequence.

    Attributes:
      logps: log-probability of the slot's token, in nats; 0 where the mask is 0.
      entropy: entropy of the distribution it was drawn from; None if not asked for.
      lse: log-partition sum of that distribution, for the z-loss.
      mask: the loss mask handed in: 0 on padding, 1 (or a token weight) elsewhere.
    """

    logps: Float32[Array, "B S R"]
    entropy: Float32[Array, "B S R"] | None
    lse: Float32[Array, "B S R"]
    mask: Float[Array, "B S R"]


def response_logps(
    hidden: Float[Array, "B T D"],
    head: Float[Array, "V D"],
    target_positions: Int[Array, "B S R"],
    targets: Int[Array, "B S R"],
    loss_mask: Float[Array, "B S R"],
    *,
    bias: Float[Array, "V"] | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    need_entropy: bool = False,
    impl: str = "auto",
    chunk: int | None = None,
) -> TokenLogps:
    """``log p(targets)``, read from the hidden states that predict them.

    Only the ``S · R`` hidden states of response slots are gathered and meet the vocabulary; the
    prompt, its media and the padding of the row never do. Slots whose mask is 0 give 0 and no
    gradient, whatever their positions and targets hold.

    Args:
      hidden: hidden states after the final norm.
      head: output embedding.
      target_positions: the position in the row whose hidden state predicts each target. Two
        sequences may share one: in a row ``prompt | chosen | rejected`` the end of the prompt
        predicts the first token of both.
      targets: response token ids, including the end token.
      loss_mask: nonzero on slots that count.
      bias: of the head.
      temperature: divides the logits, as the sampler did.
      softcap: tanh cap of the logits.
      need_entropy: also return entropies.
      impl: see `aa_jax.kernels.linear_logprob`.
      chunk: see `aa_jax.kernels.linear_logprob`.
    """
    rows, sequences, slots = targets.shape
    gather = jax.vmap(lambda row, index: row[index])
    picked = gather(hidden, target_positions.reshape(rows, sequences * slots))
    out = linear_logprob(
        picked.reshape(-1, hidden.shape[-1]),
        head,
        targets.reshape(-1),
        mask=loss_mask.reshape(-1),
        bias=bias,
        temperature=temperature,
        softcap=softcap,
        need_entropy=need_entropy,
        impl=impl,
        chunk=chunk,
    )
    logps, entropy, lse = jax.tree.map(lambda x: x.reshape(targets.shape), out)
    return TokenLogps(logps, entropy, lse, loss_mask)


def sequence_logps(
    logps: Float[Array, "*batch R"], mask: Float[Array, "*batch R"]
) -> tuple[Float32[Array, "*batch"], Float32[Array, "*batch"]]:
    """``log p(response)`` and the response's length.

    Returns:
      (sum over slots of ``mask · logps``, sum of ``mask``): with a mask of zeros and ones the
      log-probability of exactly the response tokens plus their end token, and their number.
    """
    mask = mask.astype(jnp.float32)
    return jnp.sum(counted(logps, mask) * mask, axis=-1), jnp.sum(mask, axis=-1)
