"""Worker processes with our own time-out: one that hangs or dies is replaced.

Libraries stop themselves by alarms that work in the main thread only and not inside C code. Here
the work is done elsewhere, and what takes too long is killed.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import queue
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from aa_jax.rewards.base import RewardError

log = logging.getLogger(__name__)


class Died(Exception):
    """A worker ended, or was ended at the time-out, in the middle of a task.

    Attributes:
      progress: what it last said about the task, or None.
    """

    def __init__(self, why: str, progress: Any = None):
        super().__init__(why)
        self.progress = progress


class Worker:
    """One process that answers JSON lines with JSON lines.

    It first writes ``{"ready": true}`` or ``{"error": "..."}``. For a task it may write
    ``{"progress": ...}`` lines and ends with ``{"result": ...}``.

    Args:
      script: a Python program.
      start_seconds: time for its imports.

    Raises:
      RewardError: it does not start.
    """

    def __init__(self, script: Path, start_seconds: float = 300.0):
        # The modules this process finds, the worker finds too; nothing else is passed on.
        environment = {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        kept = ("LD_LIBRARY_PATH", "PATH", "HOME", "LANG")
        environment |= {name: os.environ[name] for name in kept if name in os.environ}
        self.process = subprocess.Popen(
            [sys.executable, "-B", "-X", "utf8", str(script), str(os.getpid())],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            env=environment, start_new_session=True,
        )  # fmt: skip
        self._buffer = b""
        os.set_blocking(self.process.stdout.fileno(), False)
        try:
            said = self._read(time.monotonic() + start_seconds)
        except Died as error:
            self.kill()
            raise RewardError(f"the worker {script.name} does not start: {error}.") from None
        if "error" in said:
            self.kill()
            raise RewardError(str(said["error"]))

    def ask(self, task: Any, seconds: float) -> Any:
        """The result of one task.

        Raises:
          Died: it hung, crashed or used too much memory; the worker is gone.
        """
        progress = None
        deadline = time.monotonic() + seconds
        try:
            self.process.stdin.write(json.dumps(task).encode() + b"\n")
            self.process.stdin.flush()
            while "result" not in (said := self._read(deadline)):
                progress = said.get("progress")
        except (Died, OSError) as error:
            self.kill()
            raise Died(str(error), progress) from None
        return said["result"]

    def _read(self, deadline: float) -> dict[str, Any]:
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stdout, selectors.EVENT_READ)
            while b"\n" not in self._buffer:
                rest = deadline - time.monotonic()
                if rest <= 0 or not selector.select(rest):
                    raise Died("time-out")
                chunk = os.read(self.process.stdout.fileno(), 1 << 16)
                if not chunk:
                    raise Died("it died")
                self._buffer += chunk
        line, _, self._buffer = self._buffer.partition(b"\n")
        return json.loads(line)

    def kill(self) -> None:
        """Ends the process and waits for it."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            with contextlib.suppress(OSError):
                stream.close()


class Pool:
    """Workers that are started when they are needed and replaced when they die.

    Args:
      script: of a `Worker`.
      workers: at most so many at a time.
      seconds: time for one task.
    """

    def __init__(self, script: Path, *, workers: int, seconds: float):
        self.script, self.seconds = script, seconds
        self.replaced = 0
        self._idle: queue.SimpleQueue[Worker | None] = queue.SimpleQueue()
        for _ in range(workers):
            self._idle.put(None)
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix=script.stem)

    def map(self, tasks: Sequence[Any]) -> list[Any]:
        """One result per task, or the `Died` of its worker.

        Raises:
          RewardError: workers do not start at all.
        """
        return list(self._threads.map(self._one, tasks))

    def _one(self, task: Any) -> Any:
        worker = self._idle.get()
        try:
            if worker is None:
                worker = Worker(self.script)
            return worker.ask(task, self.seconds)
        except Died as error:
            worker = None
            self.replaced += 1
            log.info("a %s worker was replaced: %s", self.script.stem, error)
            return error
        finally:
            self._idle.put(worker)

    def close(self) -> None:
        """Ends threads and processes."""
        self._threads.shutdown(cancel_futures=True)
        with contextlib.suppress(queue.Empty):
            while True:
                if (worker := self._idle.get_nowait()) is not None:
                    worker.kill()
