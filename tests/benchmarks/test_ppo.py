"""The PPO benchmark says what it needs, and compares before it times."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).resolve().parents[2] / "benchmarks/ppo.py"


def run(*flags, **changes):
    environment = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "TRL_PPO")}
    return subprocess.run(
        [sys.executable, str(PROGRAM), *flags], env=environment | changes,
        capture_output=True, text=True,
    )  # fmt: skip


def test_it_says_what_to_install():
    done = run()
    assert done.returncode == 1
    assert "pip install --no-deps --target DIR trl==1.12.0" in done.stderr


@pytest.mark.slow
@pytest.mark.skipif("TRL_PPO" not in os.environ, reason="needs TRL 1.12 in TRL_PPO")
def test_tiny_run(tmp_path):
    flags = f"--size tiny --repetitions 1 --out {tmp_path / 'result.json'}".split()
    done = run(*flags, TRL_PPO=os.environ["TRL_PPO"])
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads((tmp_path / "result.json").read_text())
    assert max(result["differences"].values()) < 1e-3
    assert len(result["seconds_per_iteration"]["ours"]) == 1
    assert sum(share["median"] for share in result["shares"].values()) == pytest.approx(1)
