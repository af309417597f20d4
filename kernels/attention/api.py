"""Softmax attention with grouped key/value heads and interval masks."""

from jaxtyping import Array, Float, Int

from aa_jax.errors import ConfigError
from aa_jax.kernels.attention import reference, xla
from aa_jax.kernels.attention.intervals import resolve
from aa_jax.kernels.dispatch import Implementation, choose

IMPLEMENTATIONS = {
    "reference": Implementation(reference.attention),
    "xla": Implementation(xla.attention, preferred=None),
}


def attention(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B S K D"],
    v: Float[Array, "B S K D"],
    *,
    intervals: Int[Array, "_ T 4"] | None = None,
    causal: bool = False,
    scale: float | None = None,
    impl: str = "auto",
) -> Float[Array, "B T H D"]:
    r"""Scaled dot-product attention, ``softmax(scale · q kᵀ) v`` over the visible keys.

    Query head ``h`` reads key/value head ``h // (H // K)`` (grouped-query attention, Ainslie et
    al. 2023); repeated keys are never formed. Scores, softmax and accumulation are float32
    whatever the input type. A query that sees no key returns exactly 0 and sends zero gradient;
    keys and values seen by no query cannot influence anything, not even when they hold NaN.

    Args:
      q: queries.
      k: keys; K divides H.
      v: values.
      intervals: per query, the visible keys ``[a0, a1) ∪ [b0, b1)`` as indices on the S axis
        (leading axis B, or 1 when all rows share them). None: no restriction.
      causal: also hide keys after the query; needs ``S == T``.
      scale: multiplies the scores; ``D ** -0.5`` when None.
      impl: ``"auto"`` or a key of `IMPLEMENTATIONS`.

    Returns:
      The attended values, in ``q``'s type.

    Raises:
      ConfigError: unknown or unavailable ``impl``, head counts that do not divide, intervals of
        another batch size, or ``causal`` with ``S != T``.
    """
    rows, queries, heads, depth = q.shape
    kv_heads = k.shape[2]
    if heads % kv_heads:
        raise ConfigError(
            f"attention: {heads} query heads cannot share {kv_heads} key/value heads; the number "
            "of query heads must be a multiple of the number of key/value heads."
        )
    if intervals is not None and intervals.shape[0] not in (1, rows):
        raise ConfigError(
            f"attention: intervals describe {intervals.shape[0]} rows and q has {rows}; give one "
            "set of intervals per row, or one for all."
        )
    fn = choose("attention", IMPLEMENTATIONS, impl)
    intervals = resolve(intervals, causal, queries, k.shape[1])
    return fn(q, k, v, intervals, depth**-0.5 if scale is None else float(scale))
