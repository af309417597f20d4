"""The clock of the benchmarks: sides in turn, ratios round by round, and where it was measured."""

import contextlib
import datetime
import functools
import importlib.metadata
import math
import os
import statistics
import time
from collections.abc import Callable, Collection
from pathlib import Path

from aa_jax import platforms


def timed(call: Callable) -> tuple:
    """(seconds, result)."""
    start = time.perf_counter()
    value = call()
    return time.perf_counter() - start, value


def measure(
    sides: dict[str, Callable],
    baselines: Collection[str],
    tokens: int,
    *,
    repetitions: int,
    seconds: float,
) -> dict:
    """Times the sides in turn, A B C A B C ...

    Args:
      sides: name -> what is timed.
      baselines: the sides the others are divided by.
      tokens: that one call works through.
      repetitions: rounds.
      seconds: a side is called in a row until the fastest takes at least this.

    Returns:
      Seconds and CPU seconds per call of every round, tokens per second, and ratios, taken round
      by round: above 1 the side named first is faster.
    """
    calls = math.ceil(seconds / min(timed(call)[0] for call in sides.values()))
    wall: dict[str, list[float]] = {name: [] for name in sides}
    busy: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(repetitions):
        for name, call in sides.items():
            before = time.process_time()
            spent, _ = timed(lambda call=call: [call() for _ in range(calls)])
            wall[name].append(spent / calls)
            busy[name].append((time.process_time() - before) / calls)
    ratios = {
        f"{side} / {base}": spread([b / a for a, b in zip(wall[side], wall[base], strict=True)])
        for base in wall
        for side in wall
        if base in baselines and side not in baselines
    }
    rates = {name: spread([tokens / s for s in spent]) for name, spent in wall.items()}
    return {
        "tokens_per_call": tokens, "calls_per_round": calls, "seconds_per_call": wall,
        "cpu_seconds_per_call": busy, "tokens_per_second": rates, "ratio": ratios,
    }  # fmt: skip


def spread(values: list[float]) -> dict[str, float]:
    """Median, min and max."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def show(title: str, measured: dict) -> None:
    """Prints one measurement."""
    print(f"\n{title}\n  {'':26}{'tokens/s':>9}   {'min - max':<15}{'ms/call':>8}{'CPU ms':>8}"
          f"{'threads':>9}{'first call':>12}")  # fmt: skip
    for side, rate in measured["tokens_per_second"].items():
        each, busy = (
            1e3 * statistics.median(measured[f"{kind}seconds_per_call"][side])
            for kind in ("", "cpu_")
        )
        print(f"  {side:26}{rate['median']:>9.0f}   {rate['min']:>6.0f} - {rate['max']:<6.0f}"
              f"{each:>8.1f}{busy:>8.1f}{measured['threads'][side]:>9}"
              f"{measured['first_call_seconds'][side]:>10.2f} s")  # fmt: skip
    for name, ratio in measured["ratio"].items():
        print(f"  {name}: {ratio['median']:.2f}x  ({ratio['min']:.2f} - {ratio['max']:.2f})")


@functools.cache
def cores() -> int:
    """Cores this process may use."""
    return int(platforms.environment()["CPU cores"])


def environment() -> dict[str, str]:
    """Device, versions, date, and how busy the machine was."""
    facts = platforms.environment()
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        facts["CPU"] = next(line.split(": ")[1] for line in lines if line.startswith("model name"))
    facts |= {name: importlib.metadata.version(name) for name in ("torch", "trl")}
    facts["load average at start"] = f"{os.getloadavg()[0]:.2f}"
    facts["date"] = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return facts
