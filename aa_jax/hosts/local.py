"""Several processes on this machine as one job: started together, watched, and ended together.

The supervisor imports no JAX. It gives every process its place in the job (`aa_jax.hosts.join`),
shows their output in one stream, and when one of them fails says which and why, and ends the rest:
a job of which one process is gone can only be started again.
"""

import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from typing import BinaryIO

from aa_jax.errors import ConfigError
from aa_jax.hosts.join import LOST_A_PEER

log = logging.getLogger(__name__)

_ASKED = {128 + signal.SIGTERM, 128 + signal.SIGINT}  # how a run ends that was told to stop


def environments(
    processes: int, port: int, *, devices: int | None = None, base: Mapping[str, str] | None = None
) -> list[dict[str, str]]:
    """The environment of each process.

    Args:
      processes: how many.
      port: free port of process 0 on this machine.
      devices: devices of each. Where the environment names GPUs (``CUDA_VISIBLE_DEVICES``) or asks
        for none (``JAX_PLATFORMS=cpu``), they are those GPUs in order, or so many virtual CPU
        devices; None leaves it to JAX, which gives every process every device.
      base: environment to start from; default this process's.

    Raises:
      ConfigError: not so many GPUs.
    """
    if processes < 1 or (devices is not None and devices < 1):
        raise ConfigError(f"give at least 1 process and 1 device, not {processes} and {devices}.")
    base = dict(os.environ if base is None else base)
    found = []
    for index in range(processes):
        own = {
            "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
            "JAX_NUM_PROCESSES": str(processes),
            "JAX_PROCESS_ID": str(index),
        }
        if devices is not None and base.get("JAX_PLATFORMS", "") == "cpu":
            flags = base.get("XLA_FLAGS", "").split()
            flags = [f for f in flags if "xla_force_host_platform_device_count" not in f]
            flags.append(f"--xla_force_host_platform_device_count={devices}")
            own["XLA_FLAGS"] = " ".join(flags)
        elif devices is not None:
            own["JAX_LOCAL_DEVICE_IDS"] = ",".join(
                str(i) for i in range(index * devices, (index + 1) * devices)
            )
            visible = [x for x in base.get("CUDA_VISIBLE_DEVICES", "").split(",") if x]
            if visible and len(visible) < processes * devices:
                raise ConfigError(
                    f"{processes} processes with {devices} devices each need "
                    f"{processes * devices} GPUs, but CUDA_VISIBLE_DEVICES names {len(visible)}."
                )
        found.append({**base, **own})
    return found


def run(
    command: Sequence[str],
    *,
    processes: int,
    devices: int | None = None,
    grace: float = 15.0,
    stop_grace: float = 600.0,
) -> int:
    """Runs a command in several processes and waits for all of them.

    SIGTERM and Ctrl-C are passed on once, so that a run saves a checkpoint and stops; the second
    one kills.

    Args:
      command: program and arguments; a first word ending in ".py" is run by this Python.
      processes: how many.
      devices: devices of each, see `environments`.
      grace: seconds the other processes have to end by themselves after one has failed; then they
        are killed. They notice a closed connection at once, and hang otherwise.
      stop_grace: seconds they have after a signal, to reach the next step and save.

    Returns:
      The exit code of the job: 0, or that of the process which failed first (128 + signal number
      if it was killed).

    Raises:
      ConfigError: no command, or a program that cannot be started.
    """
    if not command:
        raise ConfigError("no command: write it after --, e.g. -- launch/train.py --config ...")
    words = [sys.executable, *command] if command[0].endswith(".py") else list(command)
    job = _Job(words, environments(processes, _free_port(), devices=devices))
    before = {n: signal.signal(n, job.stop) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        return job.wait(grace, stop_grace)
    finally:
        job.kill()
        for number, handler in before.items():
            signal.signal(number, handler)


class _Job:
    """The processes, in their own groups: a Ctrl-C in the terminal reaches only the supervisor."""

    def __init__(self, words: Sequence[str], places: Sequence[Mapping[str, str]]):
        self._stopped: float | None = None
        self._lock = threading.Lock()
        self.processes: list[subprocess.Popen] = []
        self._readers: list[threading.Thread] = []
        for index, environment in enumerate(places):
            try:
                process = subprocess.Popen(
                    words, env=dict(environment), stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT, start_new_session=True,
                )  # fmt: skip
            except OSError as error:
                self.kill()
                raise ConfigError(f"{words[0]} cannot be started: {error.strerror}.") from error
            self.processes.append(process)
            prefix = b"" if index == 0 else f"[{index}] ".encode()
            reader = threading.Thread(target=self._show, args=(process.stdout, prefix), daemon=True)
            reader.start()
            self._readers.append(reader)

    def stop(self, number: int, frame: object) -> None:
        """Passes a signal on as SIGTERM; the second time kills."""
        if self._stopped is not None:
            log.warning("killing the processes")
            self.kill()
            return
        self._stopped = time.monotonic()
        log.warning("stopping after the next step; once more to kill")
        self._send(signal.SIGTERM)

    def wait(self, grace: float, stop_grace: float) -> int:
        """Until all have ended; the exit code of the first that failed."""
        failed: tuple[int, int] | None = None
        since: float | None = None
        while None in (codes := [process.poll() for process in self.processes]):
            now = time.monotonic()
            if since is None and _failure(codes) is not None:
                since = now
            # The one that notices a loss may be seen to end before the one that was lost.
            if since is not None and failed is None and now - since > 0.5:
                failed = _failure(codes)
                self._say(*failed)
            if since is not None and now - since > grace:
                self.kill()
            if self._stopped is not None and now - self._stopped > stop_grace:
                log.error("the processes have not stopped within %.0f s: killing them", stop_grace)
                self.kill()
            time.sleep(0.05)
        if failed is None and (failed := _failure(codes)) is not None:
            self._say(*failed)
        for reader in self._readers:
            reader.join(timeout=5)
        if failed is not None:
            return _exit_code(failed[1])
        return max(_exit_code(code) for code in codes)

    def kill(self) -> None:
        """SIGKILL to every process, with what it has started."""
        self._send(signal.SIGKILL)

    def _send(self, number: int) -> None:
        for process in self.processes:
            if process.poll() is None:
                try:
                    if number == signal.SIGKILL:
                        os.killpg(process.pid, number)
                    else:
                        process.send_signal(number)
                except ProcessLookupError:
                    continue

    def _say(self, index: int, code: int) -> None:
        if code < 0:
            how = f"was killed by {signal.Signals(-code).name}"
            if -code == signal.SIGKILL:
                how += " (somebody's kill -9, or the system was out of memory)"
        else:
            how = f"ended with exit code {code}"
        then = "The same command continues from the last checkpoint."
        if code == 2:
            then = "Its error is above; with that mended the same command continues."
        log.error(
            "process %d of %d %s; ending the others. %s", index, len(self.processes), how, then
        )

    def _show(self, stream: BinaryIO, prefix: bytes) -> None:
        with stream:
            for line in stream:
                with self._lock:
                    sys.stdout.buffer.write(prefix + line)
                    sys.stdout.buffer.flush()


def _failure(codes: Sequence[int | None]) -> tuple[int, int] | None:
    """(process, exit code) of the failed one that looks most like the cause."""
    bad = [(i, code) for i, code in enumerate(codes) if code and _exit_code(code) not in _ASKED]
    # One that only lost another is no cause; an abort is how JAX's runtime ends a process then.
    mild = (LOST_A_PEER, -signal.SIGABRT)
    return next((x for x in bad if x[1] not in mild), bad[0] if bad else None)


def _exit_code(code: int) -> int:
    return 128 - code if code < 0 else code


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]
