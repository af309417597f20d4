"""Start-up and self-description of the process."""

import functools
import importlib.metadata
import logging
import os
import platform as host
import sys
from numbers import Real
from pathlib import Path

from aa_jax import hosts
from aa_jax.errors import ConfigError
from aa_jax.platforms import target
from aa_jax.platforms.ascend import ASCEND
from aa_jax.platforms.base import Platform
from aa_jax.platforms.cpu import CPU
from aa_jax.platforms.generic import GENERIC
from aa_jax.platforms.gpu import GPU, ROCM, is_rocm, toolchain_problems
from aa_jax.platforms.memory import keep_freed_memory
from aa_jax.platforms.tpu import TPU

log = logging.getLogger(__name__)

PLATFORMS = {
    "cpu": CPU, "gpu": GPU, "rocm": ROCM, "tpu": TPU, "ascend": ASCEND, "generic": GENERIC,
}  # fmt: skip

_MEMORY = "XLA_CLIENT_MEM_FRACTION"
_OLD_NAMES = {_MEMORY: "XLA_PYTHON_CLIENT_MEM_FRACTION"}  # JAX refuses to start with both set
_VERSIONS = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "transformers", "numpy")


def select(backend: str) -> Platform:
    """The platform a JAX backend name belongs to; unknown names get ``generic`` and a log line."""
    for platform in PLATFORMS.values():
        if backend in platform.backends:
            return platform
    if backend != GENERIC.name:
        log.info("unknown backend %r: using the generic platform (%s)", backend, GENERIC.note)
    return GENERIC


def current() -> Platform:
    """The platform of JAX's default backend (or of `target.compiling_for`); starts the backend if
    nothing has yet. What it decides is logged once."""
    backend = target.backend()
    if backend == "gpu" and is_rocm(_client_version()):
        backend = "rocm"
    return _select_once(backend)


def start(
    compilation_cache: str | os.PathLike | None = None,
    memory_fraction: Real | None = None,
    keep_memory: bool = True,
) -> None:
    """Prepares the process; call before the first JAX operation, and before opening a backend.

    Where the environment says so it joins a job of several processes, see `aa_jax.hosts.join`.

    Variables the user has already set win. Every variable is read by its own backend only, so all
    are set before anyone knows which one will be found.

    Args:
      compilation_cache: Folder for compiled programs, so that the next start skips compilation.
      memory_fraction: Share of GPU memory to preallocate, in (0, 1].
      keep_memory: Let the C library keep freed memory, see `memory.keep_freed_memory`.

    Raises:
      ConfigError: The fraction is out of range, or the folder cannot be written.
    """
    if keep_memory:
        keep_freed_memory()
    for platform in PLATFORMS.values():
        for name, value in platform.environment.items():
            if _OLD_NAMES.get(name, name) not in os.environ:
                os.environ.setdefault(name, value)
    # transformers advises to install torch; nothing here uses its models.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    if memory_fraction is not None:
        if not 0.0 < memory_fraction <= 1.0:
            raise ConfigError(f"memory_fraction must be in (0, 1], got {memory_fraction}")
        os.environ.pop(_OLD_NAMES[_MEMORY], None)
        os.environ[_MEMORY] = str(memory_fraction)
    if compilation_cache is not None:
        import jax

        folder = Path(compilation_cache).expanduser()
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(
                f"the compilation cache {folder} cannot be created ({error.strerror}). "
                "Name a folder that can be written, or leave compilation_cache unset."
            ) from error
        jax.config.update("jax_compilation_cache_dir", str(folder))
    hosts.join()


def environment() -> dict[str, str]:
    """What a report should say about the machine: devices, cores, memory, versions.

    Holds no user or host names, paths or environment variables.
    """
    import jax

    devices, platform = jax.devices(), current()
    facts = {
        "device": f"{len(devices)} × {devices[0].device_kind}",
        "platform": f"{platform.name} ({platform.note})",
        "compute / parameter dtype": f"{platform.compute_dtype} / {platform.param_dtype}",
    }
    if jax.process_count() > 1:
        facts["processes"] = f"{jax.process_count()} with {jax.local_device_count()} devices each"
    facts["CPU cores"] = str(_cores())
    memory = _host_memory()
    if memory:
        facts["host memory"] = f"{memory / 2**30:.1f} GiB"
    facts["python"] = f"{host.python_version()} on {host.system()} {host.machine()}"
    facts["aa_jax"] = sys.modules["aa_jax"].__version__
    for name in _VERSIONS:
        try:
            facts[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return facts


def describe() -> str:
    """:func:`environment` in one line, for the log."""
    facts = environment()
    head = [facts["device"], f"{facts['CPU cores']} CPU cores", facts["compute / parameter dtype"]]
    return ", ".join(head + [f"{name} {facts[name]}" for name in ("aa_jax", "jax", "flax")])


@functools.cache
def _select_once(backend: str) -> Platform:
    """Cached, so that a platform and what is wrong with it are mentioned once."""
    platform = select(backend)
    log.info("%s", decisions(platform))
    if platform is GPU:
        version = _client_version()
        for problem in toolchain_problems(version, target.capability(), _cudnn_version()):
            log.warning("%s: %s", platform.name, problem)
    return platform


def decisions(platform: Platform) -> str:
    """What a platform decides, in one line."""
    set_here = [name for name in platform.environment if name in os.environ]
    flags = ", ".join(f"{name}={os.environ[name]}" for name in set_here) or "none"
    allowed = "all operations"
    if platform.operations is not None:
        allowed = f"{len(platform.operations)} operations allowed, no custom call"
    return (
        f"platform {platform.name}: compute {platform.compute_dtype}, parameters "
        f"{platform.param_dtype}; kernels {' > '.join(platform.kernels)}; start-up flags {flags}; "
        f"{allowed} ({platform.note})"
    )


def _client_version() -> str:
    import jax

    return str(getattr(jax.devices()[0].client, "platform_version", ""))


def _cudnn_version() -> int | None:
    """cuDNN's number, None where it is not installed."""
    import ctypes

    try:
        return int(ctypes.CDLL("libcudnn.so.9").cudnnGetVersion())
    except (OSError, AttributeError):
        pass
    try:
        importlib.metadata.version("nvidia-cudnn-cu13")
    except importlib.metadata.PackageNotFoundError:
        try:
            importlib.metadata.version("nvidia-cudnn-cu12")
        except importlib.metadata.PackageNotFoundError:
            return None
    return 90000


def _cores() -> int:
    """Cores this process may use, which in a container is fewer than the machine has."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _host_memory() -> int | None:
    """Bytes of RAM of the host, None where the system does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return None
