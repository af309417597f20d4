"""Notebooks run from top to bottom, stay short, and are committed without outputs."""

import json
from pathlib import Path

import jax
import matplotlib
import pytest

NOTEBOOKS = sorted((Path(__file__).parents[2] / "launch/notebooks").glob("*.ipynb"))


def code_cells(path):
    cells = json.loads(path.read_text())["cells"]
    return [cell for cell in cells if cell["cell_type"] == "code"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_it_runs(path, monkeypatch):
    monkeypatch.setattr(matplotlib, "get_backend", lambda: "agg")
    matplotlib.use("agg", force=True)
    names = {"__name__": "__main__"}
    for number, cell in enumerate(code_cells(path)):
        exec(compile("".join(cell["source"]), f"{path.name}[{number}]", "exec"), names)
    losses = [loss for loss, _ in names["curve"]]
    assert losses[0] == pytest.approx(float(jax.numpy.log(2.0)), abs=1e-5)
    assert losses[-1] < losses[0] - 0.05
    matplotlib.pyplot.close("all")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_it_is_short_and_clean(path):
    cells = code_cells(path)
    assert sum(line.strip() != "" for cell in cells for line in cell["source"]) <= 90
    assert all(not cell["outputs"] and cell["execution_count"] is None for cell in cells)
