"""Real jobs of several processes, started by the launcher, and what is needed to disturb them."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


class Job:
    """One run of launch/local.py.

    Args:
      log: file for its output.
      command: what the processes run.
      processes: how many.
      devices: CPU devices of each.
      environment: further variables.
    """

    def __init__(self, log, command, processes=2, devices=1, **environment):
        self.log = Path(log)
        self._command = [
            sys.executable, ROOT / "launch/local.py", "--processes", processes,
            "--devices", devices, "--grace", 10, "--", *command,
        ]  # fmt: skip
        self._environment = {
            **os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "AA_JAX_PROGRESS": "0",
            "XLA_FLAGS": "--xla_backend_optimization_level=0 "
            "--xla_llvm_disable_expensive_passes=true",
            "AA_JAX_HEARTBEAT": "60", **environment,
        }  # fmt: skip
        self._environment.pop("PYTEST_CURRENT_TEST", None)

    def __enter__(self):
        with open(self.log, "w") as out:
            self.process = subprocess.Popen(
                list(map(str, self._command)), env=self._environment, stdout=out,
                stderr=subprocess.STDOUT, cwd=ROOT,
            )  # fmt: skip
        return self

    def __exit__(self, *exception):
        if self.process.poll() is None:  # the second signal kills the whole job
            self.process.send_signal(signal.SIGTERM)
            time.sleep(0.2)
            self.process.send_signal(signal.SIGTERM)
            self.process.wait(timeout=30)

    def wait(self, timeout=300):
        """The exit code of the job."""
        return self.process.wait(timeout=timeout)

    @property
    def text(self):
        return self.log.read_text()

    def until(self, done, timeout=120):
        """Waits for a condition while the job runs."""
        end = time.monotonic() + timeout
        while not done():
            assert self.process.poll() is None, f"ended early: {self.text[-3000:]}"
            assert time.monotonic() < end, f"nothing in {timeout} s: {self.text[-3000:]}"
            time.sleep(0.02)


@pytest.fixture
def start(tmp_path):
    """`start(command, ...)`: a `Job` whose log is in the test's folder."""
    count = 0

    def make(command, processes=2, devices=1, **environment):
        nonlocal count
        count += 1
        return Job(tmp_path / f"log{count}", command, processes, devices, **environment)

    return make


def load(path):
    """A module by its path: test folders are not packages."""
    import importlib.util

    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def tiny():
    return load(ROOT / "tests/training/tiny.py")
