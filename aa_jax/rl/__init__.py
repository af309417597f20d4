"""Reinforcement learning: rollouts, rewards, and the batches a policy is updated on."""

from collections.abc import Callable
from typing import Any

from aa_jax.config import without
from aa_jax.errors import ConfigError

PIPELINES = ("digits", "dataset", "arithmetic")


def select(config: Any) -> tuple[Callable[..., dict], Any]:
    """The run a config names by its key `pipeline`, and the config without that key.

    "digits", "arithmetic": embedded worlds, from nothing. "dataset": a checkpoint and a dataset of
    your own.

    Args:
      config: a ConfigDict.

    Raises:
      ConfigError: there is no such pipeline.
    """
    name = config.get("pipeline")
    if name not in PIPELINES:
        raise ConfigError(f"config.pipeline is {name!r}; it must be one of {', '.join(PIPELINES)}.")
    if name == "digits":
        from aa_jax.rl.digits_run import run
    elif name == "arithmetic":
        from aa_jax.rl.arithmetic_run import run
    else:
        from aa_jax.rl.dataset_run import run
    return run, without(config, "pipeline")
