"""The sampling benchmark runs and compares before it times."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.mark.slow
def test_tiny_run(tmp_path):
    out = tmp_path / "result.json"
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    command = "--size tiny --repetitions 1 --seconds 0.001 --out".split()
    done = subprocess.run(
        [sys.executable, str(FOLDER / "sampling.py"), *command, str(out)],
        env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert "greedy texts equal" in done.stdout
    result = json.loads(out.read_text())
    assert len(result["unequal"]["ratio"]) == 2 and len(result["prefix"]["ratio"]) == 1
