"""Devices that need not exist: a TPU slice, GPUs of some hosts, or virtual CPU devices."""

import contextlib
import ctypes
import dataclasses
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from aa_jax.errors import ConfigError
from aa_jax.plan.gpu_targets import GPU_TARGETS
from aa_jax.platforms.chips import CHIPS, Chip, find_chip
from aa_jax.platforms.target import Target, compiling_for

# In the order in which they need each other.
_LIBRARIES = ("libnvrtc.so.*", "libcublasLt.so.*", "libcublas.so.*", "libcudnn*.so.*")
_NAME = re.compile(r"(?P<chip>[a-z0-9]+):(?P<size>\d+(x\d+){0,2})")


@dataclasses.dataclass(frozen=True)
class Slice:
    """Devices to compile for.

    Attributes:
      name: as asked for, e.g. "v5p:4x4x4".
      devices: JAX devices that can be compiled for.
      chip: what each of them offers; None for CPU devices.
      target: what tracing has to know.
      compiler: what compiles, in words.
    """

    name: str
    devices: tuple[Any, ...]
    chip: Chip | None
    target: Target
    compiler: str

    @contextlib.contextmanager
    def tracing(self) -> Iterator[None]:
        """Programs traced inside are those that would run there."""
        with compiling_for(self.target):
            yield


def prepare(topology: str, libtpu: str | None = None, cuda: str | None = None) -> None:
    """Sets what a compiler reads when JAX starts; call before the first JAX operation.

    Args:
      topology: as for `open_slice`.
      libtpu: path of a libtpu.so; default ``build/libtpu`` where it is, or the installed one.
      cuda: folder with JAX's CUDA plugin and ptxas; default ``build/cuda``, or the installed ones.
    """
    chip, size = _parse(topology)
    for name, value in {
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_WORKER_ID": "0",
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # nothing runs, so others may compile as well
    }.items():
        os.environ.setdefault(name, value)
    library = Path(libtpu or "build/libtpu/libtpu/libtpu.so")
    if libtpu or library.is_file():
        os.environ["TPU_LIBRARY_PATH"] = str(library.absolute())
    if chip == "cpu":
        flag = f"--xla_force_host_platform_device_count={_count(size)}"
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}".strip()
    elif not _is_tpu(chip):
        _prepare_cuda(Path(cuda or "build/cuda").absolute())


def open_slice(topology: str) -> Slice:
    """The devices of a topology.

    Args:
      topology: ``<chip>:<size>``: TPU slices "v5e:4x4", "v5p:4x4x4", "v6e:2x4"; GPUs of one host
        "h200:8" or of several, "h200:4x8"; "cpu:8" for virtual devices of this machine, where only
        XLA's partitioning is that of an accelerator, not its fusion and memory.

    Raises:
      ConfigError: an unknown chip or size, or a compiler that is not there.
    """
    import jax
    from jax.experimental import topologies

    chip, size = _parse(topology)
    if chip == "cpu":
        count = _count(size)
        if len(jax.devices("cpu")) < count:
            raise ConfigError(
                f"{topology}: JAX was started with {len(jax.devices('cpu'))} CPU devices; start "
                f"with XLA_FLAGS=--xla_force_host_platform_device_count={count}."
            )
        devices = tuple(jax.devices("cpu")[:count])
        # Kernels and block sizes as on an unknown accelerator: plain XLA.
        target = Target("generic", count)
        return Slice(topology, devices, None, target, "XLA:CPU, virtual devices")
    try:
        if _is_tpu(chip):
            found = topologies.get_topology_desc(platform="tpu", topology_name=topology)
            target = Target("tpu", len(found.devices), kind=found.devices[0].device_kind)
            words = "libtpu, compile only"
        else:
            found = topologies.get_topology_desc(
                platform="cuda",
                topology="x".join(["1", "1", *size.split("x")][-3:]),  # slices, hosts, GPUs
                target_config=GPU_TARGETS[chip],
            )
            target = Target("cuda", len(found.devices), "9.0" if _has_cudnn() else "0")
            words = "XLA:GPU, compile only" + ("" if _has_cudnn() else ", without cuDNN")
    except Exception as error:  # whatever a plug-in raises that is not there
        what = "libtpu (make verify-tpu fetches it, or name one with --libtpu)"
        if not _is_tpu(chip):
            what = "JAX's CUDA plugin with ptxas (make verify-gpu fetches them, or --cuda)"
        raise ConfigError(
            f"there is no compiler for {topology}: {str(error)[:300]} It needs {what}, not older "
            "than jaxlib; cpu:<n> needs none."
        ) from error
    devices = tuple(found.devices)
    return Slice(topology, devices, find_chip(devices[0].device_kind), target, words)


def _parse(topology: str) -> tuple[str, str]:
    match = _NAME.fullmatch(topology)
    tpus = [name for name in CHIPS if _is_tpu(name)]
    if not match or not (match["chip"] in ("cpu", *GPU_TARGETS) or _is_tpu(match["chip"])):
        raise ConfigError(
            f"{topology!r} is no topology: write <chip>:<size>, e.g. v5e:4x4, v5p:4x4x4, h200:8 or "
            f"cpu:8. Chips are TPUs ({', '.join(tpus)}), GPUs ({', '.join(GPU_TARGETS)}) and cpu."
        )
    return match["chip"], match["size"]


def _is_tpu(chip: str) -> bool:
    return re.fullmatch(r"v\d\w*|tpu\d\w*", chip) is not None


def _count(size: str) -> int:
    numbers = [int(n) for n in size.split("x")]
    out = 1
    for n in numbers:
        out *= n
    return out


def _prepare_cuda(folder: Path) -> None:
    """Makes plug-in, tools and libraries that lie in a folder of their own visible to JAX."""
    if not folder.is_dir():
        return
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
    for tools in folder.glob("nvidia/cu*"):
        if (tools / "bin" / "ptxas").exists():
            flag = f"--xla_gpu_cuda_data_dir={tools}"
            os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}".strip()
    for pattern in _LIBRARIES:  # loaded once, a library is found by its name
        for library in sorted(folder.glob(f"nvidia/*/lib/{pattern}")):
            with contextlib.suppress(OSError):
                ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)


def _has_cudnn() -> bool:
    """Whether cuDNN can be asked for its plans."""
    try:
        ctypes.CDLL("libcudnn.so.9")
    except OSError:
        return False
    return True
