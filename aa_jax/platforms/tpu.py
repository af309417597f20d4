"""TPU: one chip to a pod; libtpu's own defaults need no flags."""

from aa_jax.platforms.base import Platform

TPU = Platform(
    name="tpu",
    backends=("tpu",),
    param_dtype="float32",
    compute_dtype="bfloat16",
    kernels=("pallas_tpu", "xla", "reference"),
    note="bfloat16 matmuls without loss scaling, float32 master weights",
)
