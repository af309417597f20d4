"""For which devices programs are being traced: those of this process, or others compiled for.

A program compiled for an absent accelerator is traced on this machine, whose default backend is the
CPU. Whoever chooses by platform while tracing (kernels, block sizes) asks here, not JAX.
"""

import contextlib
import dataclasses
from collections.abc import Iterator
from contextvars import ContextVar


@dataclasses.dataclass(frozen=True)
class Target:
    """Devices a program is traced for.

    Attributes:
      backend: what ``jax.default_backend()`` would say there.
      devices: how many there are.
      capability: CUDA compute capability, e.g. "9.0"; empty where it means nothing.
      kind: what JAX would call their ``device_kind``; empty where nobody knows.
    """

    backend: str
    devices: int
    capability: str = ""
    kind: str = ""


_TARGET: ContextVar[Target | None] = ContextVar("aa_jax_target", default=None)


def backend() -> str:
    """Platform name of the target; JAX's default backend unless `compiling_for` says otherwise."""
    if target := _TARGET.get():
        return target.backend
    import jax

    return jax.default_backend()


def device_count() -> int:
    """Devices of the target."""
    if target := _TARGET.get():
        return target.devices
    import jax

    return jax.device_count()


def capability() -> str:
    """CUDA compute capability of the target's devices; "0" where they have none."""
    if target := _TARGET.get():
        return target.capability or "0"
    import jax

    return str(getattr(jax.devices()[0], "compute_capability", "0"))


def kind() -> str:
    """``device_kind`` of the target's devices."""
    if target := _TARGET.get():
        return target.kind
    import jax

    return jax.devices()[0].device_kind


@contextlib.contextmanager
def compiling_for(target: Target) -> Iterator[Target]:
    """Within it, programs are traced as they would be on the target.

    JAX keeps traced functions by their arguments alone; what was traced for other devices is
    forgotten at both ends.
    """
    import jax

    token = _TARGET.set(target)
    jax.clear_caches()
    try:
        yield target
    finally:
        _TARGET.reset(token)
        jax.clear_caches()
