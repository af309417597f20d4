"""The one training loop; algorithms differ in the batches and the objective, never here."""

import dataclasses
import itertools
import logging
import math
import os
import signal
import threading
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from aa_jax import hosts
from aa_jax.errors import AaJaxError, ConfigError, DataError
from aa_jax.losses.base import Ratio
from aa_jax.sharding.batches import Share, pad_rows, put_batch, rows
from aa_jax.training.checkpoint import Checkpointer, check_fingerprint
from aa_jax.training.metrics import MetricWriter
from aa_jax.training.observe import Observer
from aa_jax.training.progress import Progress
from aa_jax.training.state import TrainState, as_abstract, frozen_paths, merge, split
from aa_jax.training.step import Step

log = logging.getLogger(__name__)

# An objective whose loss and metrics["loss"] differ by more than this is wrong, not rounded.
_LOSS_GAP = 1e-3
_DATA_ENDED = "data_ended"
_SYNC_POINTS = itertools.count()


def fit(
    *,
    step: Step,
    state: TrainState,
    batches: Any,
    total_steps: int,
    workdir: str | os.PathLike,
    stage: str = "train",
    checkpoint_every: int | None = None,
    keep_last: int = 2,
    keep_best: str | None = None,
    best_mode: str = "min",
    log_every: int = 1,
    evaluate: Callable[[TrainState, int], Mapping[str, float]] | None = None,
    eval_every: int | None = None,
    writer: Any = None,
    roles: Mapping[str, Any] | None = None,
    config: Mapping[str, Any] | None = None,
    may_differ: Sequence[str] = (),
    skip_nonfinite: bool = False,
    save_frozen: bool = True,
    profile: int | None = None,
) -> TrainState:
    """Trains until `total_steps` updates are done or the batches end, and returns the state.

    Calling it again with the same `workdir` and `stage` continues from the newest checkpoint, bit
    for bit as if it had never stopped, or returns the final state at once if it was done. SIGTERM
    and SIGINT write a checkpoint after the current step, then end the program (`SystemExit`,
    `KeyboardInterrupt`); a second signal does not wait. Of several processes it is enough that one
    gets the signal: all save after the same step and end with SIGTERM's code.

    Args:
      step: From `make_step`.
      state: From `init_state`; consumed. Also says what a checkpoint must look like.
      batches: Iterator of host batches with ``get_state()`` and ``set_state()``, e.g. a grain
        iterator. If it has ``set_params``, it is called before each batch with the current
        parameters (on-policy data). Under several processes each hands in the same whole batches,
        or, if it has a ``share`` (`sharding.Share`, as those of a `Loader` have), its own rows.
      total_steps: Number of updates.
      workdir: Run directory; checkpoints go to ``checkpoints/<stage>``, metrics to metrics.jsonl.
      stage: Name of this run of the loop within the run directory.
      checkpoint_every: Steps between checkpoints; None for only a final one.
      keep_last: Checkpoints to keep.
      keep_best: Also keep the one with the best value of this evaluation figure.
      best_mode: "min" or "max" for `keep_best`.
      log_every: Steps per line of metrics; sums and counts are added over them.
      evaluate: ``(state, step) -> figures``, written as "eval/<name>".
      eval_every: Steps between evaluations; they also run once at the end.
      writer: A `MetricWriter`; default one for `workdir`.
      roles: Frozen parameter trees for the objective.
      config: What this run is; a checkpoint made with another one is refused.
      may_differ: Globs over dotted config keys that may differ from the checkpoint's.
      skip_nonfinite: Count and skip updates with a loss or gradient that is not finite instead of
        stopping.
      save_frozen: False leaves the step's frozen parameters out of the checkpoints; the state must
        bring the same ones again.
      profile: When to write a trace of some steps, see `aa_jax.training.observe.Observer`.

    Raises:
      AaJaxError: The loss or a gradient is not finite.
      CheckpointError: The checkpoint is of another model or configuration, or cannot be written.
      DataError: A batch does not fit the devices.
    """
    for name, every in [("total_steps", total_steps), ("log_every", log_every)]:
        if every < 1:
            raise ConfigError(f"{name} must be at least 1, got {every}")
    folder = Path(workdir) / "checkpoints" / stage
    watch = Observer(state, step.frozen, workdir, stage, profile)
    with ExitStack() as stack:
        stack.callback(watch.close)
        saver = stack.enter_context(
            Checkpointer(folder, keep_last=keep_last, keep_best=keep_best, best_mode=best_mode)
        )
        run = _Run()
        if saver.steps():

            def check(meta: dict[str, Any]) -> None:
                check_fingerprint(meta["config"], config or {}, may_differ)

            wanted = _release(state, step, roles)
            state, data_state, meta = saver.restore(wanted, check=check)
            run = _Run(**meta["run"])
            run.tokens = run.tokens if hosts.index() == 0 else 0  # all processes' together
            if run.step >= total_steps or _data_ended(folder) == run.step:
                log.info("%s: already done, %d steps", stage, run.step)
                return state
            batches.set_state(data_state)
            log.info("%s: continuing from step %d of %d", stage, run.step, total_steps)
        roles = jax.device_put(dict(roles or {}), step.role_shardings(roles or {}))
        if writer is None:
            writer = stack.enter_context(MetricWriter(workdir, stage))
        writer.rewind(run.step)
        stop = stack.enter_context(_StopSignals(stage))
        shown = None if hosts.index() == 0 else False
        share = getattr(batches, "share", None)
        progress = stack.enter_context(Progress(stage, total_steps, run.step, enabled=shown))
        saved, in_flight = run.step if saver.steps() else -1, None

        def settle() -> None:
            """Reads the figures of the step in flight; waits for the device to finish it."""
            nonlocal in_flight
            if in_flight is None:
                return
            at, metrics, tokens = in_flight
            in_flight = None
            run.add(at, jax.device_get(metrics), tokens, skip_nonfinite)
            if at % log_every == 0 or at == total_steps:
                run.collect()
                steps, figures = run.steps, run.figures()
                writer.write(at, figures | watch.figures(figures, steps))
                progress.update(at, loss=figures["loss"])

        def evaluate_now() -> None:
            figures = {name: float(value) for name, value in evaluate(state, run.step).items()}
            writer.write(run.step, {f"eval/{name}": value for name, value in figures.items()})
            run.evaluated, run.scores = run.step, figures

        def save() -> None:
            nonlocal saved
            run.collect()
            meta = {"config": dict(config or {}), "run": run.as_dict()}
            scores = run.scores if run.evaluated == run.step else {}
            held = () if save_frozen else frozen_paths(state["params"], step.frozen)
            outside = {f"params/{path}" for path in held}
            with watch.saving():
                saver.save(run.step, state, batches.get_state(), meta, scores, outside)
            saved = run.step

        while run.step < total_steps:
            if hasattr(batches, "set_params"):
                batches.set_params(state["params"])
            watch.before(run.step)
            began = time.perf_counter()
            try:
                batch = next(batches)
            except StopIteration:
                break
            batch, tokens = _prepare(batch, step, run, share)
            run.data_seconds += time.perf_counter() - began
            with watch.step(run.step), jax.transfer_guard("disallow"):
                state, metrics = step(state, batch, **roles)
            settle()  # the previous step, so that the device is never idle while the host reads
            run.step += 1
            in_flight = (run.step, metrics, tokens)
            if run.step == total_steps:
                break
            if eval_every and evaluate and run.step % eval_every == 0:
                settle()
                evaluate_now()
                run.restart_clock()
            stopping = stop.asked()
            if stopping or (checkpoint_every and run.step % checkpoint_every == 0):
                settle()
                save()
                run.restart_clock()
            if stopping:
                saver.wait()
                stop.leave(run.step)

        settle()
        if run.steps:
            run.collect()
            steps, figures = run.steps, run.figures()
            writer.write(run.step, figures | watch.figures(figures, steps))
        if evaluate and run.evaluated != run.step:
            evaluate_now()
        if saved != run.step:
            save()
        saver.wait()
        if run.step < total_steps:
            log.info("%s: the data ended after %d steps", stage, run.step)
            if hosts.index() == 0:
                (folder / _DATA_ENDED).write_text(f"{run.step}\n")
        if stop.asked():
            stop.leave(run.step)
    return state


@dataclasses.dataclass
class _Run:
    """What the loop itself has to remember; part of every checkpoint."""

    step: int = 0
    rows: int = 0  # of the largest batch; smaller ones are padded to it
    skipped: int = 0
    evaluated: int = -1
    scores: dict[str, float] = dataclasses.field(default_factory=dict)
    # Since the last line of metrics:
    sums: dict[str, list[list[float]]] = dataclasses.field(default_factory=dict)
    steps: int = 0
    seconds: float = 0.0
    data_seconds: float = 0.0
    tokens: int = 0

    def __post_init__(self) -> None:
        self.restart_clock()

    def as_dict(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    def restart_clock(self) -> None:
        """Forgets the time since the last step: it went into something else."""
        self._clock = time.perf_counter()

    def collect(self) -> None:
        """Process 0, which writes them down, takes over the tokens the others have counted."""
        (total,) = hosts.total([self.tokens])
        self.tokens = int(total) if hosts.index() == 0 else 0

    def add(self, step: int, metrics: Mapping[str, Any], tokens: int, skip: bool) -> None:
        """Adds one step's sums and counts, after judging them."""
        now = time.perf_counter()
        self.seconds += now - self._clock
        self._clock = now
        self.steps += 1
        self.tokens += tokens
        pairs = {name: _pairs(value) for name, value in metrics.items()}
        skipped, gap = pairs.pop("skipped")[0][0], pairs.pop("loss_gap")[0][0]
        loss, norm = _mean(pairs["loss"]), _mean(pairs["grad_norm"])
        if skipped:
            self.skipped += 1
            if not skip:
                raise AaJaxError(
                    f"step {step}: the loss is {loss} and the gradient norm {norm}. The update "
                    "was not applied. Lower the learning rate or clip_norm, look at the batch of "
                    "this step, or pass skip_nonfinite=True to skip and count such steps."
                )
            log.warning("step %d skipped: loss %s, gradient norm %s", step, loss, norm)
            return
        if gap > _LOSS_GAP * max(1.0, abs(loss)):
            raise ConfigError(
                f"step {step}: the objective's loss and the mean(s) of its metrics['loss'] differ "
                f"by {gap:.3g}, so accumulation would train on something else than the loss. "
                "Return metrics['loss'] as Ratio(total, count), or one Ratio per term of the loss."
            )
        for name, terms in pairs.items():
            sums = self.sums.setdefault(name, [[0.0, 0.0] for _ in terms])
            for kept, (total, count) in zip(sums, terms, strict=True):
                kept[0] += total
                kept[1] += count

    def figures(self) -> dict[str, float]:
        """Means since the last call."""
        steps = max(self.steps, 1)
        out = {name: _mean(terms) for name, terms in self.sums.items()}
        out.setdefault("loss", math.nan)
        out |= {
            "skipped": self.skipped,
            "step_seconds": self.seconds / steps,
            "data_seconds": self.data_seconds / steps,
            "compute_seconds": max(self.seconds - self.data_seconds, 0.0) / steps,
            "tokens_per_second": self.tokens / self.seconds if self.seconds else math.nan,
        }
        self.sums, self.steps, self.tokens = {}, 0, 0
        self.seconds = self.data_seconds = 0.0
        return out


class _StopSignals:
    """Notes SIGTERM and SIGINT instead of dying in the middle of a step."""

    def __init__(self, stage: str):
        self._stage, self._received, self._before = stage, None, {}

    def __enter__(self) -> "_StopSignals":
        # Signals reach only the main thread.
        if threading.current_thread() is threading.main_thread():
            note, wanted = self._note, [signal.SIGINT, signal.SIGTERM]
            if hosts.count() > 1:  # JAX's runtime catches SIGTERM, and tells the others
                note, wanted = self._pass_on, [signal.SIGINT]
            self._before = {number: signal.signal(number, note) for number in wanted}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: Any) -> None:
        self._received = number
        self.__exit__()
        self._before = {}
        log.warning("%s: signal %d, saving after this step", self._stage, number)

    def _pass_on(self, number: int, frame: Any) -> None:
        self.__exit__()
        self._before = {}
        os.kill(os.getpid(), signal.SIGTERM)

    def asked(self) -> bool:
        """Whether to stop after this step, on all processes alike."""
        if hosts.count() > 1:
            # Counted over all stages of the program: the runtime's numbers must only grow.
            if multihost_utils.reached_preemption_sync_point(next(_SYNC_POINTS)):
                self._received = signal.SIGTERM
        return self._received is not None

    def leave(self, step: int) -> None:
        """Ends the program the way the signal would have."""
        log.warning("%s: stopped at step %d; run it again to continue", self._stage, step)
        if self._received == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(128 + self._received)


def _prepare(
    batch: Mapping[str, Any], step: Step, run: _Run, share: Share | None
) -> tuple[dict[str, Any], int]:
    """(the batch on the mesh, the real tokens this process counts); a partial batch gets the rows
    of a full one."""
    if share is not None and hosts.count() > 1:
        local = rows(batch)
        if share.total(local) % step.rows_multiple:
            raise DataError(
                f"the processes together make batches of {share.total(local)} rows, which cannot "
                f"be divided into {step.accumulation} micro-batches over {share.pieces} devices: "
                f"give the Loader multiple_of={step.rows_multiple}."
            )
        mine = share.counts(local)
        read = {name: batch[name] for name in ("intervals", "tokens") if name in batch}
        tokens = count_tokens({name: np.asarray(x)[mine] for name, x in read.items()})
        return put_batch(batch, step.mesh, share), tokens
    _check_whole(batch)
    tokens = count_tokens(batch) if hosts.index() == 0 else 0
    batch = pad_rows(batch, step.rows_multiple)
    run.rows = max(run.rows, rows(batch))
    if "sequence_mask" in batch:
        batch = pad_rows(batch, run.rows)
    return put_batch(batch, step.mesh), tokens


def _check_whole(batch: Mapping[str, Any]) -> None:
    """Refuses batches that differ between processes: devices would disagree about their rows."""
    if hosts.count() == 1:
        return
    crc = 0
    for x in jax.tree.leaves(dict(batch)):
        crc = zlib.crc32(np.ascontiguousarray(x).view(np.uint8).reshape(-1), crc)
    if not hosts.same(crc):
        raise DataError(
            "the processes handed in different batches. An iterator without a `share` gives the "
            "same whole batch on every process; one that gives a process its own rows, as a Loader "
            "with share=sharding.share(mesh) does, says so by its attribute `share`."
        )


def count_tokens(batch: Mapping[str, Any]) -> int:
    """Tokens that are not padding: those that may see at least themselves."""
    if "intervals" in batch:
        intervals = np.asarray(batch["intervals"])
        return int(np.count_nonzero(intervals[..., 3] > intervals[..., 2]))
    return int(np.size(batch["tokens"])) if "tokens" in batch else 0


def _release(state: TrainState, step: Step, roles: Mapping[str, Any] | None) -> TrainState:
    """The state to read a checkpoint into: its own memory freed, what it shares kept as it is."""
    shared = {id(x) for x in jax.tree.leaves(roles or {})}
    paths = frozen_paths(state["params"], step.frozen)
    trainable, held = split(state["params"], paths)
    moving = {**state, "params": trainable}
    wanted = as_abstract(moving)
    for x in jax.tree.leaves(moving):
        if isinstance(x, jax.Array) and id(x) not in shared:
            x.delete()
    return {**wanted, "params": merge(wanted["params"], held)}


def _data_ended(folder: Path) -> int | None:
    """The step at which an earlier call ran out of data."""
    path = folder / _DATA_ENDED
    return int(path.read_text()) if path.exists() else None


def _pairs(value: Any) -> list[list[float]]:
    terms = [value] if isinstance(value, Ratio) else value
    return [[float(term.total), float(term.count)] for term in terms]


def _mean(terms: Sequence[Sequence[float]]) -> float:
    """Sum of the means; NaN, a gap in the chart, where nothing was counted."""
    return sum(total / count if count else math.nan for total, count in terms)
