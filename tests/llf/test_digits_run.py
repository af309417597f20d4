"""The whole pipeline with everything tiny: what it writes, and that being killed loses nothing."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from aa_jax.data import digits
from aa_jax.data.sources import open_source
from aa_jax.errors import ConfigError
from aa_jax.llf import digits_run

ROOT = Path(__file__).parents[2]
FROZEN = ("vision_tower/*",)
TINY = {
    "seed": 3,
    "model": {"vision_dim": 16, "vision_layers": 2, "vision_heads": 2, "dim": 32, "layers": 2,
              "heads": 2, "kv_heads": 2, "mlp_dim": 48},
    "tower": {"steps": 3, "batch_rows": 8},
    "pretrain_examples": 64,
    "pretrain": {"frozen": FROZEN, "batch_rows": 4, "pack_length": 128, "steps": 4,
                 "optim": {"lr": 3e-3}, "checkpoint_every": 2},
    "demonstrations": {"n": 64},
    "sft": {"frozen": FROZEN, "batch_rows": 4, "pack_length": 128, "steps": 4,
            "optim": {"lr": 3e-3}, "checkpoint_every": 2},
    "preference_prompts": 48,
    "feedback_prompts": 48,
    "pairs": 16,
    "feedback": {"frozen": FROZEN, "batch_rows": 4, "pack_length": 128, "epochs": 1,
                 "optim": {"lr": 1e-3}},
    "dpo": {"frozen": FROZEN, "lrs": (1e-3,), "batch_rows": 8, "epochs": 1, "optim": {}},
    "sampling": {"batch_rows": 16},
    "lengths": {"answer": 12, "feedback": 12},
    "validation_prompts": 16,
    "test_prompts": 16,
}  # fmt: skip


@pytest.fixture
def untrained_answers(monkeypatch):
    """An untrained model seldom ends an answer in time; without this no pair would be kept."""
    from aa_jax.llf import lab

    real = lab.respond

    def respond(*args, **kwargs):
        return [{**line, "finished": True, "text": line["text"] or "1"} for line in
                real(*args, **kwargs)]  # fmt: skip

    monkeypatch.setattr(lab, "respond", respond)


def test_every_stage_writes_what_the_next_one_reads(tmp_path, untrained_answers, capsys):
    found = digits_run.run(tmp_path, mesh={"data": 1, "fsdp": -1}, variants=("likeliest",), **TINY)
    assert list(found) == ["tower", "pretrain", "sft", "collect", "feedback", "improve",
                           "likeliest", "dpo", "evaluate", "report"]  # fmt: skip
    rows = open_source(str(tmp_path / "collect/preferences.parquet"))
    assert set(digits.preference_columns()) <= set(rows[0])
    assert found["dpo"]["pairs"] <= 16
    counts = found["improve"]
    assert counts["kept"] + counts["identical"] + counts["empty"] + counts["cut"] == 48
    result = found["evaluate"]
    for row in ("initial", "binary", "llf", "llf_likeliest", "improved_trained",
                "improved_untrained"):  # fmt: skip
        estimate, low, high = result[row]["win_rate"]
        assert 0 <= low <= estimate <= high <= 1
        scores = json.loads((tmp_path / f"evaluate/scores/{row}.json").read_text())
        assert np.mean(scores["mean"]) == pytest.approx(result[row]["mean"][0])
    assert result["initial"]["win_rate"][0] == 0.5
    assert "DPO + LLF" in capsys.readouterr().out
    page = (tmp_path / "report.html").read_text()
    assert "self-improvement" in page and "data:image/png" in page
    # The tower is frozen after its own stage, to the last model.
    start = load_file(tmp_path / "tower/model/model.safetensors")
    end = load_file(tmp_path / "dpo/llf_lr0.001/model/model.safetensors")
    towers = [name for name in start if "vision_tower" in name]
    assert towers and all((start[name] == end[name]).all() for name in towers)
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if p.is_file()}
    digits_run.run(tmp_path, mesh={"data": 1, "fsdp": -1}, **TINY)
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if p.is_file()} == before


def test_an_unknown_variant_is_refused_before_anything_runs(tmp_path):
    with pytest.raises(ConfigError, match="'sharper'.*there are verified, likeliest"):
        digits_run.run(tmp_path / "run", variants=("likeliest", "sharper"), **TINY)
    assert not (tmp_path / "run").exists()


SCRIPT = """
import json, sys
from aa_jax import platforms
platforms.start()
from aa_jax.llf import digits_run
digits_run.run(sys.argv[1], stage=sys.argv[2], **json.loads(sys.argv[3]))
"""


def start(folder, stage):
    """The process; what it writes to stderr stands beside the folder."""
    command = [sys.executable, "-c", SCRIPT, str(folder), stage, json.dumps(TINY)]
    with open(folder.with_suffix(".stderr"), "wb") as stderr:
        return subprocess.Popen(
            command, cwd=ROOT, env={**os.environ, "XLA_FLAGS": ""},
            stdout=subprocess.DEVNULL, stderr=stderr,
        )  # fmt: skip


def said(folder):
    return folder.with_suffix(".stderr").read_text(errors="replace")[-2000:]


@pytest.mark.slow
def test_sigkill_at_random_moments_changes_no_bit(tmp_path):
    """Tower, base and initial model, then sampled answers: killed again and again, and not."""
    names = ("tower", "pretrain", "sft")
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    took = {}
    for stage in names:
        began = time.monotonic()
        assert start(whole, stage).wait() == 0, said(whole)
        took[stage] = time.monotonic() - began
    generator, kills = random.Random(0), 0
    for number, stage in enumerate(names, 1):
        while not (killed / stage / "done.json").exists():
            process = start(killed, stage)
            share = generator.uniform(0.4, 0.95) if kills < 2 * number else 1e12
            deadline = time.monotonic() + share * took[stage]
            while process.poll() is None and time.monotonic() < deadline:
                time.sleep(0.05)
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
                kills += 1
            assert process.wait() in (0, -signal.SIGKILL), said(killed)
    assert kills >= 2
    for name in ("pretrain/model/model.safetensors", "sft/model/model.safetensors",
                 "sft/validation.jsonl"):  # fmt: skip
        assert (whole / name).read_bytes() == (killed / name).read_bytes(), name
