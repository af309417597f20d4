"""Two processes with their own rows train like one, stop together and go on together."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from aa_jax.training.metrics import read_metrics


def start(workdir, total, seconds):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    program = Path(__file__).with_name("two_hosts.py")
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    arguments = [str(port), str(workdir), str(total), str(seconds)]
    processes = []
    for rank in "01":
        with open(workdir / f"log{rank}", "w") as log:
            command = [sys.executable, str(program), rank, *arguments]
            processes.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))
    return processes


def finish(processes, workdir):
    try:
        codes = [process.wait(timeout=120) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return codes, (workdir / "log0").read_text()[-3000:]


@pytest.mark.slow
def test_two_hosts_train_like_one_device_and_stop_together(tiny, tmp_path):
    processes = start(tmp_path, total=500, seconds=0.05)
    until = time.monotonic() + 120
    while len(read_metrics(tmp_path)) < 3 and time.monotonic() < until:
        time.sleep(0.05)
    processes[1].send_signal(signal.SIGTERM)  # only one host is told
    codes, log = finish(processes, tmp_path)
    assert codes == [143, 143], log
    stopped = len(read_metrics(tmp_path))
    assert 3 <= stopped < 500
    total = stopped + 3
    codes, log = finish(start(tmp_path, total=total, seconds=0.0), tmp_path)
    assert codes == [0, 0], log

    step, state = tiny.setup()
    expected = []
    for i in range(total):
        state, metrics = step(state, tiny.make_batch(i, n=16))
        expected.append(float(metrics["loss"].mean))
    lines = read_metrics(tmp_path)
    assert [line["step"] for line in lines] == list(range(1, total + 1))
    np.testing.assert_allclose([line["loss"] for line in lines], expected, rtol=1e-5)
