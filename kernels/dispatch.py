"""Which implementation of an operator runs: explicit tables, loud choices, one log line.

Every operator's ``api.py`` holds a dict literal ``name -> Implementation`` and calls `choose`.
There is no silent fallback: ``impl="auto"`` follows the table and logs what it took, a forced
implementation that is unknown or cannot run on this platform raises.
"""

import functools
import logging
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax

from aa_jax.errors import ConfigError

_log = logging.getLogger(__name__)


class Implementation(NamedTuple):
    """One way to compute an operator.

    Attributes:
      fn: the function itself; all implementations of an operator share one signature.
      platforms: JAX platform names it can run on; None means every platform.
      preferred: platforms on which ``impl="auto"`` takes it (first match in table order wins).
        None means every platform, so the last entry of a table is its portable default.
    """

    fn: Callable
    platforms: tuple[str, ...] | None = None
    preferred: tuple[str, ...] | None = ()


def choose(
    operator: str,
    table: Mapping[str, Implementation],
    impl: str = "auto",
    platform: str | None = None,
) -> Callable:
    """The function to call for ``impl`` on ``platform``.

    Args:
      operator: name for the log line and the error, e.g. ``"attention"``.
      table: the operator's implementations.
      impl: ``"auto"`` or a key of ``table``.
      platform: a JAX platform name; None asks JAX for its default backend.

    Raises:
      ConfigError: ``impl`` is not in the table, or cannot run on this platform.
    """
    platform = platform or jax.default_backend()
    usable = [n for n, i in table.items() if i.platforms is None or platform in i.platforms]
    if impl == "auto":
        name = next(
            n for n in usable if table[n].preferred is None or platform in table[n].preferred
        )
        _log_once(operator, name, platform)
        return table[name].fn
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
    return table[impl].fn


@functools.cache
def _log_once(operator: str, name: str, platform: str) -> None:
    _log.info("%s runs its %r implementation on %s", operator, name, platform)
