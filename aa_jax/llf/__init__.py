"""Learning from language feedback: critique, refine, pair, prefer."""

from collections.abc import Callable
from typing import Any

from aa_jax.config import without
from aa_jax.errors import ConfigError

PIPELINES = ("digits", "dataset")


def select(config: Any) -> tuple[Callable[..., dict], Any]:
    """The pipeline a config names by its key `pipeline`, and the config without that key.

    "digits": the embedded world, from nothing. "dataset": a checkpoint and a dataset of your own.

    Args:
      config: a ConfigDict.

    Raises:
      ConfigError: there is no such pipeline.
    """
    name = config.get("pipeline")
    if name not in PIPELINES:
        raise ConfigError(f"config.pipeline is {name!r}; it must be one of {', '.join(PIPELINES)}.")
    if name == "digits":
        from aa_jax.llf.digits_run import run
    else:
        from aa_jax.llf.dataset_run import run
    return run, without(config, "pipeline")
