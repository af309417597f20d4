"""How a process finds its job, and how it leaves one that has failed.

============================================  ====================================================
environment                                   what `join` does
============================================  ====================================================
``JAX_COORDINATOR_ADDRESS``,                  joins as that process of that many
``JAX_NUM_PROCESSES``, ``JAX_PROCESS_ID``
``AA_JAX_HOSTS=auto``                         JAX detects the cluster (Cloud TPU, GKE, SLURM, MPI)
a step of several tasks under srun or mpirun  the same
``AA_JAX_HOSTS=none``, or none of these       one process alone
``AA_JAX_HEARTBEAT`` (seconds, default 60)    silence after which a process counts as lost
============================================  ====================================================
"""

import contextlib
import dataclasses
import logging
import os
import sys
from collections.abc import Mapping
from typing import Any, NoReturn

from aa_jax.errors import AaJaxError, ConfigError

log = logging.getLogger(__name__)

# What another process's end looks like from here: the transport's words, and the runtime's.
_LOST = (
    "connection closed by peer",
    "connection reset by peer",
    "connection refused",
    "broken pipe",
    "gloo",
    "nccl",
    "heartbeat",
    "coordination service",
    "barrier",
    "the following tasks",
    "socket closed",
    "preempted",
)
LOST_A_PEER = 75  # EX_TEMPFAIL: nothing is wrong here; the same command may succeed
_HEARTBEAT = 60
_SCHEDULER = "xla_cpu_enable_concurrency_optimized_scheduler"
_joined = False


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a process stands in its job.

    Attributes:
      address: host:port of process 0; None lets JAX detect all of it.
      count: number of processes.
      index: this process.
      heartbeat: seconds of silence after which a process counts as lost.
    """

    address: str | None = None
    count: int | None = None
    index: int | None = None
    heartbeat: int = _HEARTBEAT


def place(environment: Mapping[str, str]) -> Place | None:
    """Reads the environment, see the module's table; None: one process alone.

    Raises:
      ConfigError: a variable is missing, is no number, or is out of range.
    """
    heartbeat = _number(environment, "AA_JAX_HEARTBEAT", _HEARTBEAT)
    if heartbeat < 5:
        raise ConfigError(
            f"AA_JAX_HEARTBEAT={heartbeat}: give at least 5 seconds, or a busy process would be "
            "taken for a lost one."
        )
    mode = environment.get("AA_JAX_HOSTS", "")
    if mode not in ("", "auto", "none"):
        raise ConfigError(f"AA_JAX_HOSTS={mode!r} is neither 'auto' nor 'none'.")
    if mode == "none":
        return None
    names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
    given = [name for name in names if environment.get(name)]
    if given and len(given) < len(names) and mode != "auto":
        missing = ", ".join(name for name in names if name not in given)
        raise ConfigError(
            f"{', '.join(given)} is set but {missing} is not: a job of several processes needs all "
            "three. launch/local.py sets them; AA_JAX_HOSTS=auto lets JAX detect the cluster."
        )
    if len(given) == len(names):
        address = environment[names[0]]
        number, mine = _number(environment, names[1], 1), _number(environment, names[2], 0)
        host, _, port = address.rpartition(":")
        if not host or not port.isdigit():
            raise ConfigError(f"{names[0]}={address!r} is not of the form host:port.")
        if not 0 <= mine < number:
            raise ConfigError(
                f"{names[2]}={mine} is not one of the {number} processes that {names[1]} names: "
                f"they are numbered 0 to {number - 1}."
            )
        return Place(address, number, mine, heartbeat)
    tasks = [_number(environment, name, 1) for name in ("SLURM_STEP_NUM_TASKS",
                                                         "OMPI_COMM_WORLD_SIZE")]  # fmt: skip
    return Place(heartbeat=heartbeat) if mode == "auto" or max(tasks) > 1 else None


def join() -> bool:
    """Joins the job the environment describes; before the first JAX operation.

    From then on process 0 logs as usual and the others, marked, only warnings and errors.

    Returns:
      Whether this is one of several processes.

    Raises:
      ConfigError: the environment is incomplete, or the job cannot be joined.
    """
    global _joined
    if _joined:
        return True
    where = place(os.environ)
    if where is None:
        return False
    if os.environ.get("JAX_PLATFORMS") == "cpu":
        _keep_order_of_collectives()
    import jax

    if not jax.distributed.is_initialized():
        try:
            jax.distributed.initialize(
                where.address, where.count, where.index,
                cluster_detection_method="deactivate" if where.address else None,
                heartbeat_timeout_seconds=where.heartbeat,
            )  # fmt: skip
        except (ValueError, RuntimeError) as error:
            raise ConfigError(
                f"this process cannot join its job ({where.address or 'detected by JAX'}): "
                f"{' '.join(str(error).split())[:300]}. Start all processes at about the same "
                "time, with an address the others can reach; for one process alone set "
                "AA_JAX_HOSTS=none."
            ) from error
    _joined = jax.process_count() > 1
    if _joined:
        _mark_logs(jax.process_index(), jax.process_count())
        log.info("process %d of %d", jax.process_index(), jax.process_count())
    return _joined


def joined() -> bool:
    """Whether `join` found several processes; starts nothing."""
    return _joined


def only_one(what: str) -> None:
    """Refuses to run under several processes.

    Raises:
      ConfigError: there are several.
    """
    if joined():
        raise ConfigError(
            f"{what} runs in one process; this job has several. Start it without launch/local.py "
            "or srun (AA_JAX_HOSTS=none for one process inside such a job). Training by "
            "launch/train.py and launch/rl.py with pipeline 'dataset' run on any number."
        )


def explain(error: BaseException) -> str | None:
    """A paragraph for an error that means that another process is gone; None for others."""
    if not joined() or isinstance(error, AaJaxError) or not isinstance(error, Exception):
        return None
    text = " ".join(str(error).split())
    if not any(words in text.lower() for words in _LOST):
        return None
    return (
        "another process of this job has ended, so this one cannot go on; what went wrong is in "
        "the other's log. The same command continues from the last checkpoint. "
        f"(Noticed as {type(error).__name__}: {text[:200]})"
    )


def leave(code: int) -> NoReturn:
    """Ends this process after an error, at once if it is one of several.

    A usual exit would first wait for the other processes, which wait for this one.
    """
    if not joined():
        raise SystemExit(code)
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


def _keep_order_of_collectives() -> None:
    """On CPUs: XLA's default schedule lets two processes run independent collectives of one
    program in different orders, which ends in a message of the wrong size (or, for equal sizes,
    in wrong numbers). Measured with `tests/hosts/equality.py` on four processes; devices of other
    kinds order them themselves."""
    if _SCHEDULER not in os.environ.get("XLA_FLAGS", ""):
        flags = f"{os.environ.get('XLA_FLAGS', '')} --{_SCHEDULER}=false"
        os.environ["XLA_FLAGS"] = flags.strip()


def _number(environment: Mapping[str, str], name: str, default: int) -> int:
    text = environment.get(name) or str(default)
    try:
        return int(text)
    except ValueError:
        raise ConfigError(f"{name}={text!r} is not a whole number.") from None


def _mark_logs(mine: int, number: int) -> None:
    root = logging.getLogger()
    if not mine:
        return
    root.setLevel(max(root.level, logging.WARNING))
    for handler in root.handlers:
        handler.setFormatter(_Marked(handler.formatter, f"[{mine}/{number}] "))


class _Marked(logging.Formatter):
    """Another formatter's lines behind a prefix."""

    def __init__(self, inner: logging.Formatter | None, prefix: str):
        super().__init__()
        self._inner, self._prefix = inner or logging.Formatter(), prefix

    def format(self, record: Any) -> str:
        return self._prefix + self._inner.format(record)
