"""Processes that are told to stop, killed, or hang: the job ends soon, says why, and goes on."""

import importlib.util
import json
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from aa_jax.training.metrics import read_metrics

PROGRAM = Path(__file__).with_name("train_tiny.py")


def load(path):
    """A module by its path: test folders are not packages."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def lines(workdir):
    return [line["step"] for line in read_metrics(workdir)]


def pid(workdir, index):
    return int((workdir / f"pid{index}").read_text())


def checkpoints(workdir):
    folder = workdir / "checkpoints/sft"
    return sorted(int(p.name) for p in folder.iterdir() if p.name.isdigit())


def reference(start, workdir, total, *mesh, processes=1, devices=1):
    """The same training, never disturbed."""
    with start([PROGRAM, workdir, total, 0, 1000, *mesh], processes, devices) as job:
        assert job.wait() == 0, job.text[-3000:]
    return workdir


def assert_same_training(workdir, whole, rtol):
    ours, theirs = read_metrics(workdir), read_metrics(whole)
    assert [line["step"] for line in ours] == [line["step"] for line in theirs]
    for name in ("loss", "grad_norm"):
        a, b = ([line[name] for line in found] for found in (ours, theirs))
        np.testing.assert_allclose(a, b, rtol=rtol, atol=0 if rtol == 0 else 1e-7)
    with np.load(workdir / "final.npz") as a, np.load(whole / "final.npz") as b:
        for name in a.files:
            np.testing.assert_allclose(a[name], b[name], rtol=10 * rtol, atol=rtol)


@pytest.mark.slow
def test_a_killed_process_ends_the_job_and_the_same_command_continues(start, tiny, tmp_path):
    """SIGKILL to one of two: the other ends at once, the cause is named, and one process (another
    layout) finishes with the numbers of an undisturbed training on one device."""
    workdir, total = tmp_path / "run", 14
    command = [PROGRAM, workdir, total, 0.1, 3]
    with start([*command, "fsdp=2", "data=1"]) as job:
        job.until(lambda: (workdir / "metrics.jsonl").exists() and len(lines(workdir)) >= 5)
        os.kill(pid(workdir, 1), signal.SIGKILL)
        began = time.monotonic()
        assert job.wait() == 128 + signal.SIGKILL, job.text[-3000:]
        assert time.monotonic() - began < 15
    assert "process 1 of 2 was killed by SIGKILL" in job.text
    assert "The same command continues from the last checkpoint" in job.text
    assert "Traceback" not in job.text
    saved = checkpoints(workdir)
    assert saved and saved[-1] < total
    with start([PROGRAM, workdir, total, 0, 3], processes=1) as job:
        assert job.wait() == 0, job.text[-3000:]
    assert f"continuing from step {saved[-1]} of {total}" in job.text
    step, state = tiny.setup(accumulation=2)
    batches = iter(load(PROGRAM).make_loader(tiny, [], multiple_of=2))
    losses = []
    for _ in range(total):
        state, metrics = step(state, next(batches))
        losses.append(float(metrics["loss"].mean))
    assert lines(workdir) == list(range(1, total + 1))
    np.testing.assert_allclose([x["loss"] for x in read_metrics(workdir)], losses, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_one_signal_stops_all_at_the_same_step_and_resume_is_bit_identical(start, tmp_path, number):
    workdir, total = tmp_path / "run", 40
    command = [PROGRAM, workdir, total, 0.1, 1000, "fsdp=2", "data=2"]
    with start(command, devices=2) as job:
        job.until(lambda: (workdir / "metrics.jsonl").exists() and len(lines(workdir)) >= 3)
        os.kill(pid(workdir, 1), number)  # only one process is told
        assert job.wait() == 143, job.text[-3000:]
    stopped = checkpoints(workdir)
    assert len(stopped) == 1 and 3 <= stopped[0] < total
    assert job.text.count(f"stopped at step {stopped[0]}; run it again to continue") == 2
    assert "Traceback" not in job.text and "ended with exit code" not in job.text
    with start([PROGRAM, workdir, total, 0, 1000, "fsdp=2", "data=2"], devices=2) as job:
        assert job.wait() == 0, job.text[-3000:]
    whole = reference(start, tmp_path / "whole", total, "fsdp=2", "data=2", processes=2, devices=2)
    assert_same_training(workdir, whole, rtol=0)  # the same layout: bit for bit


@pytest.mark.slow
def test_the_launcher_passes_a_signal_on(start, tmp_path):
    workdir = tmp_path / "run"
    with start([PROGRAM, workdir, 500, 0.1, 1000]) as job:
        job.until(lambda: (workdir / "metrics.jsonl").exists() and len(lines(workdir)) >= 3)
        job.process.send_signal(signal.SIGTERM)
        assert job.wait(timeout=60) == 143, job.text[-3000:]
    assert len(checkpoints(workdir)) == 1 and "stopping after the next step" in job.text


@pytest.mark.slow
def test_process_zero_killed(start, tmp_path):
    workdir = tmp_path / "run"
    with start([PROGRAM, workdir, 500, 0.1, 3]) as job:
        job.until(lambda: (workdir / "metrics.jsonl").exists() and len(lines(workdir)) >= 5)
        os.kill(pid(workdir, 0), signal.SIGKILL)
        assert job.wait(timeout=30) == 137, job.text[-3000:]
    assert "process 0 of 2 was killed by SIGKILL" in job.text
    assert "is not full" not in job.text  # no blame on the disk


@pytest.mark.slow
def test_a_hanging_process_is_noticed_by_its_silence(start, tmp_path):
    """SIGSTOP: no connection closes. The runtime's heartbeat (here 10 s) ends the others, and the
    launcher kills what is left."""
    workdir = tmp_path / "run"
    with start([PROGRAM, workdir, 500, 0.1, 3], AA_JAX_HEARTBEAT="10") as job:
        job.until(lambda: (workdir / "metrics.jsonl").exists() and len(lines(workdir)) >= 5)
        os.kill(pid(workdir, 1), signal.SIGSTOP)
        began = time.monotonic()
        assert job.wait(timeout=90) != 0
        assert time.monotonic() - began < 60, job.text[-3000:]
    assert "process 0 of 2" in job.text


@pytest.mark.slow
def test_ids_over_a_restart_with_more_processes(start, tmp_path):
    """What each process reads, in real jobs: an epoch and a half by 2, then 4, then 1 processes;
    every row once per epoch."""
    workdir, read = tmp_path / "run", []
    for processes, total in ((2, 3), (4, 12), (1, 16)):  # 8 steps per epoch of 61 rows
        with start([PROGRAM, workdir, total, 0, 1000], processes) as job:
            assert job.wait() == 0, job.text[-3000:]
        own = [json.loads((workdir / f"rows{i}.json").read_text()) for i in range(processes)]
        assert all(own)  # nobody is idle
        read += [row for rows in own for row in rows]
    counts = np.bincount(read, minlength=61)
    # Two whole epochs; a process without a row in the last batch reads one to know its shape.
    assert counts.min() == 2 and counts.sum() <= 2 * 61 + 4
    whole = reference(start, tmp_path / "whole", 16)
    assert_same_training(workdir, whole, rtol=1e-5)


@pytest.mark.slow
def test_without_a_launcher_the_survivor_ends_by_itself(tmp_path):
    """As under a scheduler that watches nothing: exit code 75 and one paragraph."""
    import subprocess
    import sys

    from aa_jax.hosts import local

    workdir = tmp_path / "run"
    places = local.environments(2, local._free_port(), devices=1, base={
        **os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(PROGRAM.parents[2]),
        "XLA_FLAGS": "",
    })  # fmt: skip
    processes = []
    for index, environment in enumerate(places):
        with open(tmp_path / f"log{index}", "w") as log:
            command = [sys.executable, str(PROGRAM), str(workdir), "500", "0.1", "3"]
            processes.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))
    try:
        end = time.monotonic() + 120
        while not ((workdir / "metrics.jsonl").exists() and len(lines(workdir)) >= 5):
            assert time.monotonic() < end and processes[0].poll() is None
            time.sleep(0.05)
        processes[1].kill()
        assert processes[0].wait(timeout=30) == 75
    finally:
        for process in processes:
            process.kill()
            process.wait()
    text = (tmp_path / "log0").read_text()
    assert "another process of this job has ended" in text and "Traceback" not in text
