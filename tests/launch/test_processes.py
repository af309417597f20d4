"""The real launcher in several processes: the run of one, in every number and file."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from aa_jax import models, runs
from aa_jax.training.metrics import read_metrics, series

ROOT = Path(__file__).parents[2]


def launch(program, workdir, flags, processes=2, devices=1, timeout=540):
    """The output of `launch/local.py ... -- program`, which must succeed."""
    command = [
        sys.executable, ROOT / "launch/local.py", "--processes", processes, "--devices", devices,
        "--", ROOT / program, "--workdir", workdir, *flags,
    ]  # fmt: skip
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, timeout=timeout, cwd=ROOT,
        env={
            **os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "AA_JAX_PROGRESS": "0",
            "XLA_FLAGS": "--xla_backend_optimization_level=0 "
            "--xla_llvm_disable_expensive_passes=true",
        },
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
    return done.stdout


def flags(checkpoint, data, *more):
    return [
        "--config", ROOT / "configs/ti2t/llava_dpo.py", f"--config.model.path={checkpoint}",
        f"--config.data.path={data}", "--config.model.dtype=float32",
        "--config.model.param_dtype=float32", "--config.model.remat=none",
        "--config.train.batch_rows=12", "--config.train.log_every=1", "--config.optim.lr=1e-3",
        "--config.train.epochs=1", *more,
    ]  # fmt: skip


def figures(workdir, stage="train", names=("loss", "grad_norm")):
    rows = read_metrics(workdir, stage=stage)
    return {name: series(rows, name)[1] for name in names}


@pytest.mark.slow
def test_dpo_in_two_processes_is_dpo_in_one(checkpoint, preferences, tmp_path):
    """An epoch of 40 pairs in batches of 12, the last of 4: losses, gradients, tokens and the saved
    model are those of one process on eight devices."""
    output = launch(
        "launch/train.py", tmp_path / "two",
        flags(checkpoint, preferences, "--config.mesh.fsdp=2"),
    )  # fmt: skip
    runs.run(
        tmp_path / "one", recipe="dpo", model={"path": str(checkpoint), "remat": "none"},
        data={"path": str(preferences), "template": "AA_TI2T", "limits": {"max_length": 2048}},
        objective={"beta": 0.1},
        optim={"lr": 1e-3, "schedule": "cosine", "warmup_ratio": 0.03},
        train={"batch_rows": 12, "epochs": 1, "log_every": 1, "frozen": ("vision_tower/*",)},
        mesh={"data": 2, "fsdp": 4},
    )  # fmt: skip
    two, one = figures(tmp_path / "two"), figures(tmp_path / "one")
    assert len(two["loss"]) == 4 and two["loss"][0] == pytest.approx(np.log(2), abs=1e-6)
    for name, values in one.items():
        np.testing.assert_allclose(two[name], values, rtol=1e-5)
    tokens = [
        [line["tokens_per_second"] * line["step_seconds"] for line in read_metrics(tmp_path / x)]
        for x in ("one", "two")
    ]
    np.testing.assert_allclose(tokens[1], tokens[0], rtol=1e-9)
    (_, a), (_, b) = (models.load(tmp_path / x / "model") for x in ("one", "two"))
    kernel = lambda params: np.asarray(params["projector"]["linear_1"]["kernel"])  # noqa: E731
    assert np.abs(kernel(a) - kernel(b)).max() < 1e-5
    # Everything is written once, by process 0, which alone tells the story.
    assert (tmp_path / "two/report.html").exists() and (tmp_path / "two/config.json").exists()
    assert len(list((tmp_path / "two/tensorboard/train").iterdir())) == 2  # as in one process
    assert output.count("steps per epoch") == 2 and "[1] [1/2]" not in output


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llava_ppo", "llava_grpo"])
def test_rl_in_two_processes(name, checkpoint, preferences, tmp_path):
    """Rollouts, a learned reward and updates; responses are gathered, and all agree with one
    process."""
    runs.run(
        tmp_path / "reward", recipe="reward", model={"path": str(checkpoint)},
        data={"path": str(preferences), "template": "AA_TI2T"}, optim={"lr": 1e-3},
        train={"batch_rows": 16, "epochs": 1},
    )  # fmt: skip
    some = [
        "--config", ROOT / f"configs/ti2t/{name}.py", f"--config.model.path={checkpoint}",
        f"--config.prompts.path={preferences}",
        f"--config.reward.path={tmp_path / 'reward/model'}", "--config.reward.dtype=float32",
        "--config.model.dtype=float32", "--config.model.param_dtype=float32",
        "--config.optim.lr=1e-3", "--config.rollout.prompts=8", "--config.rollout.iterations=2",
        "--config.sampling.max_new_tokens=8", "--config.sampling.batch_rows=8",
        "--config.reward.batch_rows=8", "--config.checkpoint_every=1",
    ]  # fmt: skip
    some += ["--config.rollout.samples=2"] if name == "llava_grpo" else []
    launch("launch/rl.py", tmp_path / "two", [*some, "--config.mesh.fsdp=2"])
    launch("launch/rl.py", tmp_path / "one", [*some, "--config.mesh.fsdp=1"], processes=1)
    for stage, names in {
        "rl.rollout": ("reward/mean", "response_length", "sampler_gap"), "rl": ("loss",)
    }.items():  # fmt: skip
        two, one = (figures(tmp_path / x, stage, names) for x in ("two", "one"))
        assert len(two[names[0]]) == 2
        for figure in names:
            np.testing.assert_allclose(two[figure], one[figure], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_language_feedback_in_two_processes(checkpoint, preferences, tmp_path):
    """Every file of the pipeline is that of one process, written once; killed or not, a second
    start finds all stages finished."""
    some = [
        "--config", ROOT / "configs/ti2t/llava_llf.py", f"--config.model.path={checkpoint}",
        f"--config.data.path={preferences}", "--config.model.dtype=float32",
        "--config.model.param_dtype=float32", "--config.model.remat=none",
        # Long enough that an untrained model ends some answers.
        "--config.lengths.answer=96", "--config.lengths.feedback=16", "--config.prompts.size=24",
        "--config.sampling.batch_rows=12", "--config.feedback.batch_rows=8",
        "--config.feedback.epochs=1", "--config.feedback.optim.lr=1e-3",
        "--config.dpo.batch_rows=4", "--config.dpo.epochs=1", "--config.dpo.lrs=(1e-3,)",
    ]  # fmt: skip
    two = [*some, "--config.mesh.fsdp=2", "--config.mesh.data=1"]
    launch("launch/llf.py", tmp_path / "two", two)
    launch("launch/llf.py", tmp_path / "one", some, processes=1)
    for name in ("response", "critique", "refine"):
        lines = [
            [
                json.loads(line)
                for line in (folder / f"improve/{name}.jsonl").read_text().splitlines()
            ]
            for folder in (tmp_path / "two", tmp_path / "one")
        ]
        assert [line["text"] for line in lines[0]] == [line["text"] for line in lines[1]]
        assert [line["index"] for line in lines[0]] == list(range(24))
    done = [json.loads((tmp_path / x / "improve/done.json").read_text()) for x in ("two", "one")]
    assert done[0]["summary"] == done[1]["summary"] and done[0]["summary"]["used"] > 0
    stage = "dpo.llf_lr0.001"
    both = [figures(tmp_path / x, stage) for x in ("two", "one")]
    assert len(both[0]["loss"]) > 0
    for name, values in both[1].items():
        np.testing.assert_allclose(both[0][name], values, rtol=1e-4)
    assert (tmp_path / "two/model/model.safetensors").is_file()
    assert (tmp_path / "two/report.html").is_file()
    again = launch("launch/llf.py", tmp_path / "two", two)
    assert again.count("finished before") == 4


def test_what_runs_in_one_process_says_so(tmp_path):
    command = [
        sys.executable, ROOT / "launch/local.py", "--processes", 2, "--", ROOT / "launch/llf.py",
        "--config", ROOT / "configs/ti2t/digits_llf.py", "--workdir", tmp_path / "run",
    ]  # fmt: skip
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, timeout=120, cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 2
    assert "the digits experiment runs in one process; this job has several" in done.stdout
    assert "Traceback" not in done.stdout
