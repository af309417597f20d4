"""CPU: laptops, CI, and the other side of every exactness test."""

from aa_jax.platforms.base import Platform

CPU = Platform(
    name="cpu",
    backends=("cpu",),
    param_dtype="float32",
    # CPUs emulate bfloat16 by converting around float32 arithmetic: slower and less exact.
    compute_dtype="float32",
    kernels=("xla", "reference"),
    # XLA sizes its thread pool to the cores it may use (affinity, cgroups): nothing to set.
    note="float32 throughout",
)
