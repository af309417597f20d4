"""What every implementation takes beside its arrays, and returns."""

from typing import NamedTuple

from jaxtyping import Array, Float32


class LogProbs(NamedTuple):
    """Per-token results, all zero where the mask is zero.

    Attributes:
      logps: log-probability of the target, in nats.
      entropy: entropy of the whole distribution, in nats; None if it was not asked for.
      lse: log of the partition sum, ``log Σ exp(z)``, whose square is the z-loss.
    """

    logps: Float32[Array, "N"]
    entropy: Float32[Array, "N"] | None
    lse: Float32[Array, "N"]


class Spec(NamedTuple):
    """Static choices; hashable, so that one compiled kernel belongs to each.

    Attributes:
      temperature: divides the capped logits.
      softcap: tanh cap of the logits, or None.
      need_entropy: whether entropies are wanted.
      chunk: tokens per block.
      tile: vocabulary entries per block.
    """

    temperature: float = 1.0
    softcap: float | None = None
    need_entropy: bool = False
    chunk: int | None = None
    tile: int | None = None
