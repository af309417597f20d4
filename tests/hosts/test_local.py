"""The launcher for one machine, with programs that start faster than JAX."""

import os
import signal
import sys
import time

import pytest

from aa_jax.errors import ConfigError
from aa_jax.hosts import local

BASE = {"PATH": os.environ["PATH"], "JAX_PLATFORMS": "cpu"}


def test_every_process_gets_its_place():
    base = {**BASE, "XLA_FLAGS": "--xla_force_host_platform_device_count=8 --other"}
    first, second = local.environments(2, 1234, devices=3, base=base)
    assert first["JAX_COORDINATOR_ADDRESS"] == "127.0.0.1:1234"
    assert (first["JAX_PROCESS_ID"], second["JAX_PROCESS_ID"]) == ("0", "1")
    assert first["JAX_NUM_PROCESSES"] == "2"
    assert first["XLA_FLAGS"] == "--other --xla_force_host_platform_device_count=3"
    cards = local.environments(2, 1, devices=2, base={"CUDA_VISIBLE_DEVICES": "0,1,2,3"})
    assert [e["JAX_LOCAL_DEVICE_IDS"] for e in cards] == ["0,1", "2,3"]
    with pytest.raises(ConfigError, match="need 4 GPUs, but CUDA_VISIBLE_DEVICES names 3"):
        local.environments(2, 1, devices=2, base={"CUDA_VISIBLE_DEVICES": "0,1,2"})
    with pytest.raises(ConfigError, match="at least 1 process"):
        local.environments(0, 1)


def run(code, processes=2, **options):
    program = f"import os, signal, sys, time; me = int(os.environ['JAX_PROCESS_ID'])\n{code}"
    return local.run([sys.executable, "-uc", program], processes=processes, **options)


def test_output_of_all_in_one_stream(capfdbinary):
    assert run("print('line', me)", processes=3) == 0
    lines = capfdbinary.readouterr().out.decode().splitlines()
    assert sorted(lines) == ["[1] line 1", "[2] line 2", "line 0"]


@pytest.mark.parametrize(
    "code, expected, words",
    [
        ("sys.exit(3 if me == 1 else time.sleep(30))", 3, "process 1 of 2 ended with exit code 3"),
        (
            "os.kill(os.getpid(), 9) if me == 1 else time.sleep(30)",
            137,
            "process 1 of 2 was killed by SIGKILL",
        ),
        # the cause is named, not who noticed it first
        (
            "sys.exit(75) if me == 0 else (time.sleep(0.2), sys.exit(2))",
            2,
            "process 1 of 2 ended with exit code 2; ending the others. Its error is above",
        ),
    ],
)
def test_one_failure_ends_all(code, expected, words, caplog):
    began = time.monotonic()
    assert run(code, grace=1.5) == expected
    assert time.monotonic() - began < 10
    assert words in caplog.text


def test_a_signal_is_passed_on_and_the_second_one_kills(caplog):
    import threading

    def later(*delays):
        for delay in delays:
            time.sleep(delay)
            os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=later, args=(1.0,)).start()
    code = "signal.signal(signal.SIGTERM, lambda *a: sys.exit(143)); time.sleep(30)"
    assert run(code) == 143 and "stopping after the next step" in caplog.text
    threading.Thread(target=later, args=(1.0, 0.5)).start()
    code = "signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(30)"
    assert run(code) == 137 and "killing the processes" in caplog.text


def test_a_process_that_ignores_the_signal_is_killed_in_the_end(caplog):
    import threading

    threading.Timer(1.0, lambda: os.kill(os.getpid(), signal.SIGTERM)).start()
    code = "signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(30)"
    assert run(code, stop_grace=0.5) == 137 and "have not stopped within" in caplog.text


def test_mistakes():
    with pytest.raises(ConfigError, match="write it after --"):
        local.run([], processes=2)
    with pytest.raises(ConfigError, match="/nowhere/program cannot be started: No such file"):
        local.run(["/nowhere/program"], processes=2)
