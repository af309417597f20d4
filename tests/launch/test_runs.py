"""What `launch/train.py` does, on a real checkpoint folder and parquet in the real schema."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import jax
import numpy as np
import pytest

from aa_jax import config, models, runs
from aa_jax.data import digits
from aa_jax.errors import AaJaxError, CheckpointError, ConfigError, DataError
from aa_jax.models import heads
from aa_jax.training.metrics import read_metrics, series

ROOT = Path(__file__).parents[2]


def settings(recipe: str, checkpoint, data, **overrides):
    """The shipped config with a user's two paths, and sizes for a test."""
    cfg = config.load(
        ROOT / f"configs/ti2t/llava_{recipe}.py",
        [
            f"--config.model.path={checkpoint}",
            f"--config.data.path={data}",
            "--config.model.dtype=float32",
            "--config.model.param_dtype=float32",
            "--config.mesh.fsdp=1",
            "--config.mesh.data=-1",
            "--config.train.batch_rows=16",
            "--config.train.log_every=1",
            "--config.optim.lr=1e-3",
            *(f"--config.{key}={value}" for key, value in overrides.items()),
        ],
    )
    return config.resolve(cfg)


@pytest.mark.parametrize("recipe", ["sft", "feedback", "dpo", "reward"])
def test_every_recipe_trains_from_two_paths(recipe, checkpoint, preferences, tmp_path):
    cfg = settings(recipe, checkpoint, preferences)
    cfg["train"]["accumulation"] = 1
    cfg["eval_data"] = {"size": 10}
    figures = runs.run(tmp_path, **cfg)
    rows = read_metrics(tmp_path, stage="train")
    losses = series(rows, "loss")[1]
    assert figures["steps"] == len(losses) == cfg["train"]["epochs"] * -(-figures["examples"] // 16)
    # Batches differ, so the figure that must fall is the one on a fixed set of rows.
    assert series(rows, "eval/loss")[1][-1] < losses[0]
    load = heads.load if recipe == "reward" else models.load
    _, trained = load(tmp_path / "model")
    _, initial = models.load(checkpoint)
    trained = trained["model"] if recipe == "reward" else trained
    for tower, before in zip(
        jax.tree.leaves(trained["vision_tower"]), jax.tree.leaves(initial["vision_tower"]),
        strict=True,
    ):  # fmt: skip
        np.testing.assert_array_equal(tower, before)
    moved = np.abs(
        np.asarray(trained["projector"]["linear_1"]["kernel"])
        - np.asarray(initial["projector"]["linear_1"]["kernel"])
    )
    assert moved.max() > 0
    assert (tmp_path / "report.html").stat().st_size > 10_000


def test_dpo_starts_at_log_two_and_layouts_agree(checkpoint, preferences, tmp_path):
    first = []
    for name, extra in {"shared": {}, "rows": {"share_prefix": False}}.items():
        cfg = settings("dpo", checkpoint, preferences)
        cfg["train"] |= {"steps": 3, **extra}
        runs.run(tmp_path / name, **cfg)
        first.append(series(read_metrics(tmp_path / name, stage="train"), "loss")[1])
    # Policy and reference are equal before the first update: -log sigmoid(0).
    assert first[0][0] == pytest.approx(np.log(2), abs=1e-6)
    np.testing.assert_allclose(first[0], first[1], rtol=1e-5)


@pytest.mark.slow
def test_any_batch_size_on_any_number_of_devices(checkpoint, preferences, tmp_path):
    """5 pairs per update over 8 devices, held-out data too: the numbers of one device."""
    found, devices = [], jax.devices()
    for name, count in {"many": len(devices), "one": 1}.items():
        cfg = settings("dpo", checkpoint, preferences)
        cfg["train"] |= {"steps": 2, "batch_rows": 5}
        cfg["eval_data"] = {"size": 7}
        cfg["mesh"] = {"data": -1}
        with mock.patch("jax.devices", lambda *args, n=count: devices[:n]):
            runs.run(tmp_path / name, **cfg)
        rows = read_metrics(tmp_path / name, stage="train")
        found.append(series(rows, "loss")[1] + series(rows, "eval/loss")[1])
    np.testing.assert_allclose(found[0], found[1], rtol=1e-5)


def test_a_second_start_continues_and_changes_nothing(checkpoint, preferences, tmp_path):
    cfg = settings("dpo", checkpoint, preferences)
    cfg["train"] |= {"steps": 2}
    runs.run(tmp_path, **cfg)
    before = (tmp_path / "model/model.safetensors").read_bytes()
    runs.run(tmp_path, **cfg)
    assert (tmp_path / "model/model.safetensors").read_bytes() == before


@pytest.mark.parametrize(
    "change, error, words",
    [
        ({"recipe": "dpoo"}, ConfigError, ["dpoo", "dpo", "reward"]),
        ({"train": {"frozen": ["vision_towr/*"]}}, ConfigError, ["vision_towr"]),
        ({"objective": {"beta": -1.0}}, AaJaxError, ["beta"]),
        ({"optim": {"lr": None}}, ConfigError, ["lr"]),
        ({"data": {"template": "AA_TI2"}}, DataError, ["AA_TI2", "AA_TI2T"]),
        ({"data": {"limits": {"max_length": 12}}}, DataError, ["22 tokens", "max_length"]),
        ({"data": {"path": "/nowhere/x.parquet"}}, DataError, ["/nowhere/x.parquet"]),
        ({"model": {"path": "/nowhere/model"}}, CheckpointError, ["/nowhere/model"]),
    ],
)
def test_mistakes_name_the_key_and_the_fix(change, error, words, checkpoint, preferences, tmp_path):
    cfg = settings("dpo", checkpoint, preferences)
    for key, value in change.items():
        cfg[key] = {**cfg[key], **value} if isinstance(value, dict) else value
    with pytest.raises(error) as caught:
        runs.run(tmp_path, **cfg)
    for word in words:
        assert word in str(caught.value)


def test_a_missing_column_names_file_and_columns(checkpoint, tmp_path):
    rows = list(digits.preference_rows(4, 0, "train"))
    for row in rows:
        row["overall_respons"] = row.pop("overall_response")
    path = digits.write_parquet(rows, tmp_path / "p.parquet")
    with pytest.raises(DataError, match="overall_response") as caught:
        runs.run(tmp_path / "run", **settings("dpo", checkpoint, path))
    assert "p.parquet" in str(caught.value) and "overall_respons" in str(caught.value)


def test_an_unreadable_image_names_its_row(checkpoint, tmp_path):
    rows = list(digits.preference_rows(4, 0, "train"))
    rows[2]["image"]["bytes"] = rows[2]["image"]["bytes"][:40]
    path = digits.write_parquet(rows, tmp_path / "p.parquet")
    with pytest.raises(DataError, match=r"p\.parquet:\D*2"):
        runs.run(tmp_path / "run", **settings("dpo", checkpoint, path))


def test_a_checkpoint_of_another_run_is_refused(checkpoint, preferences, tmp_path):
    cfg = settings("dpo", checkpoint, preferences)
    cfg["train"] |= {"steps": 2}
    runs.run(tmp_path, **cfg, config=cfg)
    other = json.loads(json.dumps(cfg))
    other["optim"]["lr"] = 1e-2
    with pytest.raises(CheckpointError, match="optim.lr"):
        runs.run(tmp_path, **other, config=other)


def test_the_command_reports_a_mistake_in_one_paragraph(tmp_path):
    """A real process: exit code 2, the key and its nearest neighbour, no traceback."""
    command = [
        sys.executable,
        ROOT / "launch/train.py",
        "--config",
        ROOT / "configs/ti2t/llava_dpo.py",
        "--config.optm.lr=1",
        "--workdir",
        tmp_path,
    ]
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, cwd=tmp_path,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )  # fmt: skip
    assert done.returncode == 2
    assert "optm" in done.stderr and "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize("path", sorted((ROOT / "launch").glob("*.py")), ids=lambda p: p.stem)
def test_every_launcher_imports(path):
    spec = importlib.util.spec_from_file_location(f"launch_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert callable(module.main)
