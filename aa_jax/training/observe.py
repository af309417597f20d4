"""Where a run's time and memory go: checkpoints, MFU, high-water marks, traces."""

import contextlib
import logging
import math
import os
import resource
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax

from aa_jax.errors import ConfigError
from aa_jax.platforms.chips import find_chip
from aa_jax.training.flops import model_flops
from aa_jax.training.state import TrainState, frozen_paths, split

log = logging.getLogger(__name__)

TRACED = 3
"""Steps of a trace."""


class Observer:
    """Measures what the loop cannot see from its metrics.

    Figures beside the loop's own (step_seconds = data_seconds + compute_seconds, and
    tokens_per_second, all without checkpoints and evaluations):

      checkpoint_seconds: per step, the time training stood still for checkpoints;
      mfu: model FLOPs utilisation (Chowdhery et al. 2022, appendix B): FLOPs the model itself needs
        for the real tokens (6 per trained weight, 2 per frozen one; no recomputation, no attention
        scores, no padding) over what the devices could do in that time at their dense bfloat16
        peak; absent for devices that `platforms.chips` does not know, such as CPUs;
      memory_peak_gib: most memory in use since the start, on the fullest local device; on a CPU the
        largest size of the process.

    Args:
      state: the train state, only its shapes are read.
      frozen: globs of parameters that do not train.
      workdir: run directory.
      stage: name of the training.
      profile: after this many steps a trace of the next `TRACED` is written to
        ``workdir/profile/<stage>``, which TensorBoard and XProf open; None for none. The first step
        compiles, so 2 or more shows a usual one.

    Raises:
      ConfigError: a negative `profile`.
    """

    def __init__(
        self,
        state: TrainState,
        frozen: Any,
        workdir: str | os.PathLike,
        stage: str,
        profile: int | None = None,
    ):
        if profile is not None and profile < 0:
            raise ConfigError(f"profile is {profile}: give the number of steps before the trace.")
        params = state["params"]
        trained = split(params, frozen_paths(params, frozen))[0]
        self.flops_per_token = model_flops(params, trained, 1)
        chip = find_chip(jax.devices()[0].device_kind)
        self._peak = chip.peak * jax.device_count() if chip else None
        self._folder = Path(workdir) / "profile" / stage
        self._first = profile
        self._tracing = False
        self._saving = 0.0

    def figures(self, figures: Mapping[str, float], steps: int) -> dict[str, float]:
        """Further figures of the steps since the last call.

        Args:
          figures: of the loop, with tokens_per_second.
          steps: how many they were.
        """
        out = {"checkpoint_seconds": self._saving / max(steps, 1)}
        self._saving = 0.0
        rate = figures.get("tokens_per_second", math.nan)
        if self._peak:
            out["mfu"] = self.flops_per_token * rate / self._peak
        if memory := memory_peak():
            out["memory_peak_gib"] = memory / 2**30
        return out

    @contextlib.contextmanager
    def saving(self) -> Iterator[None]:
        """Around whatever training waits for while a checkpoint is written."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self._saving += time.perf_counter() - began

    def before(self, step: int) -> None:
        """Called with the number of steps done, before the next one starts."""
        if self._first is not None and step == self._first and not self._tracing:
            jax.profiler.start_trace(str(self._folder))
            self._tracing = True
        elif self._tracing and step >= self._first + TRACED:
            self.close()

    def step(self, step: int) -> contextlib.AbstractContextManager:
        """Around a step's dispatch, so that a trace is divided into steps."""
        if not self._tracing:
            return contextlib.nullcontext()
        return jax.profiler.StepTraceAnnotation("train", step_num=step)

    def close(self) -> None:
        """Ends a trace that still runs, so that its file is complete."""
        if self._tracing:
            self._tracing, self._first = False, None
            jax.profiler.stop_trace()
            log.info("trace written: tensorboard --logdir %s", self._folder)


def memory_peak() -> int:
    """Bytes, see `Observer`; 0 where nobody counts them."""
    counted = [(device.memory_stats() or {}) for device in jax.local_devices()]
    peaks = [stats.get("peak_bytes_in_use", 0) for stats in counted]
    if any(peaks):
        return max(peaks)
    if jax.default_backend() != "cpu":
        return 0
    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return size if sys.platform == "darwin" else size * 1024
