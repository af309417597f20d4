"""The device mesh: five named axes, the same on one laptop core and on a pod."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.experimental import mesh_utils
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
    dcn: Mapping[str, int] | None = None,
    devices: Sequence[Any] | None = None,
) -> Mesh:
    """A mesh over all devices, in an order that suits the network between them.

    Args:
      data: Replicas of the model; each takes its share of the batch.
      fsdp: Devices that share the weights and optimizer state of one replica and also split its
        batch (ZeRO-3).
      tensor: Devices that split heads, hidden layers and the vocabulary.
      seq: Devices that split the sequence.
      expert: Devices that split the experts of a mixture.
      dcn: For several slices (TPU) or machines (GPU) with a fast network inside and a slow one
        between: over how many of them an axis reaches, e.g. {"data": 2} for two slices with whole
        replicas in each. The sizes above stay those of the whole axis. Default: one fast network.
      devices: Devices to use; default all of ``jax.devices()``.

    One size may be -1: it becomes what the other sizes leave.

    Raises:
      ConfigError: The sizes do not multiply to the number of devices, `dcn` does not fit them or
        the slices, or a process of the job has no device in the mesh.
    """
    devices = list(jax.devices() if devices is None else devices)
    if idle := sorted(set(range(jax.process_count())) - {d.process_index for d in devices}):
        raise ConfigError(
            f"process {idle[0]} has no device in this mesh of {len(devices)} devices; every "
            "process of a job takes part in it. Start fewer processes, or use all devices."
        )
    sizes = _sizes(dict(zip(AXES, (data, fsdp, tensor, seq, expert), strict=True)), len(devices))
    if dcn is None:
        return jax.make_mesh(
            tuple(sizes.values()), AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices
        )
    outer = _outer_sizes(sizes, dict(dcn), devices)
    inner = [sizes[name] // outer[name] for name in AXES]
    grid = mesh_utils.create_hybrid_device_mesh(
        inner, list(outer.values()), devices, process_is_granule=not _has_slices(devices)
    )
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def batch_devices(mesh: Mesh) -> int:
    """Number of pieces the rows of a batch are cut into."""
    return math.prod(mesh.shape[name] for name in BATCH_AXES)


def _sizes(sizes: dict[str, int], count: int) -> dict[str, int]:
    """The sizes with -1 replaced; they multiply to the number of devices."""
    asked = ", ".join(f"{name}={size}" for name, size in sizes.items())
    free = [name for name, size in sizes.items() if size == -1]
    if len(free) > 1 or any(size < 1 for size in sizes.values() if size != -1):
        raise ConfigError(
            f"mesh sizes must be positive, and at most one of them -1 (what is left): got {asked}"
        )
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if free:
        if count % fixed:
            raise ConfigError(
                f"{count} devices cannot be divided by the mesh sizes {asked}: the fixed sizes "
                f"multiply to {fixed}. Choose sizes whose product divides {count}"
                f"{_nearest(sizes, fixed, lambda product: count % product == 0, count)}."
            )
        sizes[free[0]] = count // fixed
    elif fixed != count:
        raise ConfigError(
            f"the mesh sizes {asked} multiply to {fixed}, but there are {count} devices. Set one "
            f"size to -1, pass devices=jax.devices()[:{fixed}] to use only some, or change one size"
            f"{_nearest(sizes, fixed, lambda product: product == count, count)}."
        )
    return sizes


def _nearest(sizes: Mapping[str, int], fixed: int, fits: Any, count: int) -> str:
    """ ": tensor=2 or 4; ..." for every axis of which another size alone would do."""
    found = []
    for name, size in sizes.items():
        others = fixed // size if size > 0 else 0
        working = [n for n in range(1, count + 1) if size > 0 and fits(others * n)]
        near = [*[n for n in working if n < size][-1:], *[n for n in working if n > size][:1]]
        if near and (size > 1 or len(working) == 1):
            found.append(f"{name}={' or '.join(map(str, near))}")
    return f" (nearest that work: {'; '.join(found)})" if found else ""


def _outer_sizes(
    sizes: Mapping[str, int], dcn: Mapping[str, int], devices: Sequence[Any]
) -> dict[str, int]:
    """Over how many slices each axis reaches."""
    if unknown := sorted(set(dcn) - set(AXES)):
        raise ConfigError(f"mesh.dcn names the axis {unknown[0]!r}; there are {', '.join(AXES)}.")
    outer = {name: dcn.get(name, 1) for name in AXES}
    for name, size in outer.items():
        if size < 1 or sizes[name] % size:
            divisors = [str(n) for n in range(1, sizes[name] + 1) if sizes[name] % n == 0]
            raise ConfigError(
                f"mesh.dcn.{name}={size} does not divide the axis {name}={sizes[name]}; it can "
                f"reach over {', '.join(divisors)} slices."
            )
    of_slice = [d.slice_index if _has_slices(devices) else d.process_index for d in devices]
    counts = {i: of_slice.count(i) for i in sorted(set(of_slice))}
    kind = "slices" if _has_slices(devices) else "processes"
    if math.prod(outer.values()) != len(counts) or len(set(counts.values())) > 1:
        asked = " x ".join(f"{name}={size}" for name, size in dcn.items())
        raise ConfigError(
            f"mesh.dcn ({asked}) is a layout of {math.prod(outer.values())} equal {kind}, but the "
            f"devices are in {len(counts)} with {', '.join(map(str, counts.values()))} devices. "
            f"Give axes whose dcn sizes multiply to {len(counts)}, or leave dcn out."
        )
    return outer


def _has_slices(devices: Sequence[Any]) -> bool:
    """Whether the devices know of slices; otherwise one process is one machine."""
    return len({getattr(device, "slice_index", None) for device in devices} - {None}) > 1
