"""A config section is the keyword arguments of one real function: checked, then bound."""

import difflib
import functools
import inspect
import os
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Union

from ml_collections import ConfigDict
from ml_collections.config_dict import RequiredValueError

from aa_jax.errors import ConfigError

_NAMES = {
    bool: "true or false",
    int: "an integer",
    float: "a number",
    str: "text",
    type(None): "none",
    dict: "a section",
    list: "a list",
    tuple: "a list",
}
_KEYWORDS = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


def bind(
    function: Callable,
    section: ConfigDict | Mapping | None = None,
    path: str = "config",
    **fixed: Any,
) -> functools.partial:
    """Checks a config section against a function's signature and binds it as keywords.

    Keys are compared with the parameters, values with the plain types among the annotations (or
    with the default's type where there is no annotation); arrays, callables and classes are left
    to the function. Sub-sections become plain dicts, lists become tuples where one is annotated.

    Args:
      function: The function (or class) whose keyword arguments the section holds.
      section: The section; None means "all defaults".
      path: Where the section stands, for the error messages.
      **fixed: Arguments the program itself supplies; the section may not set them.

    Returns:
      ``functools.partial(function, **fixed, **section)``, to be called with what is left.

    Raises:
      ConfigError: Unknown keys (with the accepted ones and the nearest), a value of the wrong
        type, a required value that was never given, or a key the program itself supplies.
    """
    name = getattr(function, "__qualname__", None) or repr(function)
    parameters = inspect.signature(function).parameters
    accepted = [key for key, p in parameters.items() if p.kind in _KEYWORDS]
    open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    unknown = [key for key in fixed if key not in accepted]
    if unknown and not open_ended:
        raise TypeError(f"{name}() takes no argument {unknown[0]!r}")  # a bug, not a user error

    values = _plain(section, path)
    _check_keys(values, accepted, fixed, open_ended, name, path)
    hints = _hints(function)
    for key, value in values.items():
        if key not in parameters:
            continue
        hint = hints.get(key, _hint_of_default(parameters[key].default))
        ok, values[key] = _match(value, hint)
        if not ok:
            raise ConfigError(
                f"{path}.{key} of {name}() expects {_describe(hint)}, but the config has "
                f"{value!r}, which is {_NAMES.get(type(value), type(value).__name__)}."
            )
    return functools.partial(function, **fixed, **values)


def _plain(section: ConfigDict | Mapping | None, path: str) -> dict[str, Any]:
    if section is None:
        return {}
    values = {}
    for key in section:
        try:
            value = section[key]
        except RequiredValueError:
            raise ConfigError(
                f"{path}.{key} is required and has no value: pass --{path}.{key}=..."
            ) from None
        values[str(key)] = _unwrap(value, f"{path}.{key}")
    return values


def _unwrap(value: Any, path: str) -> Any:
    if isinstance(value, (ConfigDict, Mapping)):
        return _plain(value, path)
    if isinstance(value, (list, tuple)):
        return type(value)(_unwrap(item, f"{path}[{i}]") for i, item in enumerate(value))
    return value


def _check_keys(values, accepted, fixed, open_ended: bool, name: str, path: str) -> None:
    taken = [key for key in values if key in fixed]
    if taken:
        raise ConfigError(
            f"{path}.{taken[0]} cannot be set: the program supplies {taken[0]!r} of {name}() "
            "itself. Remove the key from the config."
        )
    unknown = [key for key in values if key not in accepted]
    if not unknown or open_ended:
        return
    free = [key for key in accepted if key not in fixed]
    near = {key: difflib.get_close_matches(key, free, 1) for key in unknown}
    listed = ", ".join(
        f"{key!r}" + (f" (did you mean {near[key][0]!r}?)" if near[key] else "") for key in unknown
    )
    raise ConfigError(
        f"{path} holds the arguments of {name}(), which has no {listed}. "
        f"It accepts: {', '.join(free) or 'nothing'}."
    )


def _hints(function: Callable) -> dict[str, Any]:
    target = function.func if isinstance(function, functools.partial) else function
    target = target.__init__ if inspect.isclass(target) else inspect.unwrap(target)
    try:
        return typing.get_type_hints(target)
    except (NameError, TypeError, SyntaxError):
        # Shape annotations of a forward reference cannot be evaluated here: check keys only.
        return {}


def _hint_of_default(default: Any) -> Any:
    if default is inspect.Parameter.empty or default is None or callable(default):
        return Any
    return type(default)


def _match(value: Any, hint: Any) -> tuple[bool, Any]:
    """(is `value` acceptable for `hint`, the value converted to it)."""
    origin = typing.get_origin(hint)
    if origin in (Union, types.UnionType):
        results = [_match(value, arm) for arm in typing.get_args(hint)]
        # An arm that fits as it stands beats one that needs a conversion (int for int | float).
        exact = [r for r in results if r[0] and type(r[1]) is type(value)]
        return (exact or [r for r in results if r[0]] or [(False, value)])[0]
    if origin is Literal:
        return value in typing.get_args(hint), value
    if origin is typing.Annotated:
        return _match(value, typing.get_args(hint)[0])
    base = origin or hint
    if base is None or base is type(None):
        return value is None, value
    if base is bool or base is str:
        return isinstance(value, base), value
    if base is int:
        return type(value) is int, value
    if base is float:
        number = type(value) in (int, float)
        return number, float(value) if number else value
    if base in (tuple, list, Sequence):
        if not isinstance(value, (tuple, list)):
            return False, value
        return _match_items(value, base, typing.get_args(hint))
    if base in (dict, Mapping):
        return isinstance(value, dict), value
    if inspect.isclass(base) and issubclass(base, os.PathLike):
        is_path = isinstance(value, (str, os.PathLike))
        return is_path, base(value) if is_path and not inspect.isabstract(base) else value
    return True, value


def _match_items(value, base: Any, arguments: tuple) -> tuple[bool, Any]:
    kind = type(value) if base is Sequence else base
    if not arguments:
        return True, kind(value)
    if base is tuple and Ellipsis not in arguments:
        if len(arguments) != len(value):
            return False, value
        pairs = zip(value, arguments, strict=True)
    else:
        pairs = ((item, arguments[0]) for item in value)
    results = [_match(item, hint) for item, hint in pairs]
    return all(ok for ok, _ in results), kind(item for _, item in results)


def _describe(hint: Any) -> str:
    arms = typing.get_args(hint)
    origin = typing.get_origin(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(_describe(arm) for arm in arms)
    if origin is Literal:
        return "one of " + ", ".join(repr(arm) for arm in arms)
    if origin is tuple and Ellipsis not in arms:
        return f"a list of {len(arms)} ({', '.join(_describe(arm) for arm in arms)})"
    if origin in (tuple, list, Sequence) and arms:
        return f"a list of {_describe(arms[0])}"
    return _NAMES.get(origin or hint, getattr(origin or hint, "__name__", str(hint)))
