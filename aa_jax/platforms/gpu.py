"""GPU: NVIDIA (cuda) and AMD (rocm). JAX calls both of them ``gpu``."""

import re

from aa_jax.platforms.base import Platform

# JAX preallocates 75 % by default, which is too little for a job that owns the card.
_ENVIRONMENT = {"XLA_CLIENT_MEM_FRACTION": "0.92"}

GPU = Platform(
    name="gpu",
    backends=("gpu", "cuda"),
    param_dtype="float32",
    compute_dtype="bfloat16",
    kernels=("pallas_gpu", "xla", "reference"),
    environment=_ENVIRONMENT,
    # bfloat16 has float32's exponents, so gradients need no loss scaling.
    note="bfloat16 matmuls without loss scaling, float32 master weights",
)

ROCM = Platform(
    name="rocm",
    backends=("rocm",),
    param_dtype="float32",
    compute_dtype="bfloat16",
    kernels=("xla", "reference"),
    environment=_ENVIRONMENT,
    note="bfloat16 matmuls without loss scaling, float32 master weights; XLA operations only",
)


def is_rocm(version: str) -> bool:
    """Whether a client's ``platform_version`` is that of the ROCm plug-in."""
    return "rocm" in version.lower()


def toolchain_problems(version: str, capability: str, cudnn: int | None) -> list[str]:
    """What of the installed CUDA stack makes training slow or wrong; empty where nothing does.

    Args:
      version: the client's ``platform_version``, e.g. "... cuda 13000".
      capability: compute capability of the device, e.g. "9.0".
      cudnn: its version number, e.g. 91000; None if it is not there.
    """
    problems = []
    number = re.search(r"cuda (\d+)", version)
    cuda = int(number[1]) if number else None
    if cuda is not None and 12080 <= cuda <= 12091:
        problems.append(
            "CUDA 12.8.0 to 12.9.1: its ptxas miscompiles causal Mosaic kernels, which JAX refuses "
            "to run; use CUDA 13"
        )
    if cuda is not None and cuda < 12000:
        problems.append(f"CUDA {cuda // 1000}: current JAX needs 12 or 13")
    modern = capability[:1].isdigit() and float(capability) >= 8.0
    if capability[:1].isdigit() and not modern:
        problems.append(
            f"compute capability {capability} has no bfloat16 units; set model.dtype to float32"
        )
    if modern and cudnn is None:
        problems.append(
            "cuDNN is not installed: attention of image towers runs as plain XLA; install "
            "nvidia-cudnn-cu12 or -cu13"
        )
    return problems
