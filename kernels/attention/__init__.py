"""Attention over key intervals: see `aa_jax.kernels.attention.api`."""

from aa_jax.kernels.attention.api import attention, decode_attention
from aa_jax.kernels.attention.intervals import causal_intervals, visible

__all__ = ["attention", "causal_intervals", "decode_attention", "visible"]
