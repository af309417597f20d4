"""Resumable stages in one run directory.

A stage is a function of its own folder. It is finished when `done.json` stands there, written
last and atomically; until then a second start of the same command calls it again and the stage
continues from what it finds in its folder. Nothing finished is computed twice.

In a job of several processes all of them run every stage, on one shared run directory; what process
0 finds and writes there is what counts.
"""

import dataclasses
import json
import logging
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from aa_jax import hosts
from aa_jax.errors import ConfigError

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Stage:
    """One step of a pipeline.

    Attributes:
      name: the stage's folder in the run directory and its name on the command line.
      title: what a person reads while it runs.
      run: called with the stage's folder; returns a JSON-able summary.
      needs: stages that must be finished first.
    """

    name: str
    title: str
    run: Callable[[Path], dict]
    needs: tuple[str, ...] = ()


def summary(workdir: str | os.PathLike, name: str) -> dict | None:
    """The summary of a finished stage, or None if it has not finished; called by all processes."""
    found = read_json(Path(workdir) / name / "done.json")
    return None if found is None else found["summary"]


def seconds(workdir: str | os.PathLike, name: str) -> float:
    """Wall time a finished stage took in the process that finished it, in seconds."""
    return json.loads((Path(workdir) / name / "done.json").read_text())["seconds"]


def run_stages(
    workdir: str | os.PathLike, stages: Sequence[Stage], only: str | None = None
) -> dict[str, dict]:
    """Runs the stages that are not finished yet, in order.

    Args:
      workdir: the run directory, made if absent.
      stages: in an order in which every stage follows what it needs.
      only: run just this stage; what it needs must be finished.

    Returns:
      stage name -> summary, for every finished stage.

    Raises:
      ConfigError: `only` names no stage, or something a stage needs has not finished.
    """
    names = [stage.name for stage in stages]
    if only is not None and only not in names:
        raise ConfigError(f"there is no stage {only!r}. The stages, in order: {', '.join(names)}.")
    for number, stage in enumerate(stages, 1):
        if only is not None and stage.name != only:
            continue
        if summary(workdir, stage.name) is not None:
            logger.info("[%d/%d] %s: finished before", number, len(stages), stage.title)
            continue
        missing = [name for name in stage.needs if summary(workdir, name) is None]
        if missing:
            raise ConfigError(
                f"stage {stage.name!r} needs {', '.join(missing)}, which has not finished in "
                f"{workdir}. Run it first (--stage={missing[0]}), or leave --stage out to run "
                "everything in order."
            )
        logger.info("[%d/%d] %s", number, len(stages), stage.title)
        folder = Path(workdir) / stage.name
        folder.mkdir(parents=True, exist_ok=True)
        start = time.perf_counter()
        result = stage.run(folder)
        write_json(
            folder / "done.json", {"summary": result, "seconds": time.perf_counter() - start}
        )
    finished = {name: summary(workdir, name) for name in names}
    return {name: value for name, value in finished.items() if value is not None}


def read_json(path: Path) -> Any:
    """What process 0 reads in the file, on every process; None if it is not there."""
    mine = hosts.index() == 0 and path.exists()
    return hosts.first(json.loads(path.read_text()) if mine else None)


def write_json(path: Path, value: object) -> None:
    """Writes JSON so that a reader sees the old file or the new one, never half of it.

    Called by all processes; one writes, and all go on when it has.
    """
    if hosts.index() == 0:
        temporary = path.with_name(path.name + ".partial")
        with open(temporary, "w") as file:
            json.dump(value, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    hosts.barrier(f"{path.name} written")
