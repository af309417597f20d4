"""Drawing one token per row from unnormalised log-probabilities."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt32

_BLOCK = 128


def uniforms(seeds: UInt32[Array, "*batch"], count: int) -> Float[Array, "*batch {count}"]:
    """The random numbers of the first tokens of requests with these seeds, in [0, 1).

    A request's numbers depend on its seed and the token's place alone. They are made for all
    places at once: a step of a decode loop would spend more on making its own than on its draw.
    """

    def one(seed: Array, place: Array) -> Array:
        return jax.random.uniform(jax.random.fold_in(jax.random.key(seed), place))

    places = jnp.arange(count, dtype=jnp.int32)
    rows = jax.vmap(jax.vmap(one, (None, 0)), (0, None))(seeds.reshape(-1), places)
    return rows.reshape(*seeds.shape, count)


def draw(
    uniform: Float[Array, "B"], logits: Float[Array, "B V"]
) -> tuple[Int[Array, "B"], Float[Array, "B"]]:
    """One index per row with probability ``softmax(logits)``, by inverting the distribution.

    One uniform number decides a row: it falls into a block of the vocabulary by the blocks' masses,
    then onto a token of that block. The usual Gumbel-max draw needs a random number for every
    token, which for a large vocabulary takes longer than the model's own step on a CPU.

    A uniform float32 has 2^-23 steps, so a token rarer than about 1e-7 is drawn with that
    granularity. A token of -inf is never drawn.

    Args:
      uniform: in [0, 1]; the draw of a row depends on its own number and logits only.
      logits: float32; at least one finite per row.

    Returns:
      The indices, int32, and ``logsumexp(logits)``, which falls off on the way.
    """
    rows, vocab = logits.shape
    highest = jnp.max(logits, axis=-1, keepdims=True)
    padded = jnp.pad(logits, ((0, 0), (0, -vocab % _BLOCK)), constant_values=-jnp.inf)
    mass = jnp.exp(padded - highest).reshape(rows, -1, _BLOCK)
    upto = jnp.cumsum(mass.sum(axis=-1), axis=-1)
    total = upto[:, -1]
    # Rounded up to the total itself the number would lie behind the last token.
    point = jnp.minimum(uniform * total, jnp.nextafter(total, 0.0))
    block = jnp.sum(upto <= point[:, None], axis=-1, dtype=jnp.int32)
    before = jnp.where(block > 0, _pick(upto, jnp.maximum(block - 1, 0)), 0.0)
    inside = jnp.take_along_axis(mass, block[:, None, None], axis=1)[:, 0]
    # A triangle of ones sums up to every place; XLA:CPU is slow at cumulative sums.
    within = jnp.matmul(inside, jnp.triu(jnp.ones((_BLOCK, _BLOCK))), precision="highest")
    beyond = within > (point - before)[:, None]
    # The first token beyond the number. The two sums of a block round differently, so there may be
    # none: then the last one, and in any case one that has mass.
    places = jnp.arange(_BLOCK, dtype=jnp.int32)[None, :]
    first = jnp.min(jnp.where(beyond & (inside > 0), places, _BLOCK), axis=-1)
    last = jnp.max(jnp.where(inside > 0, places, 0), axis=-1)
    return block * _BLOCK + jnp.minimum(first, last), highest[:, 0] + jnp.log(total)


def _pick(values: Float[Array, "B N"], index: Int[Array, "B"]) -> Float[Array, "B"]:
    return jnp.take_along_axis(values, index[:, None], axis=-1)[:, 0]
