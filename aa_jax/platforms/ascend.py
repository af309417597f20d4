"""Ascend NPU, reached through a PJRT plug-in that registers the platform name ``ascend``.

Pallas has no lowering for it, so only plain XLA operations are used. Training and sampling are
checked to lower for this name without custom calls and with the operations below only
(`aa_jax.platforms.portable`); they have not been executed on the hardware.
"""

from aa_jax.platforms.base import Platform

# Elementwise arithmetic, shapes, matrix products, reductions, loops and indexed access: what a
# decoder and its towers need. Not among them: sort (top-p sampling), convolutions (patches are
# matrix products), random number instructions (keys are integer arithmetic), any custom call.
# A composite (the error function, in exports of JAX 0.12) names a function of the module, whose
# operations are held to this list like all others.
OPERATIONS = frozenset(
    "stablehlo." + name
    for name in """
    abs add and bitcast_convert broadcast_in_dim compare composite concatenate constant convert
    cosine divide dot_general dynamic_slice dynamic_update_slice exponential gather iota
    is_finite log log_plus_one maximum minimum multiply negate not optimization_barrier or pad
    power reduce reduce_window remainder reshape return reverse rsqrt scatter select shift_left
    shift_right_logical sign sine slice sqrt subtract tanh transpose while xor
    """.split()
)

ASCEND = Platform(
    name="ascend",
    # Not "npu": unrelated plug-ins use that name.
    backends=("ascend",),
    param_dtype="float32",
    compute_dtype="bfloat16",
    kernels=("xla", "reference"),
    operations=OPERATIONS,
    note="lowering-checked, not executed; XLA operations only",
)
