"""Rewards as a config names them: one, or a weighted sum of several.

    {"kind": "model", "path": "runs/reward/model"}
    {"terms": {"maths": {}, "format": {"weight": 0.5}, "overlong": {"max_length": 512, "cache": 9}}}

A term is the keyword arguments of its class, plus `kind` (its name, if left out) and `weight`.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from aa_jax.config.binding import bind
from aa_jax.errors import ConfigError
from aa_jax.rewards.base import Clipped, Reward, Weighted
from aa_jax.rewards.code import CodeTests
from aa_jax.rewards.learned import CostModel, RewardModel
from aa_jax.rewards.maths import Maths
from aa_jax.rewards.oracle import Drawing, Falsehood, Oracle
from aa_jax.rewards.remote import HttpReward
from aa_jax.rewards.text import ExactMatch, Format, Length, Overlong

REWARDS: dict[str, Callable[..., Reward]] = {
    "model": RewardModel,
    "cost": CostModel,
    "http": HttpReward,
    "maths": Maths,
    "code": CodeTests,
    "exact": ExactMatch,
    "format": Format,
    "length": Length,
    "overlong": Overlong,
    "oracle": Oracle,
    "drawing": Drawing,
    "falsehood": Falsehood,
}


def make_reward(
    section: Mapping[str, Any],
    *,
    mesh: jax.sharding.Mesh | None = None,
    allowed: Sequence[str] = (),
    path: str = "config.reward",
) -> Reward:
    """The reward that a config section describes.

    Args:
      section: one reward: `kind` (a key of `REWARDS`, or "function"; default "model") and its
        keyword arguments; or `terms`, name -> such a section with a `weight` (default 1; 0 only
        reports it). Either may have `low` and `high`, limits of the whole. The kind "function" has
        `function`, "package.module:name", and `options` for it: a function of requests, or a class
        whose objects are (`aa_jax.rewards.base`).
      mesh: where learned models lie.
      allowed: functions that may be imported, by the name the config gives them.
      path: where the section stands, for errors.

    Raises:
      ConfigError: a kind, key or function that is not there, or a function that is not allowed.
      AaJaxError: from the reward itself, e.g. a missing checkpoint.
    """
    values = dict(section)
    limits = {name: values.pop(name) for name in ("low", "high") if name in values}
    limits = {name: value for name, value in limits.items() if value is not None}
    if "terms" in values:
        terms = values.pop("terms")
        if values or not terms:
            raise ConfigError(
                f"{path}.terms names the rewards of a sum, at least one; beside it stand only low "
                f"and high, not {', '.join(values) or 'nothing at all'}. Put what belongs to one "
                "reward into its term."
            )
        rewards, weights = {}, {}
        for name, own in terms.items():
            own = {"kind": name, **(own or {})}
            weights[name] = own.pop("weight", 1.0)
            rewards[name] = _one(own, mesh, allowed, f"{path}.terms.{name}")
        reward: Reward = Weighted(rewards, weights)
    else:
        reward = _one({"kind": "model", **values}, mesh, allowed, path)
    return Clipped(reward, **limits) if limits else reward


def _one(section: dict[str, Any], mesh: Any, allowed: Sequence[str], path: str) -> Reward:
    kind = section.pop("kind")
    if kind == "function":
        return bind(_imported, section, path=path, allowed=tuple(allowed), path_of=path)()
    if kind not in REWARDS:
        raise ConfigError(
            f"{path}.kind is {kind!r}; there are {', '.join(REWARDS)}, and 'function' for a Python "
            "function of your own."
        )
    make = REWARDS[kind]
    fixed = {"mesh": mesh} if "mesh" in inspect.signature(make).parameters else {}
    try:
        inspect.signature(make).bind(**fixed, **section)
    except TypeError as error:
        if str(error).startswith("missing"):
            raise ConfigError(f"{path} ({kind}): {error}.") from None
    return bind(make, section, path=path, **fixed)()


def _imported(
    function: str,
    options: Mapping[str, Any] | None = None,
    *,
    allowed: Sequence[str],
    path_of: str,
) -> Reward:
    """A user's function, imported only if the user said so: it runs with all of their rights."""
    if function not in allowed:
        raise ConfigError(
            f"{path_of}.function is {function!r}, code that is not part of aa_jax and would run "
            f"with your rights. Allow it by name: allowed_functions=('{function}',) in the config."
        )
    module, _, name = function.partition(":")
    if not module or not name:
        raise ConfigError(
            f"{path_of}.function is {function!r}; write package.module:name, like my_rewards:score."
        )
    try:
        found = getattr(importlib.import_module(module), name)
    except ImportError as error:
        raise ConfigError(
            f"{path_of}.function: {module} cannot be imported ({error}). Install it, or put its "
            "folder on PYTHONPATH."
        ) from error
    except AttributeError:
        raise ConfigError(f"{path_of}.function: {module} has no {name!r}.") from None
    if not callable(found):
        raise ConfigError(f"{path_of}.function: {function} is no function.")
    if inspect.isclass(found):
        return bind(found, options, path=f"{path_of}.options")()
    reward = bind(found, options, path=f"{path_of}.options")
    return functools.update_wrapper(reward, found) if options else found
