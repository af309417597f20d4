"""Which implementation of an operator runs: explicit tables, loud choices, one log line.

Every operator's ``api.py`` holds a dict literal ``name -> Implementation`` and calls `choose`.
There is no silent fallback: ``impl="auto"`` follows the table and logs what it took, a forced
implementation that is unknown or cannot run here (platform, dtype, shape, devices) raises.
"""

import functools
import logging
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax

from aa_jax.errors import ConfigError
from aa_jax.platforms import target

_log = logging.getLogger(__name__)


class Implementation(NamedTuple):
    """One way to compute an operator.

    Attributes:
      fn: the function itself; all implementations of an operator share one signature.
      platforms: JAX platform names it can run on; None means every platform.
      preferred: platforms on which ``impl="auto"`` takes it (first match in table order wins).
        None means every platform, so the last entry of a table is its portable default.
      refuses: ``(**facts) -> str | None``: why it cannot take these arrays, e.g. their dtype.
    """

    fn: Callable
    platforms: tuple[str, ...] | None = None
    preferred: tuple[str, ...] | None = ()
    refuses: Callable[..., str | None] = lambda **facts: None


def choose(
    operator: str,
    table: Mapping[str, Implementation],
    impl: str = "auto",
    platform: str | None = None,
    **facts: Any,
) -> Callable:
    """The function to call for ``impl`` on ``platform``.

    Args:
      operator: name for the log line and the error, e.g. ``"attention"``.
      table: the operator's implementations.
      impl: ``"auto"`` or a key of ``table``.
      platform: a JAX platform name; None asks JAX for its default backend.
      **facts: what the implementations' `Implementation.refuses` want to know of this call.

    Raises:
      ConfigError: ``impl`` is not in the table, or cannot run on this platform or these arrays.
    """
    platform = platform or target.backend()
    usable = [n for n, i in table.items() if i.platforms is None or platform in i.platforms]
    if impl == "auto":
        reasons = []
        for name in usable:
            if table[name].preferred is None or platform in table[name].preferred:
                reason = table[name].refuses(**facts)
                if reason is None:
                    _log_once(operator, name, platform, "; ".join(reasons))
                    return table[name].fn
                reasons.append(f"{name!r} does not run: {reason}")
        raise ConfigError(
            f"{operator}: no implementation runs on {platform!r}: {'; '.join(reasons)}."
        )
    if impl not in table:
        raise ConfigError(
            f"{operator}: there is no implementation {impl!r}; choose 'auto' or one of "
            f"{sorted(table)}."
        )
    if impl not in usable:
        raise ConfigError(
            f"{operator}: implementation {impl!r} runs on {list(table[impl].platforms)} and this "
            f"process is on {platform!r}; choose 'auto' or one of {sorted(usable)}."
        )
    if reason := table[impl].refuses(**facts):
        raise ConfigError(
            f"{operator}: implementation {impl!r} cannot run here: {reason}; choose 'auto' or "
            f"another one of {sorted(usable)}."
        )
    return table[impl].fn


def undivided() -> bool:
    """Whether a custom kernel is right here: XLA cannot divide one over devices by itself.

    True on one device, on a mesh of one device, and where every larger mesh axis is manual
    (inside ``jax.shard_map``).
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return target.device_count() == 1
    axes = zip(mesh.axis_sizes, mesh.axis_types, strict=True)
    return all(size == 1 or kind == jax.sharding.AxisType.Manual for size, kind in axes)


def divides(
    count: int,
    part: int,
    *,
    rows: tuple[str, ...] = ("data", "fsdp"),
    parts: str = "tensor",
    words: tuple[str, str] = ("rows", "heads"),
) -> str | None:
    """Why the ambient mesh (``jax.set_mesh``) cannot divide two axes explicitly, or None.

    Args:
      count: size of the axis that is divided over the mesh axes ``rows``.
      part: size of the one divided over the mesh axis ``parts``.
      rows: mesh axes.
      parts: a mesh axis.
      words: what the two axes of the array are, for the reason.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return "no mesh says how the arrays are divided"
    if any(kind != jax.sharding.AxisType.Auto for kind in mesh.axis_types):
        return "the program divides its arrays itself"
    sizes = dict(zip(mesh.axis_names, mesh.axis_sizes, strict=True))
    if missing := [name for name in (*rows, parts) if name not in sizes]:
        return f"the mesh has no axis {missing[0]!r}"
    if other := [n for n, size in sizes.items() if n not in (*rows, parts) and size > 1]:
        return f"the mesh also divides along {other[0]!r}"
    over = math.prod(sizes[name] for name in rows), sizes[parts]
    for what, total, pieces in zip(words, (count, part), over, strict=True):
        if total % pieces:
            return f"the {what} ({total}) cannot be divided over {pieces} devices"
    return None


def hopper_refuses() -> str | None:
    """Why a kernel written for Hopper (``wgmma``, TMA) cannot run here, or None."""
    capability = target.capability()
    if capability.split(".")[0] != "9":
        return f"the device's compute capability is {capability or 'unknown'}, not 9.0 (Hopper)"
    if not undivided():
        return "arrays may be divided over devices outside jax.shard_map"
    return None


@functools.cache
def _log_once(operator: str, name: str, platform: str, reasons: str) -> None:
    because = f" ({reasons})" if reasons else ""
    _log.info("%s runs its %r implementation on %s%s", operator, name, platform, because)
