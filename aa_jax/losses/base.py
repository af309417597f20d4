"""Sums with their counts: what every loss and metric is made of."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


class Ratio(NamedTuple):
    """A weighted sum and the sum of its weights; adding both over batches stays exact.

    Attributes:
      total: sum of weight times value, shape [].
      count: sum of weights, shape [].
    """

    total: jax.Array | float
    count: jax.Array | float

    @property
    def mean(self) -> jax.Array:
        """total / count, and 0 (with zero gradient) when nothing was counted."""
        return self.total / jnp.where(self.count == 0, 1, self.count)


Metrics = dict[str, Ratio | tuple[Ratio, ...]]
Loss = tuple[Float[Array, ""], Metrics]


def ratio(
    values: Float[Array, "*shape"], weights: Float[Array, "*shape"] | Bool[Array, "*shape"]
) -> Ratio:
    """Sums ``values`` with ``weights`` in float32; values of weight 0 may be anything, also NaN."""
    weights = weights.astype(jnp.float32)
    return Ratio(jnp.sum(counted(values, weights) * weights), jnp.sum(weights))


def counted(
    values: Float[Array, "*shape"], weights: Float[Array, "*shape"]
) -> Float[Array, "*shape"]:
    """``values`` in float32, with 0 where nothing counts.

    Losses pass their inputs through it: masking their result alone would still send
    0 · NaN = NaN back into whatever a padding row holds.
    """
    return jnp.where(weights != 0, values.astype(jnp.float32), 0)


def total_loss(terms: Ratio | tuple[Ratio, ...]) -> Float[Array, ""]:
    """The scalar that ``metrics["loss"]`` stands for: the sum of its means."""
    terms = (terms,) if isinstance(terms, Ratio) else terms
    return jnp.asarray(sum(term.mean for term in terms))


def mix(**parts: tuple[Loss, float]) -> Loss:
    """A weighted sum of losses with different denominators, exact under accumulation.

    For example the PTX mix of InstructGPT (Ouyang et al. 2022, eq. 2), policy and critic together:
    ``mix(policy=(policy, 1.0), value=(value, 0.1), ptx=(sft, 16.0))``.

    Args:
      **parts: name = (what a loss returned, its weight).

    Returns:
      The sum, and the metrics of all parts as ``name/metric``.
    """
    terms, metrics = [], {}
    for name, ((_, own), weight) in parts.items():
        for term in (own["loss"],) if isinstance(own["loss"], Ratio) else own["loss"]:
            terms.append(Ratio(weight * term.total, term.count))
        metrics |= {f"{name}/{key}": value for key, value in own.items()}
    metrics = {"loss": tuple(terms)} | metrics
    return total_loss(metrics["loss"]), metrics
