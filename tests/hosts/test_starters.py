"""The scripts and manifests for schedulers, as far as they can be run without one."""

import os
import shlex
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from aa_jax.hosts.join import place

LAUNCH = Path(__file__).parents[2] / "launch"


def shell(script, *arguments, **environment):
    return subprocess.run(
        ["bash", str(LAUNCH / script), *arguments], capture_output=True, text=True, timeout=60,
        env={"PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/"), **environment},
    )  # fmt: skip


@pytest.mark.parametrize("script", ["slurm.sh", "tpu.sh"])
def test_scripts_parse_and_say_what_they_want(script):
    assert subprocess.run(["bash", "-n", LAUNCH / script]).returncode == 0
    assert os.stat(LAUNCH / script).st_mode & stat.S_IXUSR
    done = shell(script, TPU="a", ZONE="b")
    assert done.returncode == 2 and "usage" in done.stderr


@pytest.fixture
def slurm(tmp_path):
    """A stand-in srun, which runs one task with a step's variables, and scontrol."""
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "srun").write_text(
        f'#!/bin/bash\necho "$@" > {tmp_path}/srun\n'
        "while [[ $1 == --* ]]; do shift; done\n"
        'SLURM_STEP_NUM_TASKS=16 SLURM_PROCID=3 exec "$@"\n'
    )
    (tools / "scontrol").write_text(f'#!/bin/bash\necho "$@" > {tmp_path}/scontrol\n')
    for tool in tools.iterdir():
        tool.chmod(0o755)

    def run(code, **environment):
        (tmp_path / "program.py").write_text(code)
        return shell(
            "slurm.sh", str(tmp_path / "program.py"), "--x=a b",
            PATH=f"{tools}:{os.environ['PATH']}", PYTHON=sys.executable, SLURM_JOB_ID="42",
            **environment,
        )  # fmt: skip

    return tmp_path, run


def test_slurm_starts_the_command_in_every_task(slurm):
    folder, run = slurm
    done = run("import os, sys; print(sys.argv[1]); print(os.environ['AA_JAX_HOSTS'])")
    assert done.returncode == 0 and done.stdout.splitlines() == ["--x=a b", "auto"]
    assert "--kill-on-bad-exit=1" in (folder / "srun").read_text()
    assert not (folder / "scontrol").exists()
    assert place({"AA_JAX_HOSTS": "auto", "SLURM_STEP_NUM_TASKS": "16"}) is not None


@pytest.mark.parametrize("code, again", [(143, True), (75, True), (2, False), (1, False)])
def test_slurm_queues_again_what_was_stopped_not_what_is_wrong(slurm, code, again):
    folder, run = slurm
    done = run(f"import sys; sys.exit({code})")
    assert done.returncode == code
    assert (folder / "scontrol").exists() == again
    if again:
        assert (folder / "scontrol").read_text() == "requeue 42\n"


def test_tpu_commands_keep_their_words():
    done = shell("tpu.sh", "launch/train.py", "--a=x y", TPU="t", ZONE="z", DRY_RUN="1")
    first, second = (shlex.split(line) for line in done.stdout.splitlines())
    assert first[:5] == ["gcloud", "compute", "tpus", "tpu-vm", "ssh"] and "--worker=all" in first
    command = first[first.index("--command") + 1]
    assert subprocess.run(["bash", "-n", "-c", command]).returncode == 0
    assert "AA_JAX_HOSTS=auto" in command and "launch/train.py --a=x\\ y" in command
    assert "--worker=0" in second
    stop = shell("tpu.sh", "stop", TPU="t", ZONE="z", DRY_RUN="1")
    assert "kill -TERM" in shlex.split(stop.stdout)[-1]
    assert shell("tpu.sh", "stop", ZONE="z").returncode != 0


def test_tpu_command_runs_and_leaves_its_number(tmp_path):
    """What each host is told to do, done here: the number left is the program's own."""
    done = shell("tpu.sh", "launch/x.py", TPU="t", ZONE="z", DRY_RUN="1")
    words = shlex.split(done.stdout.splitlines()[0])
    home = tmp_path / "aa_jax"
    (home / ".venv/bin").mkdir(parents=True)
    (home / ".venv/bin/python").write_text("#!/bin/bash\necho $$ $AA_JAX_HOSTS $1; sleep 0.2\n")
    (home / ".venv/bin/python").chmod(0o755)
    subprocess.run(
        ["bash", "-c", words[-1] + "; wait"], check=True, env={**os.environ, "HOME": str(tmp_path)}
    )
    number = (home / "run.pid").read_text().strip()
    assert (home / "run.log").read_text().split()[-3:] == [number, "auto", "launch/x.py"]


def test_the_jobset_gives_every_pod_its_place():
    job = yaml.safe_load((LAUNCH / "gke.yaml").read_text())
    assert job["kind"] == "JobSet"
    (workers,) = job["spec"]["replicatedJobs"]
    spec = workers["template"]["spec"]
    assert spec["completionMode"] == "Indexed" and spec["parallelism"] == spec["completions"]
    (container,) = spec["template"]["spec"]["containers"]
    variables = {v["name"]: v.get("value") for v in container["env"]}
    (index,) = [v for v in container["env"] if "valueFrom" in v]
    assert index["name"] == "JAX_PROCESS_ID"
    assert "job-completion-index" in index["valueFrom"]["fieldRef"]["fieldPath"]
    where = place({**variables, "JAX_PROCESS_ID": "1"})
    # pod 0 of the set's only job, under the headless service JobSet makes
    host = f"{job['metadata']['name']}-{workers['name']}-0-0.{job['metadata']['name']}"
    port = container["ports"][0]["containerPort"]
    assert where.address == f"{host}:{port}"
    assert where.count == spec["parallelism"] and where.index == 1
