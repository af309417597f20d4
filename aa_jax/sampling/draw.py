"""Drawing one token per row from unnormalised log-probabilities."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

_BLOCK = 128


def draw(keys: Key[Array, "B"], logits: Float[Array, "B V"]) -> Int[Array, "B"]:
    """One index per row with probability ``softmax(logits)``, by inverting the distribution.

    One uniform number decides a row: it falls into a block of the vocabulary by the blocks' masses,
    then onto a token of that block. The usual Gumbel-max draw needs a random number for every
    token, which for a large vocabulary takes longer than the model's own step on a CPU.

    A uniform float32 has 2^-23 steps, so a token rarer than about 1e-7 is drawn with that
    granularity. A token of -inf is never drawn.

    Args:
      keys: one per row; the draw of a row depends on its own key and logits only.
      logits: float32; at least one finite per row.

    Returns:
      [B] int32.
    """
    rows, vocab = logits.shape
    padded = jnp.pad(logits, ((0, 0), (0, -vocab % _BLOCK)), constant_values=-jnp.inf)
    mass = jnp.exp(padded - jnp.max(logits, axis=-1, keepdims=True)).reshape(rows, -1, _BLOCK)
    uniform = jax.vmap(jax.random.uniform)(keys)
    upto = jnp.cumsum(mass.sum(axis=-1), axis=-1)
    # Rounded up to the total itself the number would lie behind the last token.
    point = jnp.minimum(uniform * upto[:, -1], jnp.nextafter(upto[:, -1], 0.0))
    block = jnp.sum(upto <= point[:, None], axis=-1, dtype=jnp.int32)
    before = jnp.where(block > 0, _pick(upto, jnp.maximum(block - 1, 0)), 0.0)
    inside = jnp.take_along_axis(mass, block[:, None, None], axis=1)[:, 0]
    token = jnp.sum(
        jnp.cumsum(inside, axis=-1) <= (point - before)[:, None], axis=-1, dtype=jnp.int32
    )
    # The two sums of a block round differently: stay on a token that has mass.
    last = _BLOCK - 1 - jnp.argmax(inside[:, ::-1] > 0, axis=-1).astype(jnp.int32)
    return block * _BLOCK + jnp.minimum(token, last)


def _pick(values: Float[Array, "B N"], index: Int[Array, "B"]) -> Float[Array, "B"]:
    return jnp.take_along_axis(values, index[:, None], axis=-1)[:, 0]
