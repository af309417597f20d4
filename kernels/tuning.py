"""Tile sizes of the TPU kernels: one table, looked up by what is being compiled for.

No timing stands behind an entry. `aa_jax.kernels.tune` compiles candidates for chips that are not
there and keeps those that fit; an entry is one of those that by the compiler's own schedule keep
the matrix units busiest (`tune` says how that is counted, and which of several it is).
"""

from typing import Any, NamedTuple

import jax.numpy as jnp

from aa_jax.platforms import target


class Key(NamedTuple):
    """What tile sizes depend on.

    Attributes:
      kind: JAX's ``device_kind``.
      operator: "attention", "linear_logprob_forward" or "linear_logprob_dlogits".
      dtype: of the matrices, e.g. "bfloat16".
      bucket: of shapes, see `bucket`.
    """

    kind: str
    operator: str
    dtype: str
    bucket: str


DEFAULT: dict[str, tuple[int, ...]] = {
    # queries, keys
    "attention": (256, 256),
    # tokens, vocabulary, depth
    "linear_logprob_forward": (256, 512, 256),
    "linear_logprob_dlogits": (256, 512, 256),
}
"""Sizes that fit every chip compiled for, in float32 and with heads of 256 too."""

TABLE: dict[Key, tuple[int, ...]] = {
    Key("TPU v5 lite", "attention", "bfloat16", "heads of 128"): (512, 512),
    Key("TPU v5 lite", "attention", "bfloat16", "heads of 256"): (512, 256),
    Key("TPU v5 lite", "linear_logprob_forward", "bfloat16", "any"): (512, 2048, 256),
    Key("TPU v5 lite", "linear_logprob_dlogits", "bfloat16", "any"): (512, 2048, 256),
    Key("TPU v5", "attention", "bfloat16", "heads of 128"): (512, 512),
    Key("TPU v5", "attention", "bfloat16", "heads of 256"): (512, 512),
    Key("TPU v5", "linear_logprob_forward", "bfloat16", "any"): (512, 2048, 256),
    Key("TPU v5", "linear_logprob_dlogits", "bfloat16", "any"): (512, 2048, 256),
    Key("TPU v6 lite", "attention", "bfloat16", "heads of 128"): (1024, 512),
    Key("TPU v6 lite", "attention", "bfloat16", "heads of 256"): (1024, 512),
    Key("TPU v6 lite", "linear_logprob_forward", "bfloat16", "any"): (1024, 2048, 256),
}
"""What is not in it takes `DEFAULT`."""


def bucket(operator: str, depth: int) -> str:
    """The bucket of a shape: of attention the head size in lanes, of log-probs one for all.

    A tile's memory and program depend on nothing else; the rest of a shape is how many tiles it is.
    """
    if operator != "attention":
        return "any"
    return f"heads of {max(128, -(-depth // 128) * 128)}"


def sizes(operator: str, dtype: Any, depth: int, kind: str | None = None) -> tuple[int, ...]:
    """Tile sizes of an operator, the table's or `DEFAULT`.

    Args:
      operator: a key of `DEFAULT`.
      dtype: of the matrices.
      depth: head size, or width of the hidden states.
      kind: a ``device_kind``; None asks what is being compiled for.
    """
    name = jnp.dtype(dtype).name
    key = Key(kind or target.kind(), operator, name, bucket(operator, depth))
    return TABLE.get(key, DEFAULT[operator])
