"""The device mesh: five named axes, the same on one laptop core and on a pod."""

import math
from collections.abc import Sequence

import jax
from jax.sharding import AxisType, Mesh

from aa_jax.errors import ConfigError

# Slowest network first: replicas of the model are furthest apart.
AXES = ("data", "fsdp", "tensor", "seq", "expert")
# The axes the rows of a batch are spread over.
BATCH_AXES = ("data", "fsdp")


def make_mesh(
    data: int = -1,
    fsdp: int = 1,
    tensor: int = 1,
    seq: int = 1,
    expert: int = 1,
    devices: Sequence[jax.Device] | None = None,
) -> Mesh:
    """A mesh over all devices, in an order that suits the network between them.

    Args:
      data: Replicas of the model; each takes its share of the batch.
      fsdp: Devices that share the weights and optimizer state of one replica and also split its
        batch (ZeRO-3).
      tensor: Devices that split heads, hidden layers and the vocabulary.
      seq: Devices that split the sequence.
      expert: Devices that split the experts of a mixture.
      devices: Devices to use; default all of ``jax.devices()``.

    One size may be -1: it becomes what the other sizes leave.

    Raises:
      ConfigError: The sizes do not multiply to the number of devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = dict(zip(AXES, (data, fsdp, tensor, seq, expert), strict=True))
    asked = ", ".join(f"{name}={size}" for name, size in sizes.items())
    free = [name for name, size in sizes.items() if size == -1]
    if len(free) > 1 or any(size < 1 for size in sizes.values() if size != -1):
        raise ConfigError(
            f"mesh sizes must be positive, and at most one of them -1 (what is left): got {asked}"
        )
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if free:
        if len(devices) % fixed:
            raise ConfigError(
                f"{len(devices)} devices cannot be divided by the mesh sizes {asked}: the fixed "
                f"sizes multiply to {fixed}. Choose sizes whose product divides {len(devices)}."
            )
        sizes[free[0]] = len(devices) // fixed
    elif fixed != len(devices):
        raise ConfigError(
            f"the mesh sizes {asked} multiply to {fixed}, but there are {len(devices)} devices. "
            f"Set one size to -1, or pass devices=jax.devices()[:{fixed}] to use only some."
        )
    return jax.make_mesh(
        tuple(sizes.values()), AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices
    )


def batch_devices(mesh: Mesh) -> int:
    """Number of pieces the rows of a batch are cut into."""
    return math.prod(mesh.shape[name] for name in BATCH_AXES)
