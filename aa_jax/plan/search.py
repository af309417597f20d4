"""The largest micro-batch and the least recomputation that fit."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from aa_jax.errors import ConfigError
from aa_jax.plan.measure import Figures, measure
from aa_jax.plan.program import Layout, build
from aa_jax.plan.targets import Slice
from aa_jax.sharding import batch_devices, make_mesh

REMAT = ("none", "dots", "full")  # from the least recomputation to the most


def search(
    config: Mapping[str, Any],
    model_name: str,
    place: Slice,
    *,
    total_rows: int | None = None,
    remat: Sequence[str] = REMAT,
    rows: Iterable[int] | None = None,
    layout: Layout | None = None,
    tell: Callable[[Figures], None] = lambda figures: None,
) -> tuple[Figures | None, list[Figures]]:
    """Tries micro-batches and policies; the update's rows stay the same, accumulation fills up.

    A policy's micro-batch is doubled until one does not fit. Best is the cheapest in FLOPs per row
    among those that fit, then the larger micro-batch: recomputation costs time, and a device that
    is busy anyway gains nothing from more rows.

    Args:
      config: see `program.build`.
      model_name: see `program.build`.
      place: devices with a known chip.
      total_rows: examples per update; None takes the config's.
      remat: policies to try.
      rows: micro-batch sizes per device to try, ascending; default powers of two.
      layout: see `program.build`.
      tell: called with each result.

    Returns:
      The best (None: nothing fits) and all that were compiled.

    Raises:
      ConfigError: the rows of an update do not divide over the devices.
    """
    pieces = batch_devices(make_mesh(**(config.get("mesh") or {}), devices=place.devices))
    total = total_rows or update_rows(config)
    if total % pieces:
        raise ConfigError(
            f"an update of {total} rows cannot be divided over {pieces} devices; set the rows of "
            f"an update to a multiple of {pieces}, or give tensor or seq some of the devices."
        )
    most = total // pieces
    sizes = list(rows) if rows else [2**n for n in range(int(math.log2(most)) + 1)]
    tried: list[Figures] = []
    for policy in remat:
        for size in sizes:
            if size > most or most % size:
                continue
            program = build(
                config, model_name, place.devices, rows=total, accumulation=most // size,
                remat=policy, layout=layout,
            )  # fmt: skip
            found = measure(program, place, policy)
            tried.append(found)
            tell(found)
            if not found.fits:
                break
    fitting = [f for f in tried if f.fits]
    best = min(fitting, key=lambda f: (f.flops / f.tokens, -f.rows), default=None)
    return best, tried


def update_rows(config: Mapping[str, Any]) -> int:
    """Examples per update, as a config has it."""
    if "recipe" in config:
        return config["train"].get("batch_rows", 8)
    plan = config["rollout"]
    return plan["prompts"] // plan.get("minibatches", 1)
