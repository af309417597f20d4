"""Runs a program nobody trusts: contained, limited, and gone when the call returns.

What holds a program, by level of ``isolation``:

============  ===============  ======================  ========================
              namespaces       landlock                limits (only if asked)
============  ===============  ======================  ========================
network       none, filtered   filtered, no TCP        filtered (Linux only)
files read    Python, system   Python, system          whatever the user may
files write   scratch, memory  scratch, on disk        whatever the user may
processes     none, filtered   none, filtered          none (Linux only)
needs         user namespaces  Linux 6.2 with          any Unix
              or root, 5.12    Landlock
============  ===============  ======================  ========================

Everywhere: CPU seconds, address space, size of a file, open files, length of the output and the
wall clock are limited, the environment is empty but for a few harmless names, and the process is
killed and waited for. "auto" takes the first of namespaces and landlock that works, and refuses
where neither does.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import logging
import os
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from aa_jax.errors import ConfigError
from aa_jax.rewards.base import RewardError
from aa_jax.rewards.sandbox.jail import BOX, ROOT

log = logging.getLogger(__name__)

LEVELS = ("namespaces", "landlock", "limits")
SYSTEM = ("/usr", "/bin", "/lib", "/lib32", "/lib64", "/etc/ld.so.cache", "/etc/localtime")
JAIL = Path(__file__).with_name("jail.py")


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a program may use.

    Attributes:
      cpu_seconds: processor time.
      wall_seconds: of the clock; well above `cpu_seconds`, so that a loaded machine fails nobody.
      memory_mb: address space, MiB.
      disk_mb: scratch folder and any one file in it, MiB.
      output_kb: of standard output, and of standard error, KiB; more ends the program.
    """

    cpu_seconds: int = 5
    wall_seconds: float = 30.0
    memory_mb: int = 1024
    disk_mb: int = 16
    output_kb: int = 256

    def __post_init__(self):
        for field in dataclasses.fields(self):
            if not getattr(self, field.name) > 0:
                raise ConfigError(f"the sandbox limit {field.name} must be above 0.")


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a program ended.

    Attributes:
      status: "ok", "exit <code>", "signal <name>", "timeout", or "output" (wrote too much).
      stdout: what it wrote, at most the limit.
      stderr: the same of standard error.
      seconds: by the wall clock.
    """

    status: str
    stdout: str
    stderr: str
    seconds: float


class Jail:
    """A program in its sandbox; leaving the ``with`` block ends it, whatever it does.

    Args:
      argv: program and arguments; see `python_command`.
      files: name -> text, written to its scratch folder, which is its working directory.
      limits: what it may use.
      isolation: a level that works here, see `choose`.
      readable: further folders it may read, e.g. of packages.
      stdin, stdout, stderr: as for ``subprocess.Popen``.

    Raises:
      RewardError: it could not be started in its sandbox (raised by `check_started` and by the end
        of the ``with`` block).
    """

    def __init__(
        self,
        argv: Sequence[str],
        files: Mapping[str, str],
        *,
        limits: Limits,
        isolation: str,
        readable: Sequence[str] = (),
        stdin: Any = subprocess.PIPE,
        stdout: Any = subprocess.PIPE,
        stderr: Any = subprocess.PIPE,
    ):
        self._scratch = tempfile.mkdtemp(prefix="aa_jax-sandbox-")
        os.mkdir(self._scratch + ROOT)
        box = BOX if isolation == "namespaces" else self._scratch + ROOT + BOX
        spec = {
            "argv": list(argv),
            "files": dict(files),
            "isolation": isolation,
            "scratch": self._scratch,
            "readable": [*_system_folders(), *map(os.path.realpath, readable)],
            "environment": _environment(box),
            "parent": os.getpid(),
            "cpu_seconds": limits.cpu_seconds,
            "memory_mb": limits.memory_mb,
            "disk_mb": limits.disk_mb,
        }
        path = os.path.join(self._scratch, "spec.json")
        with open(path, "w", encoding="utf-8") as file:
            json.dump(spec, file)
        self._status, status = os.pipe()
        try:
            self.process = subprocess.Popen(
                [_python(), "-I", "-S", "-B", str(JAIL), path, str(status)],
                stdin=stdin, stdout=stdout, stderr=stderr, pass_fds=(status,),
                env=_environment(self._scratch), cwd="/", start_new_session=True,
            )  # fmt: skip
        except BaseException:
            os.close(self._status)
            shutil.rmtree(self._scratch, ignore_errors=True)
            raise
        finally:
            os.close(status)

    def __enter__(self) -> Jail:
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        self.end()
        if kind is None:
            self.check_started()
        elif self._status >= 0:
            os.close(self._status)
            self._status = -1

    def end(self) -> None:
        """Kills the program (there is only one process), waits for it, removes its folder."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)  # before wait(): the id is still its own
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout, self.process.stderr):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()
        shutil.rmtree(self._scratch, ignore_errors=True)

    def check_started(self) -> None:
        """Waits until the program runs in its sandbox.

        Raises:
          RewardError: it does not, because something is not permitted here.
        """
        if self._status < 0:
            return
        with os.fdopen(self._status, "rb") as status:
            said = status.read()
        self._status = -1
        if said:
            raise RewardError(
                f"the sandbox cannot be built: {json.loads(said)['error']}. Allow what is missing, "
                "choose another level of isolation, or judge on another machine through the reward "
                "server."
            )


def run(
    argv: Sequence[str],
    files: Mapping[str, str],
    *,
    stdin: str = "",
    limits: Limits = Limits(),  # noqa: B008 (frozen)
    isolation: str = "auto",
    readable: Sequence[str] = (),
) -> Outcome:
    """Runs a program to its end, or to its limits.

    Args:
      argv: see `python_command`.
      files: name -> text, in its working directory.
      stdin: what it reads.
      limits: what it may use.
      isolation: "auto" or one of `LEVELS`.
      readable: further folders it may read.

    Raises:
      RewardError: the sandbox cannot be built here.
    """
    started = time.monotonic()
    level = choose(isolation)
    with Jail(argv, files, limits=limits, isolation=level, readable=readable) as jail:
        streams = {jail.process.stdout: bytearray(), jail.process.stderr: bytearray()}
        status = pump(jail, stdin.encode(), streams, limits)
    stdout, stderr = (bytes(kept).decode("utf-8", "replace") for kept in streams.values())
    return Outcome(status, stdout, stderr, time.monotonic() - started)


def pump(jail: Jail, data: bytes, streams: Mapping[IO[bytes], bytearray], limits: Limits) -> str:
    """Feeds a program and keeps what it writes, until it ends or goes too far.

    Args:
      jail: the program.
      data: its standard input.
      streams: pipes to read -> where to keep what comes.
      limits: of time and output.

    Returns:
      The status, see `Outcome`.
    """
    process, left = jail.process, memoryview(data)
    deadline = time.monotonic() + limits.wall_seconds
    with selectors.DefaultSelector() as selector:
        for stream in streams:
            os.set_blocking(stream.fileno(), False)
            selector.register(stream, selectors.EVENT_READ)
        if process.stdin is not None:
            os.set_blocking(process.stdin.fileno(), False)
            selector.register(process.stdin, selectors.EVENT_WRITE)
        while selector.get_map():
            rest = deadline - time.monotonic()
            if rest <= 0:
                return "timeout"
            for key, _ in selector.select(rest):
                if key.fileobj is process.stdin:
                    left = _feed(selector, process.stdin, left)
                    continue
                chunk = os.read(key.fd, 1 << 16)
                if not chunk:
                    selector.unregister(key.fileobj)
                kept = streams[key.fileobj]
                room = limits.output_kb * 1024 - len(kept)
                kept += chunk[:room]
                if len(chunk) > room:
                    return "output"
    try:
        code = process.wait(max(deadline - time.monotonic(), 0.0))
    except subprocess.TimeoutExpired:
        return "timeout"
    return _status(code)


def _feed(selector: Any, stream: IO[bytes], left: memoryview) -> memoryview:
    try:
        left = left[os.write(stream.fileno(), left[: 1 << 16]) :]
    except BrokenPipeError:  # it does not read; that alone is no failure
        left = left[:0]
    if not left:
        selector.unregister(stream)
        stream.close()
    return left


def _status(code: int) -> str:
    if code < 0:
        with contextlib.suppress(ValueError):
            return f"signal {signal.Signals(-code).name}"
        return f"signal {-code}"
    return "ok" if code == 0 else f"exit {code}"


def python_command(script: str) -> list[str]:
    """Runs a script of the scratch folder: isolated, without byte code, UTF-8."""
    return [_python(), "-I", "-B", "-X", "utf8", script]


def choose(isolation: str = "auto") -> str:
    """The level of isolation that is used.

    Raises:
      ConfigError: no such level.
      RewardError: "auto", and this machine permits none that contains a program.
    """
    if isolation in LEVELS:
        if isolation == "limits":
            _warn_limits()
        return isolation
    if isolation != "auto":
        raise ConfigError(f"isolation={isolation!r} is not one of 'auto', {', '.join(LEVELS)}.")
    problems = {level: problem(level) for level in LEVELS[:2]}
    for level, found in problems.items():
        if found is None:
            return level
    listed = " ".join(f"{level}: {found}" for level, found in problems.items())
    raise RewardError(
        "programs written by a model are only run where they can do no harm, and this machine "
        f"permits neither way of containing them. {listed} Judge on another machine through the "
        "reward server, or accept the risk with isolation='limits'."
    )


@functools.cache
def problem(level: str) -> str | None:
    """Why a level cannot be used here; None if it can. Tried once per process, with a program."""
    if sys.platform != "linux" and level != "limits":
        return f"{level} needs Linux."
    try:
        outcome = run(python_command("try.py"), {"try.py": "print(6 * 7)"}, isolation=level)
    except RewardError as error:
        return str(error)
    if outcome.stdout != "42\n":
        return f"a first program failed ({outcome.status}): {outcome.stderr[-300:]}"
    return None


@functools.cache
def _warn_limits() -> None:
    log.warning(
        "isolation='limits': judged programs can read and write all files of this user; "
        "use it only for programs you trust."
    )


@functools.cache
def _python() -> str:
    """The interpreter itself, not the link of a virtual environment."""
    return os.path.realpath(getattr(sys, "_base_executable", None) or sys.executable)


@functools.cache
def _system_folders() -> tuple[str, ...]:
    prefixes = {os.path.realpath(path) for path in (sys.base_prefix, sys.base_exec_prefix)}
    inside = {path for path in prefixes if not path.startswith("/usr")}
    return (*(path for path in SYSTEM if os.path.lexists(path)), *sorted(inside))


def _environment(box: str) -> dict[str, str]:
    """Nothing of this process's environment: it may hold keys."""
    kept = {name: os.environ[name] for name in ("LD_LIBRARY_PATH",) if name in os.environ}
    return kept | {
        "PATH": "/usr/bin:/bin",
        "HOME": box,
        "TMPDIR": box,
        "LANG": "C.UTF-8",
        "OMP_NUM_THREADS": "1",  # one thread's stack and buffers per core would count as memory
        "OPENBLAS_NUM_THREADS": "1",
    }
