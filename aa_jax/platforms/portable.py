"""Programs for platforms that only a plug-in knows: lowered by name, checked, written to a file.

Lowering needs no plug-in. What a platform allows is part of its `Platform`.
"""

import os
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from aa_jax.errors import ConfigError
from aa_jax.platforms.base import Platform
from aa_jax.platforms.target import Target, compiling_for

_OPERATION = re.compile(r'(?:= |^\s+)"?((?:stablehlo|chlo|mhlo|sdy|tpu|triton)\.[\w.]+)', re.M)


def export(
    function: Callable[..., Any],
    *arguments: Any,
    platform: Platform,
    path: str | os.PathLike | None = None,
) -> Any:
    """Lowers a function for a platform that need not be here, and refuses what it may not hold.

    Args:
      function: jittable.
      *arguments: arrays or shapes.
      platform: its first backend name is lowered for.
      path: file for the versioned StableHLO, which `load` opens with this and later versions of JAX
        (the compatibility guarantees are ``jax.export``'s).

    Returns:
      A ``jax.export.Exported``. It takes and returns flat sequences of arrays, in the order of
      ``jax.tree.leaves``: a file cannot name the classes of an optimizer's state.

    Raises:
      ConfigError: the program holds a custom call or an operation that the platform does not allow
        or that JAX cannot lower for it.
    """
    import jax
    import jax.export

    backend = platform.backends[0]
    leaves, structure = jax.tree.flatten(arguments)

    def flat(*leaves: Any) -> list[Any]:
        return jax.tree.leaves(function(*jax.tree.unflatten(structure, leaves)))

    try:
        with compiling_for(Target(backend, 1)):
            exported = jax.export.export(
                jax.jit(flat),
                platforms=(backend,),
                # Run on another platform only to check what it computes.
                disabled_checks=[jax.export.DisabledSafetyCheck.platform()],
            )(*leaves)
    except NotImplementedError as error:  # an operation with rules for certain platforms alone
        raise ConfigError(
            f"the program cannot be lowered for the platform {platform.name!r}: {error}. Leave out "
            "what needs this operation, or write it in portable ones."
        ) from error
    check(exported.mlir_module(), platform)
    if path is not None:
        Path(path).write_bytes(exported.serialize())
    return exported


def load(path: str | os.PathLike) -> Any:
    """An exported program; ``.call(*leaves)`` runs it on the default backend, see `export`."""
    import jax.export

    return jax.export.deserialize(bytearray(Path(path).read_bytes()))


def operations(text: str) -> Counter[str]:
    """Operations of a StableHLO module and how often each stands there."""
    return Counter(_OPERATION.findall(text))


def check(text: str, platform: Platform) -> None:
    """Refuses a module that a platform could not compile.

    Args:
      text: StableHLO.
      platform: with its allowed operations; None allows all but custom calls.

    Raises:
      ConfigError: naming every operation too many.
    """
    found = operations(text)
    calls = sorted(set(re.findall(r"custom_call @([\w.$]+)", text)) - platform.custom_calls)
    wrong = [] if platform.operations is None else sorted(set(found) - platform.operations)
    wrong = [name for name in wrong if name != "stablehlo.custom_call"]
    if calls or wrong:
        what = [f"the operations {', '.join(wrong)}"] * bool(wrong)
        what += [f"the custom calls {', '.join(calls)}"] * bool(calls)
        raise ConfigError(
            f"the program holds {' and '.join(what)}, which the platform {platform.name!r} does "
            "not run. Choose portable implementations (impl='xla'), or leave out what needs them."
        )
