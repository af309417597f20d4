"""What a chip offers: memory and peak arithmetic, as its maker publishes them."""

import dataclasses

GIB = float(2**30)
_TPU = "cloud.google.com/tpu/docs/"


@dataclasses.dataclass(frozen=True)
class Chip:
    """One accelerator, as JAX counts devices.

    Attributes:
      name: how a topology names it.
      kinds: what JAX calls its ``device_kind``.
      memory: HBM per device, bytes, as published.
      usable: bytes a program may use: what the TPU compiler says when it refuses a program, on GPUs
        the share that `aa_jax.platforms.gpu` preallocates.
      peak: dense bfloat16 FLOP/s.
      bandwidth: HBM bytes/s.
      source: of memory, peak and bandwidth.
    """

    name: str
    kinds: tuple[str, ...]
    memory: float
    usable: float
    peak: float
    bandwidth: float
    source: str


def _gpu(
    name: str, kind: str, gigabytes: float, peak: float, bandwidth: float, source: str
) -> Chip:
    return Chip(name, (kind,), gigabytes * 1e9, 0.92 * gigabytes * 1e9, peak, bandwidth, source)


CHIPS: dict[str, Chip] = {
    chip.name: chip
    for chip in (
        Chip("v4", ("TPU v4",), 16 * GIB, 15.25 * GIB, 137.5e12, 614e9,
             _TPU + "v4 (a device is one of the chip's two cores)"),
        Chip("v5e", ("TPU v5 lite", "TPU v5e"), 16 * GIB, 15.75 * GIB, 197e12, 819e9, _TPU + "v5e"),
        Chip("v5p", ("TPU v5", "TPU v5p"), 95 * GIB, 95.74 * GIB, 459e12, 2765e9, _TPU + "v5p"),
        Chip("v6e", ("TPU v6 lite", "TPU v6e"), 32 * GIB, 31.25 * GIB, 918e12, 1640e9,
             _TPU + "v6e"),
        _gpu("a100", "NVIDIA A100-SXM4-80GB", 80.0, 312e12, 2039e9, "NVIDIA A100 data sheet"),
        _gpu("h100", "NVIDIA H100 80GB HBM3", 80.0, 989e12, 3350e9, "NVIDIA H100 data sheet"),
        _gpu("h200", "NVIDIA H200", 141.0, 989e12, 4800e9, "NVIDIA H200 data sheet"),
    )
}  # fmt: skip


def find_chip(device_kind: str) -> Chip | None:
    """The chip behind JAX's ``device_kind``; None for one that is not in the table."""
    for chip in CHIPS.values():
        if device_kind in chip.kinds:
            return chip
    # GPU names carry their memory: "NVIDIA H200 141GB HBM3e".
    return next((c for c in CHIPS.values() if device_kind.startswith(c.kinds)), None)
