"""A config file and its command line: load, override with checked types, lock."""

import ast
import contextlib
import difflib
import os
import re
import runpy
import traceback
from collections.abc import Sequence
from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import RequiredValueError

from aa_jax.errors import AaJaxError, ConfigError

_NAMES = {bool: "true or false", int: "an integer", float: "a number", str: "text"}
_STEP = re.compile(r"\.?([^.\[\]]+)|\[(\d+)\]")


def load(path: str | os.PathLike, overrides: Sequence[str] = ()) -> ConfigDict:
    """Loads a config file, applies overrides in order, and locks the result.

    Args:
      path: A Python file with ``get_config()``; ``file.py:text`` calls ``get_config("text")``.
      overrides: What a person types: ``--config.optim.lr=1e-6``, ``--noconfig.shuffle``,
        ``--config.sources[0].path=data.jsonl``.

    Returns:
      The locked config. Required placeholders may still be empty, see :func:`require`.

    Raises:
      ConfigError: The file is missing or broken, a key is unknown, or a value has the wrong type.
    """
    file, _, argument = os.fspath(path).partition(":")
    config = _run_file(file, argument)
    for override in overrides:
        _apply(config, override, file)
    _lock(config)
    return config


def missing(config: ConfigDict) -> list[str]:
    """Dotted keys of the required placeholders that nothing has filled."""
    found = []
    for key in config:
        try:
            value = config[key]
        except RequiredValueError:
            found.append(str(key))
            continue
        if isinstance(value, ConfigDict):
            found.extend(f"{key}.{inner}" for inner in missing(value))
    return found


def require(config: ConfigDict) -> None:
    """Raises if a required value was never given.

    Raises:
      ConfigError: Naming the flag of every value still missing.
    """
    empty = missing(config)
    if empty:
        flags = " ".join(f"--config.{key}=..." for key in empty)
        noun = "a required value is" if len(empty) == 1 else f"{len(empty)} required values are"
        raise ConfigError(
            f"{noun} not set: {', '.join(empty)}. Give it on the command line: {flags}"
        )


def _run_file(file: str, argument: str) -> ConfigDict:
    if not file:
        raise ConfigError("no config file was given: pass --config=configs/<task>/<name>.py")
    if not os.path.isfile(file):
        raise ConfigError(f"config file {file} does not exist.{_similar_file(file)}")
    try:
        get_config = runpy.run_path(file).get("get_config")
        if get_config is None:
            raise ConfigError(
                f"{file} defines no get_config(). A config file is Python with a function "
                "get_config() that returns an ml_collections.ConfigDict."
            )
        config = get_config(*([argument] if argument else []))
    except AaJaxError:
        raise
    except SyntaxError as error:
        raise ConfigError(
            f"{error.filename or file}, line {error.lineno}: {error.msg} "
            f"({(error.text or '').strip()!r}). Fix the syntax of the config file."
        ) from error
    except Exception as error:
        frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename == file]
        line = f", line {frames[-1].lineno}" if frames else ""
        raise ConfigError(
            f"{file}{line}: running the config file failed with {type(error).__name__}: {error}"
        ) from error
    if isinstance(config, dict):
        config = ConfigDict(config)
    if not isinstance(config, ConfigDict):
        raise ConfigError(
            f"get_config() in {file} returned {type(config).__name__}; it must return an "
            "ml_collections.ConfigDict (is a return statement missing?)."
        )
    return config


def _similar_file(file: str) -> str:
    folder = os.path.dirname(file) or "."
    if not os.path.isdir(folder):
        return f" The folder {folder} does not exist either; paths are relative to {os.getcwd()}."
    there = sorted(name for name in os.listdir(folder) if name.endswith(".py"))
    near = difflib.get_close_matches(os.path.basename(file), there, 1)
    if near:
        return f" Did you mean {os.path.join(os.path.dirname(file), near[0])}?"
    return f" {folder} holds: {', '.join(there) or 'no config files'}."


def _lock(config: ConfigDict) -> None:
    for key in config:
        with contextlib.suppress(RequiredValueError):
            if isinstance(config[key], ConfigDict):
                _lock(config[key])
    # lock() reads every value after setting the flag, and an empty placeholder raises when read.
    with contextlib.suppress(RequiredValueError):
        config.lock()


def _apply(config: ConfigDict, override: str, file: str) -> None:
    name, equals, text = override.lstrip("-").partition("=")
    if not equals:
        # `--config.shuffle` and `--noconfig.shuffle`, as absl has it for its own flags.
        text = "false" if name.startswith("noconfig.") else "true"
        name = name.removeprefix("no")
    if not name.startswith("config."):
        raise ConfigError(f"override {override!r} is not of the form --config.key=value")
    dotted = name.removeprefix("config.")
    steps = [int(index) if index else key for key, index in _STEP.findall(dotted)]
    if not steps:
        raise ConfigError(f"override {override!r} names no key: write --config.key=value")
    holder: Any = config
    for depth, step in enumerate(steps):
        _check_step(config, holder, steps, depth, file)
        if depth < len(steps) - 1:
            try:
                holder = holder[step]
            except RequiredValueError:
                raise ConfigError(f"--{name}: {_dotted(steps[: depth + 1])} has no keys.") from None
    last = steps[-1]
    try:
        old = holder[last]
        kind = holder.get_type(last) if isinstance(holder, ConfigDict) else type(old)
    except RequiredValueError:
        old, kind = None, holder.get_ref(last).get_type()
    if kind is ConfigDict:
        _apply_section(config, old, name, text, file)
    else:
        holder[last] = _parse(text, kind, old, name, file)


def _check_step(config: ConfigDict, holder: Any, steps: list, depth: int, file: str) -> None:
    step, section = steps[depth], _dotted(steps[:depth])
    where = f"config.{section}" if section else "the config"
    flag = f"--config.{_dotted(steps)}"
    if isinstance(step, int):
        if not isinstance(holder, list) or step >= len(holder):
            what = f"a list of {len(holder)}" if isinstance(holder, list) else "not a list"
            raise ConfigError(f"{flag}: {where} of {file} is {what}; it has no [{step}].")
        return
    if not isinstance(holder, (ConfigDict, dict)):  # dicts in lists stay dicts
        raise ConfigError(f"{flag}: {where} of {file} is a value, not a section; it has no keys.")
    if step in holder:
        return
    keys = [str(key) for key in holder]
    near = difflib.get_close_matches(step, keys, 1)
    if near:
        meant = f" Did you mean --config.{_dotted([*steps[:depth], near[0], *steps[depth + 1 :]])}?"
    else:
        elsewhere = [key for key in _all_keys(config) if key.rsplit(".", 1)[-1] == steps[-1]]
        meant = f" Did you mean --config.{elsewhere[0]}?" if elsewhere else ""
    raise ConfigError(
        f"{flag}: unknown key {step!r} in {where} of {file}.{meant} "
        f"Known keys: {', '.join(keys) or 'none'}."
    )


def _apply_section(config: ConfigDict, old: ConfigDict, name: str, text: str, file: str) -> None:
    """`--config.optim="{'lr': 1e-6}"`: key by key, unless the section is an empty, open one."""
    try:
        new = ast.literal_eval(text)
    except (SyntaxError, ValueError):
        new = None
    if not isinstance(new, dict):
        example = f"--{name}.{next(iter(old.keys()), 'key')}=..."
        raise ConfigError(
            f"--{name} is a section of {file}, not a value; got {text!r}. Set its keys one by one "
            f"({example}) or give a dictionary in Python notation."
        )
    if not len(old):
        old.update(new)
        return
    for key, value in new.items():
        _apply(config, f"--{name}.{key}={value}", file)


def _parse(text: str, kind: type, old: Any, name: str, file: str) -> Any:
    """Reads `text` as a value of type `kind`, or raises naming key, expected and given type."""
    if kind is str:
        return text
    literal = _literal(text)
    if literal is None and text in ("none", "None"):
        return None
    if kind is bool and literal in (True, False):
        return bool(literal)
    if kind is int and type(literal) is int:
        return literal
    if kind is float:
        with contextlib.suppress(ValueError):
            return float(text)
    if kind in (tuple, list):
        items = literal if isinstance(literal, (tuple, list)) else _split(text)
        wanted = {type(item) for item in old or ()}
        if len(wanted) == 1:
            items = [
                _parse(str(item), *wanted, None, f"{name}[{i}]", file)
                for i, item in enumerate(items)
            ]
        return kind(items)
    if kind is type(None) or kind is object:
        return literal
    if isinstance(literal, kind):
        return literal
    now = "" if old is None else f" (it is {old!r} in {file})"
    raise ConfigError(
        f"--{name} expects {_NAMES.get(kind, 'a ' + kind.__name__)}{now}, "
        f"but got {text!r}, which is {_NAMES.get(type(literal), type(literal).__name__)}."
    )


def _literal(text: str) -> Any:
    if text in ("true", "false"):
        return text == "true"
    try:
        return ast.literal_eval(text)
    except (SyntaxError, ValueError):
        return None if text in ("none", "null") else text


def _split(text: str) -> list:
    return [_literal(part.strip()) for part in text.split(",") if part.strip()]


def _dotted(steps: Sequence[str | int]) -> str:
    text = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in steps)
    return text.removeprefix(".")


def _all_keys(config: ConfigDict) -> list[str]:
    keys = []
    for key in config:
        with contextlib.suppress(RequiredValueError):
            if isinstance(config[key], ConfigDict):
                keys += [f"{key}.{inner}" for inner in _all_keys(config[key])]
                continue
        keys.append(str(key))
    return keys
