"""Truncation of the next-token distribution: temperature, top-k, top-p (nucleus) and min-p."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from aa_jax.errors import ConfigError


def check_sampling(temperature: float, top_p: float, top_k: int, min_p: float = 0.0) -> None:
    """Refuses settings that would sample from nothing or from nonsense.

    Raises:
      ConfigError: temperature < 0, top_p outside (0, 1], top_k < 0, or min_p outside [0, 1).
    """
    if temperature < 0:
        raise ConfigError(f"temperature is {temperature}; use 0 for greedy or a positive number.")
    if not 0 < top_p <= 1:
        raise ConfigError(f"top_p is {top_p}; it must lie in (0, 1], 1 keeps every token.")
    if top_k < 0:
        raise ConfigError(f"top_k is {top_k}; use 0 to keep every token or a positive count.")
    if not 0 <= min_p < 1:
        raise ConfigError(f"min_p is {min_p}; it must lie in [0, 1), 0 keeps every token.")


def filter_logits(
    logits: Float[Array, "B V"], *, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> Float[Array, "B V"]:
    """Sets the logits outside the top-k set, the nucleus and min-p's reach to -inf.

    The nucleus is the smallest set of most probable tokens whose probability reaches `top_p`; the
    token that crosses the threshold is kept, so the set is never empty (Holtzman et al. 2020,
    "The curious case of neural text degeneration", eq. 2). With both given, top-k is applied first
    and the nucleus is taken of what is left, renormalised. Logits are already divided by the
    temperature. Ties at the border are all kept. min-p keeps what is at least `min_p` times as
    probable as the most probable token (Nguyen et al. 2024, arXiv:2407.01082).

    Args:
      logits: [B, V], any float type.
      top_k: number of tokens to keep; 0 keeps all.
      top_p: probability mass to keep, in (0, 1].
      min_p: least probability relative to the highest, in [0, 1); 0 keeps all.

    Returns:
      [B, V] logits of the same type.
    """
    vocab = logits.shape[-1]
    if min_p > 0:  # a ratio of probabilities: the same before and after the others
        least = jnp.max(logits, axis=-1, keepdims=True) + jnp.log(jnp.float32(min_p))
        logits = jnp.where(logits < least, -jnp.inf, logits)
    if 0 < top_k < vocab:
        kth = jax.lax.top_k(logits, top_k)[0][:, -1:]
        logits = jnp.where(logits < kth, -jnp.inf, logits)
    if top_p < 1:
        ordered = jnp.sort(logits, axis=-1, descending=True)
        probs = jax.nn.softmax(ordered.astype(jnp.float32), axis=-1)
        before = jnp.cumsum(probs, axis=-1) - probs
        # The last kept token is the last one whose predecessors have not reached top_p yet.
        kept = jnp.sum(before < top_p, axis=-1, keepdims=True)
        threshold = jnp.take_along_axis(ordered, jnp.maximum(kept - 1, 0), axis=-1)
        logits = jnp.where(logits < threshold, -jnp.inf, logits)
    return logits
