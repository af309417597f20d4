"""Any other PJRT plug-in: the most portable choices, and nothing set behind its back."""

from aa_jax.platforms.base import Platform

GENERIC = Platform(
    name="generic",
    backends=(),
    param_dtype="float32",
    compute_dtype="float32",
    kernels=("xla", "reference"),
    note="unknown backend: XLA operations in float32",
)
