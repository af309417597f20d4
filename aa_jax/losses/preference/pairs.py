"""What a preference loss sees of a batch: one log-probability per response."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from aa_jax.errors import DataError


class Pairs(NamedTuple):
    """P preference pairs.

    Attributes:
      chosen: log π of the preferred response, summed over its tokens, in nats.
      rejected: log π of the other response.
      ref_chosen: log π_ref of the preferred response; no gradient flows through it. Zero where
        there is no reference.
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
    ref_logps: Float[Array, "B S"] | None,
    lengths: Float[Array, "B S"],
    sequence_mask: Float[Array, "B S"],
) -> Pairs:
    """Sequences in the order chosen, rejected, chosen, ... as pairs.

    Rows that share a prompt hold both (S = 2); otherwise two consecutive rows do (S = 1).

    Args:
      logps: log π of every sequence.
      ref_logps: log π_ref, or None for a loss that has no reference.
      lengths: number of tokens.
      sequence_mask: 0 on sequences that only fill the batch.

    Raises:
      DataError: the number of sequences is odd.
    """
    if logps.size % 2:
        raise DataError(
            f"A preference batch holds chosen and rejected in turn, but this one has {logps.size} "
            "sequences; collate it with the layout 'preference' or 'preference_rows'."
        )
    if ref_logps is None:
        ref_logps = jnp.zeros_like(logps)
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


def mean_logps(pairs: Pairs) -> tuple[Float[Array, "P"], Float[Array, "P"]]:
    """(log π(y_w) / length, log π(y_l) / length): log-probabilities per token, no reference."""
    return (
        pairs.chosen / jnp.maximum(pairs.chosen_length, 1),
        pairs.rejected / jnp.maximum(pairs.rejected_length, 1),
    )
