"""Checkpoints: the state, where the data stood, and what the run was, saved as one.

A checkpoint is atomic (a killed save leaves nothing that looks like one), written in the
background, verified when read, and opens on another mesh.
"""

import contextlib
import gc
import logging
import os
import shutil
import traceback
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from etils import epath

from aa_jax import hosts
from aa_jax.errors import AaJaxError, CheckpointError
from aa_jax.sharding.rules import path_name
from aa_jax.training.checksums import checksums
from aa_jax.training.jsonable import digest, flatten, from_json, to_json

log = logging.getLogger(__name__)

_DAMAGED = "damaged"
_OUTSIDE = "outside"
_UNFINISHED = ".orbax-checkpoint-tmp"


class _Damaged(Exception):
    """A checkpoint that is complete by its name but cannot be read as it was written."""


class Checkpointer:
    """The checkpoints of one training stage, ``folder/<step>``.

    Use as a context manager, or call `close`: a save goes on in the background until then.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        *,
        keep_last: int = 2,
        keep_best: str | None = None,
        best_mode: str = "min",
    ):
        """Opens (and creates) the folder; removes what killed saves left in it.

        Args:
          folder: Folder of this stage's checkpoints.
          keep_last: Number of newest checkpoints to keep, at least 1. An older one is removed
            only after a newer one is complete.
          keep_best: Also keep the checkpoint with the best value of this metric.
          best_mode: "min" or "max".
        """
        if keep_last < 1 or best_mode not in ("min", "max"):
            raise CheckpointError(
                f"keep_last must be at least 1 and best_mode 'min' or 'max', got {keep_last} and "
                f"{best_mode!r}"
            )
        self.folder = Path(folder).absolute()
        self._keep_last, self._keep_best, self._best_mode = keep_last, keep_best, best_mode
        self._scores: dict[int, float | None] = {}
        with self._writing("be opened"):
            self.folder.mkdir(parents=True, exist_ok=True)
            # Orbax's own option removes them in the background and waits only before a save:
            # a run that only reads could leave them.
            if hosts.index() == 0:
                for left in self.folder.glob(f"*{_UNFINISHED}*"):
                    shutil.rmtree(left)
            self._manager = ocp.CheckpointManager(
                self.folder,
                options=ocp.CheckpointManagerOptions(max_to_keep=None),
            )

    def steps(self) -> list[int]:
        """The complete checkpoints, oldest first; waits for one that is being written."""
        self.wait()
        return sorted(self._manager.all_steps())

    def save(
        self,
        step: int,
        state: Any,
        data_state: Any = None,
        meta: Mapping[str, Any] | None = None,
        metrics: Mapping[str, float] | None = None,
        outside: Collection[str] = (),
    ) -> None:
        """Starts writing a checkpoint; returns when the state may be changed again.

        Args:
          step: Number of updates done.
          state: Tree of device arrays.
          data_state: What the batch iterator's ``get_state()`` gave: JSON values, bytes, arrays.
          meta: What else to remember, JSON values; e.g. {"config": ...}.
          metrics: Values for `keep_best`.
          outside: Paths of arrays of the state that are kept elsewhere. Only their checksums are
            saved: `restore` takes the arrays it is given for them, if they are the same.

        Raises:
          CheckpointError: This or the previous checkpoint could not be written; earlier ones are
            untouched.
        """
        self.wait()
        arrays = _named(state)
        sums = checksums(list(arrays.values()))
        leaves = {
            name: [list(x.shape), x.dtype.name, value] + [_OUTSIDE] * (name in outside)
            for (name, x), value in zip(arrays.items(), sums, strict=True)
        }
        arrays = {name: x for name, x in arrays.items() if name not in outside}
        body = {
            "leaves": leaves,
            "data": _of_all_processes(to_json(data_state, "data_state")),
            "meta": to_json(dict(meta or {}), "meta"),
            "metrics": {name: float(value) for name, value in (metrics or {}).items()},
        }
        with self._writing(f"be written for step {step}"):
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.PyTreeSave(arrays),
                    record=ocp.args.JsonSave({"crc32": digest(body), "body": body}),
                ),
                force=True,
            )
        self._scores[step] = body["metrics"].get(self._keep_best or "")

    def restore(
        self,
        abstract_state: Any,
        *,
        step: int | None = None,
        partial: bool = False,
        cast: bool = False,
        check: Callable[[dict[str, Any]], None] | None = None,
    ) -> tuple[Any, Any, dict[str, Any]] | None:
        """Reads the newest checkpoint that is whole.

        Args:
          abstract_state: Tree of ``jax.ShapeDtypeStruct`` with the shardings to restore to, on
            whatever mesh (`state.abstract_state`). An array in its place is kept if it holds the
            saved values already (frozen parameters), and not read.
          step: This checkpoint instead of the newest; no falling back.
          partial: Read only what `abstract_state` names, e.g. {"params": ...}.
          cast: Convert floating-point arrays to the types of `abstract_state`, after verifying them
            as they were saved; otherwise another type is an error. For reading parameters: a run
            that is continued in another type is another run.
          check: Called with the checkpoint's meta before its arrays are looked at; may raise.

        Returns:
          (state, data_state, meta), or None if there is no checkpoint.

        Raises:
          CheckpointError: The checkpoint belongs to another model or optimizer, or every one is
            damaged. A damaged newest one is moved to ``folder/damaged`` with a warning, and the
            one before it is used.
        """
        steps = self.steps()
        if step is not None and step not in steps:
            raise CheckpointError(f"{self.folder} has no checkpoint of step {step}, only {steps}")
        failures: dict[int, Exception] = {}
        for candidate in reversed(steps if step is None else [step]):
            try:
                found = self._read(candidate, abstract_state, partial, cast, check)
            except _Damaged as error:
                log.error("checkpoint %s/%s is damaged: %s", self.folder, candidate, error)
                failures[candidate] = error
                continue
            self._put_aside(failures, candidate)
            return found
        if failures:
            newest = max(failures)
            raise CheckpointError(
                f"no checkpoint in {self.folder} can be read; the newest, step {newest}, fails "
                f"with: {failures[newest]}. Bring back the files from a copy, or remove "
                "the folder to start over."
            ) from failures[newest]
        return None

    def wait(self) -> None:
        """Until the save in progress is complete, then removes checkpoints no longer kept.

        Raises:
          CheckpointError: The save failed; earlier checkpoints are untouched.
        """
        try:
            with self._writing("be completed"):
                self._manager.wait_until_finished()
                self._manager.check_for_errors()
        except CheckpointError:
            self._manager.reload()  # forgets the one that failed
            raise
        with self._writing("be cleaned up"):
            self._prune()

    def close(self) -> None:
        """Waits for the save in progress and releases the threads."""
        try:
            self.wait()
        finally:
            self._manager.close()

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, kind: Any, *rest: object) -> None:
        try:
            self.close()
        except CheckpointError as error:
            if kind is None:
                raise
            # The error that is already on its way says more than this one.
            log.error("%s", error)

    # ------------------------------------------------------------------ details

    def _read(
        self, step: int, abstract_state: Any, partial: bool, cast: bool, check: Callable | None
    ) -> tuple:
        record = self._record(step)
        meta = from_json(record["meta"])
        if check is not None:
            check(meta)
        asked = _named(abstract_state)
        wanted = _as_saved(asked, record["leaves"]) if cast else asked
        self._check_leaves(step, record["leaves"], wanted, partial)
        arrays = {name: x for name, x in wanted.items() if isinstance(x, jax.Array)}
        for name in _changed(arrays, record["leaves"]):
            del arrays[name]
        self._check_outside(step, record["leaves"], [name for name in wanted if name not in arrays])
        structs = {name: x for name, x in wanted.items() if name not in arrays}
        if structs:
            args = ocp.args.PyTreeRestore(
                structs,
                restore_args=ocp.checkpoint_utils.construct_restore_args(structs),
                partial_restore=True,
            )
            # By the handler: the manager's own call waits for the other processes, for ever if
            # what one of them has to read is damaged.
            with _reading():
                read = ocp.PyTreeCheckpointHandler().restore(self._item(step, "state"), args=args)
            if changed := _changed(read, record["leaves"]):
                raise _Damaged(f"the values of {changed[0]} are not those that were saved")
            arrays |= read
        treedef = jax.tree.structure(abstract_state)
        arrays = {name: _cast(arrays[name], leaf) for name, leaf in asked.items()}
        state = jax.tree.unflatten(treedef, list(arrays.values()))
        return state, from_json(self._own_data(step, record["data"])), meta

    def _own_data(self, step: int, data: Sequence[Any]) -> Any:
        """This process's data state: the one for all, or its own of as many."""
        if len(data) not in (1, hosts.count()):
            raise CheckpointError(
                f"checkpoint {self.folder}/{step} was made by {len(data)} processes whose data "
                f"stood at different places; {hosts.count()} cannot go on from there. Run it "
                f"with {len(data)} processes. (The position of a Loader is the same for all.)"
            )
        return data[hosts.index() if len(data) > 1 else 0]

    def _record(self, step: int) -> dict[str, Any]:
        with _reading():
            record = ocp.JsonCheckpointHandler().restore(self._item(step, "record"))
            if digest(record["body"]) != record["crc32"]:
                raise ValueError("the record was changed after it was saved")
        return record["body"]

    def _item(self, step: int, name: str) -> epath.Path:
        return epath.Path(self.folder) / str(step) / name

    def _check_leaves(self, step: int, saved: dict, wanted: dict, partial: bool) -> None:
        def show(entry: Any) -> str:
            return f"{tuple(entry[0])} {entry[1]}" if entry else "missing"

        expected = {name: [list(x.shape), x.dtype.name] for name, x in wanted.items()}
        names = list(expected) + [name for name in saved if name not in expected and not partial]
        differing = [
            f"{name}: {show(saved.get(name))} in the checkpoint, {show(expected.get(name))} here"
            for name in names
            if (saved.get(name) or [None])[:2] != expected.get(name)
        ]
        if differing:
            more = f"; and {len(differing) - 5} more" if len(differing) > 5 else ""
            only_optimizer = all(line.startswith("opt_state") for line in differing)
            what = "optimizer or other frozen parameters" if only_optimizer else "model"
            raise CheckpointError(
                f"checkpoint {self.folder}/{step} was made by another {what}: "
                f"{'; '.join(differing[:5])}{more}. Use the configuration it was made with, or "
                "another workdir. (To read parameters into another type: restore(..., cast=True).)"
            )

    def _check_outside(self, step: int, saved: dict, read: Sequence[str]) -> None:
        if missing := [name for name in read if saved[name][-1] == _OUTSIDE]:
            raise CheckpointError(
                f"checkpoint {self.folder}/{step} holds only what trains, and the frozen "
                f"parameters given beside it are not those it was made with: {missing[0]} and "
                f"{len(missing) - 1} more differ. Give the same base model, or another workdir."
            )

    def _put_aside(self, failures: Mapping[int, Exception], used: int) -> None:
        """Out of the way of the run, which will reach the same step again; not deleted."""
        if not failures:
            return
        if hosts.index() == 0:
            (self.folder / _DAMAGED).mkdir(exist_ok=True)
            for step in failures:
                target = self.folder / _DAMAGED / str(step)
                while target.exists():
                    target = target.with_name(target.name + "_")
                os.replace(self.folder / str(step), target)
        hosts.barrier("aa_jax_damaged")
        self._manager.reload()
        log.warning(
            "resuming from step %s: the newer checkpoints %s are damaged and were moved to %s",
            used,
            sorted(failures),
            self.folder / _DAMAGED,
        )

    def _prune(self) -> None:
        steps = sorted(self._manager.all_steps())
        kept = set(steps[-self._keep_last :])
        if self._keep_best and len(steps) > len(kept):
            scores = {step: self._score(step) for step in steps}
            known = {step: score for step, score in scores.items() if score is not None}
            if known:
                pick = min if self._best_mode == "min" else max
                kept.add(pick(known, key=known.__getitem__))
        for step in steps:
            if step not in kept:
                self._manager.delete(step)
                self._scores.pop(step, None)

    def _score(self, step: int) -> float | None:
        if step not in self._scores:
            try:
                self._scores[step] = self._record(step)["metrics"].get(self._keep_best)
            except _Damaged:
                self._scores[step] = None  # never the best
        return self._scores[step]

    @contextlib.contextmanager
    def _writing(self, action: str) -> Iterator[None]:
        try:
            yield
        except AaJaxError:
            raise
        except Exception as error:
            if hosts.explain(error) is not None:
                raise  # the storage is not to blame
            # Whatever storage raises here, the training loop should hear the same thing.
            raise CheckpointError(
                f"checkpoint folder {self.folder} cannot {action}: {_brief(error)}. Make sure it "
                "is writable and the disk is not full; checkpoints completed earlier are intact, "
                "and running the same command again goes on from the newest."
            ) from error


def check_fingerprint(
    saved: Mapping[str, Any], current: Mapping[str, Any], ignore: Sequence[str] = ()
) -> None:
    """Refuses to continue a run with another configuration.

    Args:
      saved: Configuration the checkpoint was made with (nested dicts of JSON values).
      current: Configuration of this run.
      ignore: Globs over dotted keys that may differ, e.g. "log_every", "mesh.*".

    Raises:
      CheckpointError: Names every key that differs, with both values.
    """
    missing = object()
    old, new = flatten(to_json(saved)), flatten(to_json(current))

    def show(value: Any) -> str:
        return "(not set)" if value is missing else repr(value)

    differing = [
        f"{key}: {show(old.get(key, missing))} -> {show(new.get(key, missing))}"
        for key in sorted(set(old) | set(new))
        if old.get(key, missing) != new.get(key, missing)
        and not any(fnmatchcase(key, glob) for glob in ignore)
    ]
    if differing:
        raise CheckpointError(
            "the checkpoint belongs to a run with another configuration (checkpoint -> now): "
            f"{'; '.join(differing)}. Restore those values to continue it, or use another workdir "
            "to start a new run."
        )


def _as_saved(wanted: Mapping[str, Any], saved: Mapping[str, Any]) -> dict[str, Any]:
    """Floating-point leaves of another type than the saved one as structs of the saved type."""
    out = dict(wanted)
    for name, leaf in wanted.items():
        if name in saved and jnp.issubdtype(leaf.dtype, jnp.floating):
            dtype = jnp.dtype(saved[name][1])
            if dtype != leaf.dtype and jnp.issubdtype(dtype, jnp.floating):
                out[name] = jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=leaf.sharding)
    return out


def _cast(x: jax.Array, leaf: Any) -> jax.Array:
    if x.dtype == leaf.dtype:
        return x
    return jax.jit(lambda x: x.astype(leaf.dtype), out_shardings=leaf.sharding)(x)


def _changed(arrays: Mapping[str, jax.Array], saved: Mapping[str, Any]) -> list[str]:
    """Names of the arrays whose values are not the saved ones."""
    if not arrays:
        return []
    sums = zip(arrays, checksums(list(arrays.values())), strict=True)
    return [name for name, value in sums if value != saved[name][2]]


def _named(tree: Any) -> dict[str, Any]:
    """{path: leaf} in tree order: no container types, no integer keys to lose on the way."""
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    named = {path_name(path): leaf for path, leaf in flat}
    if len(named) != len(flat):
        raise CheckpointError("two arrays of the state have the same path; rename one of them")
    return named


def _of_all_processes(value: Any) -> list[Any]:
    """Every process's JSON value, in process order; one for all if they are the same."""
    return [value] if hosts.same(digest(value)) else hosts.gather(value)


@contextlib.contextmanager
def _reading() -> Iterator[None]:
    """What is damaged for one process is damaged for all: each may read other files."""
    failed: Exception | None = None
    try:
        yield
    except (MemoryError, jax.errors.JaxRuntimeError):
        raise  # says something about this machine, not about the checkpoint
    except Exception as error:  # storage errors arrive as bare Exceptions
        _forget_abandoned_reads(error)
        failed = error
    found = hosts.gather(None if failed is None else _brief(failed))
    if found := [text for text in found if text is not None]:
        raise _Damaged(found[0]) from failed


def _forget_abandoned_reads(error: BaseException) -> None:
    """Frees, here and quietly, what a failed read leaves behind.

    When one array cannot be read, orbax closes its event loop over the reads of the others. Left
    to the garbage collector, those coroutines say "never awaited" at some later, unrelated moment;
    the damage itself is reported by the error.
    """
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        traceback.clear_frames(current.__traceback__)  # skips the frames still running
        current = current.__cause__ or current.__context__
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        gc.collect()


def _brief(error: BaseException) -> str:
    text = " ".join(str(error).split())
    if len(text) > 400:  # storage names the file first and the cause last
        text = f"{text[:150]} … {text[-250:]}"
    return f"{type(error).__name__}: {text}"
