"""`launch/train.py` with a frozen tower's features on disk: killed, continued, in two processes."""

import importlib.util
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
SPEC = importlib.util.spec_from_file_location("jobs", Path(__file__).parent / "test_processes.py")
JOBS = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(JOBS)


@pytest.fixture(scope="module")
def plain(checkpoint, preferences, tmp_path_factory):
    """Figures of a run without stored features."""
    folder = tmp_path_factory.mktemp("plain")
    JOBS.launch("launch/train.py", folder, JOBS.flags(checkpoint, preferences), processes=1)
    return JOBS.figures(folder)


def stored(folder):
    return {path: path.stat().st_mtime_ns for path in folder.glob("*/*/*.features")}


@pytest.mark.slow
def test_killed_while_features_are_written(plain, checkpoint, preferences, tmp_path):
    """SIGKILL after the first files: the same command goes on, writes no file twice, and trains."""
    flags = JOBS.flags(checkpoint, preferences, "--config.train.batch_rows=2")
    cache = f"--config.train.tower_cache={tmp_path / 'cache'}"
    command = [
        sys.executable,
        ROOT / "launch/train.py",
        "--workdir",
        tmp_path / "run",
        *flags,
        cache,
    ]
    child = subprocess.Popen(
        list(map(str, command)), cwd=ROOT, env={**os.environ, "JAX_PLATFORMS": "cpu"},
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    deadline = time.monotonic() + 300
    while not (before := stored(tmp_path / "cache")) and time.monotonic() < deadline:
        assert child.poll() is None
        time.sleep(0.002)
    child.send_signal(signal.SIGKILL)
    child.wait()
    before = stored(tmp_path / "cache")
    flags = JOBS.flags(checkpoint, preferences, cache)
    JOBS.launch("launch/train.py", tmp_path / "again", flags, processes=1)
    after = stored(tmp_path / "cache")
    assert 0 < len(before) < len(after)
    assert {path: after[path] for path in before} == before
    for name, values in JOBS.figures(tmp_path / "again").items():
        np.testing.assert_allclose(values, plain[name], rtol=1e-5)


@pytest.mark.slow
def test_two_processes_share_a_folder(plain, checkpoint, preferences, tmp_path):
    flags = JOBS.flags(
        checkpoint, preferences, "--config.mesh.fsdp=2",
        f"--config.train.tower_cache={tmp_path / 'cache'}",
    )  # fmt: skip
    for name in ("first", "second"):
        output = JOBS.launch("launch/train.py", tmp_path / name, flags)
        for figure, values in JOBS.figures(tmp_path / name).items():
            np.testing.assert_allclose(values, plain[figure], rtol=1e-5)
    assert "features of 0 computed" in output
    assert not list(tmp_path.rglob("*.partial"))
