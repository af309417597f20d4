"""Rollouts of several processes are those of one, whatever they share the slots into."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]


def samples(folder, processes, devices):
    """What each process wrote."""
    folder.mkdir()
    command = [
        sys.executable, ROOT / "launch/local.py", "--processes", processes, "--devices", devices,
        "--", ROOT / "tests/sampling/several.py", "--workdir", folder,
    ]  # fmt: skip
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, timeout=540, cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
    return [dict(np.load(folder / f"{index}.npz")) for index in range(processes)]


@pytest.mark.slow
def test_two_processes_write_what_one_writes(tmp_path):
    """Slots refilled, narrowed for the last samples, and ended by stop texts: the same text and
    log-prob for every seed, and both processes know all of them."""
    (one,) = samples(tmp_path / "one", 1, 1)
    two = samples(tmp_path / "two", 2, 1)
    np.testing.assert_array_equal(one.pop("devices"), [1, 1, 1])
    for found in two:
        np.testing.assert_array_equal(found.pop("devices"), [2, 2, 1])
        assert found.keys() == one.keys() and len(one) == 9
        for name, values in one.items():
            if name.endswith("logps"):
                np.testing.assert_allclose(found[name], values, atol=1e-5)
            else:
                np.testing.assert_array_equal(found[name], values, err_msg=name)
    for name in ("refilled", "narrowed", "stopped"):  # lengths differ, so slots end at other times
        assert len(np.unique((one[f"{name}/tokens"] >= 0).sum(1))) > 4
