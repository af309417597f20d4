"""Softmax attention with grouped key/value heads and interval masks."""

from importlib.util import find_spec

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from aa_jax.errors import ConfigError
from aa_jax.kernels.attention import reference, xla
from aa_jax.kernels.attention.intervals import resolve
from aa_jax.kernels.dispatch import Implementation, choose, hopper_refuses, undivided
from aa_jax.platforms import target


def _pallas_tpu(*args):
    from aa_jax.kernels.attention import pallas_tpu  # Pallas takes a while to import

    return pallas_tpu.attention(*args)


def _pallas_tpu_refuses(q, **_):
    if str(q.dtype) not in ("bfloat16", "float32"):
        return f"queries are {q.dtype}, not bfloat16 or float32"
    if q.shape[1] == 1:
        return "one query per row is bound by reading the cache, which XLA does as well"
    if not 64 <= q.shape[3] <= 256:
        return f"heads of {q.shape[3]} are not within 64 to 256"
    if not undivided():
        return "arrays may be divided over devices outside jax.shard_map"
    return None


def _pallas_hopper(*args):
    from aa_jax.kernels.attention import pallas_hopper

    return pallas_hopper.attention(*args)


def _pallas_hopper_refuses(q, **_):
    if str(q.dtype) not in ("bfloat16", "float16"):
        return f"queries are {q.dtype}, not bfloat16 or float16"
    if q.shape[1] == 1:
        return "one query per row is bound by reading the cache, which XLA does as well"
    if q.shape[3] not in (64, 128):
        return f"heads of {q.shape[3]} are not 64 or 128"
    if reason := hopper_refuses():
        return reason
    if find_spec("jax_cuda12_plugin") and not find_spec("jax_cuda13_plugin"):
        return "ptxas of CUDA 12.8 and 12.9 miscompiles masks of this kind, and CUDA 13 is not here"
    return None


def _cudnn(q, k, v, intervals, scale):
    # Intervals are given for the causal mask alone: `_cudnn_refuses` lets no others through.
    return even_lengths(q, k, v, scale, causal=intervals is not None)


def even_lengths(q, k, v, scale, *, causal, implementation="cudnn"):
    """cuDNN has no gradient at odd lengths: one more token is added, hidden, and cut off."""
    (rows, queries), keys = q.shape[:2], k.shape[1]
    lengths = {}
    if queries % 2 or keys % 2:
        more = lambda x: jnp.pad(x, ((0, 0), (0, x.shape[1] % 2), (0, 0), (0, 0)))  # noqa: E731
        q, k, v = more(q), more(k), more(v)
        lengths = {
            "query_seq_lengths": jnp.full((rows,), queries, jnp.int32),
            "key_value_seq_lengths": jnp.full((rows,), keys, jnp.int32),
        }
    out = jax.nn.dot_product_attention(
        q, k, v, scale=scale, is_causal=causal, implementation=implementation, **lengths
    )
    return out[:, :queries]


def _cudnn_refuses(q, mask, **_):
    # Given other masks as an array cuDNN is slow, and without them it is wrong.
    if mask == "intervals":
        return "cuDNN has no interval masks"
    if str(q.dtype) not in ("bfloat16", "float16"):
        return f"queries are {q.dtype}, not bfloat16 or float16"
    if q.shape[1] == 1 or q.shape[3] > 128 or q.shape[3] % 8:
        return f"{q.shape[1]} queries with heads of {q.shape[3]} do not suit cuDNN on every GPU"
    capability = target.capability()
    if not capability[:1].isdigit() or float(capability) < 8.0:
        return "cuDNN attention needs an NVIDIA GPU of compute capability 8.0"
    return None


IMPLEMENTATIONS = {
    "pallas_tpu": Implementation(_pallas_tpu, ("tpu",), ("tpu",), _pallas_tpu_refuses),
    "cudnn": Implementation(_cudnn, ("gpu", "cuda"), ("gpu", "cuda"), _cudnn_refuses),
    # Compiled, never executed: only when asked for.
    "pallas_hopper": Implementation(_pallas_hopper, ("gpu", "cuda"), (), _pallas_hopper_refuses),
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
    mask = "intervals" if intervals is not None else "causal" if causal else "full"
    fn = choose("attention", IMPLEMENTATIONS, impl, q=q, mask=mask)
    intervals = resolve(intervals, causal, queries, k.shape[1])
    return fn(q, k, v, intervals, depth**-0.5 if scale is None else float(scale))


def decode_attention(
    q: Float[Array, "B H D"],
    k: Float[Array, "B S K D"],
    v: Float[Array, "B S K D"],
    lengths: Int[Array, "B"],
    *,
    scale: float | None = None,
    impl: str = "auto",
) -> Float[Array, "B H D"]:
    """One query per row over the first ``lengths`` keys of its row's cache.

    Args:
      q: the queries.
      k: cached keys; slots from a row's length on may hold anything, NaN included.
      v: cached values.
      lengths: keys a row sees; 0 gives exactly 0.
      scale: multiplies the scores; ``D ** -0.5`` when None.
      impl: see `attention`.

    Raises:
      ConfigError: as `attention`.
    """
    zero = jnp.zeros_like(lengths)
    intervals = jnp.stack([zero, zero, zero, lengths], axis=-1)[:, None]
    return attention(q[:, None], k, v, intervals=intervals, scale=scale, impl=impl)[:, 0]
