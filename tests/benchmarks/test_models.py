"""The benchmarks of import and decoding run, and compare before they time."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"


def run(program, out, *flags):
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    command = [sys.executable, FOLDER / program, *flags, "--repetitions", 1, "--out", out]
    done = subprocess.run(
        list(map(str, command)), env=environment, capture_output=True, text=True, timeout=540
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout, json.loads(out.read_text())


@pytest.mark.slow
def test_decoding(tmp_path):
    flags = ("--size", "tiny", "--seconds", 0.001)
    printed, found = run("decoding.py", tmp_path / "out.json", *flags)
    assert "greedy tokens equal" in printed
    assert [len(found[name]["ratio"]) for name in ("prefill", "decode", "generate")] == [1, 1, 2]


@pytest.mark.slow
def test_loading(tmp_path):
    _, found = run("loading.py", tmp_path / "out.json", "--megabytes", 1, "--shards", 2)
    cases = [case for case in found.values() if isinstance(case, dict) and "ratio" in case]
    assert len(cases) == 4 and all(len(case["ratio"]) == 2 for case in cases)
