"""Ascend NPU, reached through a PJRT plug-in that registers the platform name ``ascend``.

Pallas has no lowering for it, so only plain XLA operations are used. Training steps are checked
to lower for this name without custom calls; they have not been executed on the hardware.
"""

from aa_jax.platforms.base import Platform

ASCEND = Platform(
    name="ascend",
    # Not "npu": unrelated plug-ins use that name.
    backends=("ascend",),
    param_dtype="float32",
    compute_dtype="bfloat16",
    kernels=("xla", "reference"),
    note="lowering-checked, not executed; XLA operations only",
)
