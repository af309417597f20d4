"""GPU: NVIDIA (cuda) and AMD (rocm)."""

from aa_jax.platforms.base import Platform

GPU = Platform(
    name="gpu",
    backends=("gpu", "cuda", "rocm"),
    param_dtype="float32",
    compute_dtype="bfloat16",
    kernels=("pallas_gpu", "xla", "reference"),
    # JAX preallocates 75 % by default, which is too little for a job that owns the card.
    environment={"XLA_CLIENT_MEM_FRACTION": "0.92"},
    note="bfloat16 matmuls, float32 master weights",
)
