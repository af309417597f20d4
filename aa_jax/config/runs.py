"""A run directory remembers the config it was started with, and refuses another one."""

import fnmatch
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from aa_jax import hosts
from aa_jax.config.files import require
from aa_jax.errors import ConfigError

# Keys that change what is kept, shown or how the work is laid out, but not the numbers.
HARMLESS = (
    "workdir",
    "*log_every",
    "*eval_every",
    "*report_every",
    "*checkpoint_every",
    "*save_every",
    "*sample_every",
    "*keep",
    "*keep_last",
    "*keep_every",
    "*progress",
    "*profile",
    "*workers",
    "*prefetch",
    "*tower_cache",
    "*offload",
    "*compilation_cache*",
    "mesh.*",
    "platform.*",
)


def resolve(config: ConfigDict | Mapping) -> dict[str, Any]:
    """The config as plain, JSON-ready values: dicts, lists, text, numbers, booleans, None.

    Raises:
      ConfigError: A required value is missing, or a value has no JSON form.
    """
    if isinstance(config, ConfigDict):
        require(config)
    return {str(key): _jsonable(config[key], f"config.{key}") for key in config}


def flatten(resolved: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """``{"optim": {"lr": 1}}`` -> ``{"optim.lr": 1}``; empty sections keep their own key."""
    flat = {}
    for key, value in resolved.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def write_resolved(config: ConfigDict | Mapping, workdir: str | os.PathLike) -> Path:
    """Writes ``config.json`` and, to be read or pasted, ``config.txt`` with one flag per line.

    Every process of a job calls this; only process 0 writes.

    Raises:
      ConfigError: The processes were started with different configs.
    """
    folder, resolved = Path(workdir), resolve(config)
    _check_same_everywhere(flatten(resolved))
    if hosts.index() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        _write(folder / "config.json", json.dumps(resolved, indent=2, ensure_ascii=False) + "\n")
        lines = [f"--config.{key}={_flag(value)}" for key, value in flatten(resolved).items()]
        _write(folder / "config.txt", "\n".join(lines) + "\n")
    return folder / "config.json"


def check_same_run(
    config: ConfigDict | Mapping, workdir: str | os.PathLike, harmless: Sequence[str] = HARMLESS
) -> bool:
    """Refuses to continue a run directory with a config that would change its numbers.

    Args:
      config: The config about to be run.
      workdir: The run directory; it need not exist.
      harmless: Patterns (``fnmatch``) of dotted keys that may differ.

    Returns:
      True if the directory already holds this run, False if it is new.

    Raises:
      ConfigError: Listing every differing key with both values, or if config.json is damaged.
    """
    file = Path(workdir) / "config.json"
    # Another process may be writing it just now: all go by what process 0 sees.
    if not (hosts.first(file.exists()) if hosts.joined() else file.exists()):
        return False
    try:
        old = flatten(json.loads(file.read_text(encoding="utf-8")))
    except (json.JSONDecodeError, AttributeError) as error:
        raise ConfigError(
            f"{file} cannot be read ({error}), so it is unknown which run {workdir} holds. "
            "Pass another --workdir, or restore the file."
        ) from error
    new = flatten(resolve(config))
    differing = [
        f"{key}: was {_show(old, key)}, now {_show(new, key)}"
        for key in [*old, *(key for key in new if key not in old)]
        if (key not in old or key not in new or not _same(old[key], new[key]))
        and not any(fnmatch.fnmatchcase(key, pattern) for pattern in harmless)
    ]
    if differing:
        raise ConfigError(
            f"{workdir} already holds a run with another config ({'; '.join(differing)}). "
            "Pass another --workdir to start a new run, or undo these changes to continue the old."
        )
    return True


def _check_same_everywhere(mine: Mapping[str, Any]) -> None:
    if not hosts.joined():
        return
    theirs = hosts.first(mine)
    differing = [
        f"{key}: {_show(theirs, key)} in process 0, {_show(mine, key)} in process {hosts.index()}"
        for key in {**theirs, **mine}
        if key not in theirs or key not in mine or not _same(theirs[key], mine[key])
    ]
    found = [line for lines in hosts.gather(differing) for line in lines]
    if found:
        raise ConfigError(
            f"the processes of this job were started with different configs ({'; '.join(found)}). "
            "Start every process with the same command."
        )


def _jsonable(value: Any, path: str) -> Any:
    if isinstance(value, (ConfigDict, Mapping)):
        return {str(key): _jsonable(value[key], f"{path}.{key}") for key in value}
    if isinstance(value, (list, tuple)):
        return [_jsonable(item, f"{path}[{i}]") for i, item in enumerate(value)]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:
        return value.item()
    raise ConfigError(
        f"{path} is a {type(value).__name__}; a config holds only text, numbers, booleans, lists "
        "and sections. Write the name of the choice instead of the object."
    )


def _same(a: Any, b: Any) -> bool:
    both_nan = isinstance(a, float) and isinstance(b, float) and math.isnan(a) and math.isnan(b)
    return both_nan or a == b


def _show(values: Mapping[str, Any], key: str) -> str:
    return repr(values[key]) if key in values else "not set"


def _flag(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return str(value).lower()
    return value if isinstance(value, str) else repr(value)


def _write(file: Path, text: str) -> None:
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, file)


def without(config: ConfigDict, *keys: str) -> ConfigDict:
    """A copy of a config without some of its keys."""
    rest = config.copy_and_resolve_references()
    with rest.unlocked():
        for key in keys:
            del rest[key]
    return rest
