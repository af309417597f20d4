"""How a process finds its job: every environment a scheduler makes, and what is wrong with one."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from aa_jax import hosts
from aa_jax.errors import ConfigError
from aa_jax.hosts.join import Place, place

ROOT = Path(__file__).parents[2]
LOCAL = {
    "JAX_COORDINATOR_ADDRESS": "10.0.0.1:8476",
    "JAX_NUM_PROCESSES": "4",
    "JAX_PROCESS_ID": "3",
}


@pytest.mark.parametrize(
    "environment, expected",
    [
        ({}, None),
        (LOCAL, Place("10.0.0.1:8476", 4, 3)),
        ({**LOCAL, "AA_JAX_HEARTBEAT": "30"}, Place("10.0.0.1:8476", 4, 3, 30)),
        ({**LOCAL, "AA_JAX_HOSTS": "none"}, None),
        ({"AA_JAX_HOSTS": "auto"}, Place()),
        # a batch script of SLURM is one process; a step of several tasks is a job
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "8", "SLURM_PROCID": "0"}, None),
        ({"SLURM_JOB_ID": "7", "SLURM_STEP_NUM_TASKS": "8", "SLURM_PROCID": "3"}, Place()),
        ({"SLURM_STEP_NUM_TASKS": "1"}, None),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, Place()),
    ],
)
def test_places(environment, expected):
    assert place(environment) == expected


@pytest.mark.parametrize(
    "change, words",
    [
        ({"JAX_PROCESS_ID": ""}, ["JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES is set but JAX_PRO"]),
        ({"JAX_PROCESS_ID": "4"}, ["JAX_PROCESS_ID=4", "numbered 0 to 3"]),
        ({"JAX_NUM_PROCESSES": "four"}, ["JAX_NUM_PROCESSES='four' is not a whole number"]),
        ({"JAX_COORDINATOR_ADDRESS": "10.0.0.1"}, ["'10.0.0.1' is not of the form host:port"]),
        ({"AA_JAX_HOSTS": "yes"}, ["'yes' is neither 'auto' nor 'none'"]),
        ({"AA_JAX_HEARTBEAT": "1"}, ["AA_JAX_HEARTBEAT=1", "at least 5"]),
    ],
)
def test_what_is_wrong_is_named(change, words):
    with pytest.raises(ConfigError) as error:
        place({**LOCAL, **change})
    for word in words:
        assert word in str(error.value)


def test_one_process_pays_nothing():
    assert not hosts.joined() and hosts.join() is False
    assert hosts.count() == 1 and hosts.index() == 0
    assert hosts.first({"a": [1]}) == {"a": [1]} and hosts.gather("x") == ["x"]
    assert hosts.same(7) and hosts.total([3, 0.5]) == [3.0, 0.5]
    hosts.barrier("nobody else")
    np.testing.assert_array_equal(hosts.to_host(np.arange(3)), [0, 1, 2])
    hosts.only_one("anything")
    assert hosts.explain(RuntimeError("Gloo: connection closed by peer")) is None
    with pytest.raises(SystemExit) as stopped:
        hosts.leave(3)
    assert stopped.value.code == 3


def test_a_lost_process_is_told_from_other_errors(monkeypatch):
    monkeypatch.setattr(sys.modules["aa_jax.hosts.join"], "_joined", True)
    text = hosts.explain(RuntimeError("UNKNOWN: Gloo AllGather failed: Connection reset by peer"))
    assert "another process of this job has ended" in text and "Connection reset" in text
    assert hosts.explain(RuntimeError("RESOURCE_EXHAUSTED: out of memory")) is None
    assert hosts.explain(ConfigError("the barrier is too high")) is None
    with pytest.raises(ConfigError, match="a pipeline of stages runs in one process"):
        hosts.only_one("a pipeline of stages")


PROGRAM = """
import json, logging, sys
from aa_jax import config, hosts, platforms
logging.basicConfig(level=logging.INFO, format="%(message)s")
platforms.start()
import jax, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from aa_jax.sharding import make_mesh
mine = hosts.index()
rows = np.arange(8.0, dtype=np.float32).reshape(4, 2)
place = NamedSharding(make_mesh(), P("data"))
array = jax.make_array_from_callback(rows.shape, place, lambda i: rows[i])
found = {
    "count": hosts.count(), "first": hosts.first({"from": mine}),
    "gather": hosts.gather(["x" * mine, mine]), "same": hosts.same(5), "differ": hosts.same(mine),
    "total": hosts.total([2**40 + mine, 0.5]), "host": hosts.to_host(array).tolist(),
}
logging.info("a usual line")
logging.warning("a warning of %d", mine)
open(sys.argv[1] + str(mine), "w").write(json.dumps(found))
try:
    config.write_resolved({"lr": 1.0 + mine}, sys.argv[1] + "run")
except Exception as error:
    print("refused:", error)
"""


@pytest.mark.parametrize("scheduler", ["local", "slurm"])
def test_two_processes_agree(scheduler, tmp_path):
    """By the three variables, and by what srun sets in the tasks of a step."""
    import json

    from aa_jax.hosts import local

    base = {
        **os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT),
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
    }  # fmt: skip
    if scheduler == "local":
        places = local.environments(2, local._free_port(), base=base)
    else:
        places = [
            {
                **base, "AA_JAX_HOSTS": "auto", "SLURM_JOB_ID": str(os.getpid()),
                "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2",
                "SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": str(i), "SLURM_LOCALID": str(i),
            }
            for i in range(2)
        ]  # fmt: skip
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(tmp_path / "out")], env=environment,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for environment in places
    ]  # fmt: skip
    try:
        texts = [process.communicate(timeout=120)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [p.returncode for p in processes] == [0, 0], texts
    for i in range(2):
        found = json.loads((tmp_path / f"out{i}").read_text())
        assert found == {
            "count": 2, "first": {"from": 0}, "gather": [["", 0], ["x", 1]], "same": True,
            "differ": False, "total": [2**41 + 1, 1.0],
            "host": [[0.0, 1.0], [2.0, 3.0], [4.0, 5.0], [6.0, 7.0]],
        }  # fmt: skip
    # Process 0 speaks; the others only warn, and say who they are.
    assert "a usual line" in texts[0] and "a usual line" not in texts[1]
    assert "a warning of 0" in texts[0] and "[1/2] a warning of 1" in texts[1]
    for text in texts:
        assert "refused: the processes of this job were started with different configs" in text
        assert "lr: 1.0 in process 0, 2.0 in process 1" in text
    assert not (tmp_path / "outrun").exists()
