"""A checkpoint that only one process finds damaged: both go back to the one before."""

from pathlib import Path

import pytest

PROGRAM = Path(__file__).with_name("damage.py")


@pytest.mark.parametrize("how", ["truncated", pytest.param("bit", marks=pytest.mark.slow)])
def test_both_processes_use_the_one_before(how, start, tmp_path):
    folder = tmp_path / "checkpoints"
    with start([PROGRAM, folder, how]) as job:
        assert job.wait(timeout=120) == 0, job.text[-3000:]
    for index in range(2):
        assert (folder / f"found{index}").read_text() == "{'position': 2} True"
    assert job.text.count("resuming from step 2") == 2 and (folder / "damaged/3").is_dir()
