"""Every recipe and every loss on every subtask, by changing only the config.

One cell is a run of `launch/train.py`'s function on a small checkpoint and a dataset of the digits
world: under a few full-batch steps the loss falls, and what is measured on held-out rows moves. The
default run covers each subtask and each recipe once; the whole grid is slow.
"""

import math

import jax
import pytest

from aa_jax import runs, small_models
from aa_jax.losses import PREFERENCE_LOSSES, UNPAIRED_LOSSES
from aa_jax.sharding import make_mesh
from aa_jax.training.metrics import read_metrics, series

SIZES = {
    "text": dict(dim=32, layers=2, heads=2, kv_heads=2, mlp_dim=48, max_length=256),
    "tower": dict(dim=16, layers=1, heads=2, codes=16, embed_dim=4),
}
TEMPLATES = {
    "T2T": "AA_T2T", "TI2T": "AA_TI2T", "TA2T": "AA_TA2T", "TV2T": "AA_TV2T", "T2I": "AA_T2I",
    "TI2TI": "ti2ti_preference",
}  # fmt: skip
SUPERVISED = TEMPLATES | {"TI2TI": "ti2ti"}
SPOKEN = ("T2T", "TI2T", "TA2T", "TV2T")  # answers that language feedback speaks about
LOSSES = (
    [("sft", None), ("feedback", None), ("reward", None)]
    + [("preference", name) for name in PREFERENCE_LOSSES]
    + [("kto", name) for name in UNPAIRED_LOSSES]
    + [("cut", None), ("graded", None)]
)
CELLS = [
    (subtask, recipe, variant)
    for subtask in TEMPLATES
    for recipe, variant in LOSSES
    if recipe not in ("feedback", "cut", "graded") or subtask in SPOKEN
]
QUICK = [
    ("T2T", "sft", None), ("TI2T", "feedback", None), ("TA2T", "reward", None),
    ("TV2T", "preference", "sigmoid"), ("T2I", "kto", "kto"), ("TI2TI", "preference", "simpo"),
]  # fmt: skip
ROWS = 16
TWO_OF_A_ROW = ("feedback", "kto", "cut", "graded")  # both responses, one by one


@pytest.fixture(scope="module")
def worlds(tmp_path_factory):
    """subtask -> files, made when first asked for."""
    made, root = {}, tmp_path_factory.mktemp("worlds")

    def world(subtask):
        if subtask not in made:
            made[subtask] = small_models.write(
                root / subtask, subtask, model=SIZES,
                data=dict(pairs=ROWS, demonstrations=ROWS, held_out=8),
            )  # fmt: skip
        return made[subtask]

    return world


def identity(cell):
    return "-".join(str(part) for part in cell if part)


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    monkeypatch.setattr(runs, "make_mesh", lambda: make_mesh(devices=jax.devices()[:1]))


def run(folder, files, subtask, recipe, variant):
    supervised = recipe == "sft"
    every_row = ROWS * (2 if recipe in TWO_OF_A_ROW else 1)
    options = {} if variant is None else {"variant": variant}
    return runs.run(
        folder,
        recipe=recipe,
        model={"path": files["model"]},
        data={
            "path": files["sft" if supervised else "preference"],
            "template": (SUPERVISED if supervised else TEMPLATES)[subtask],
        },
        eval_data=None if supervised else {"path": files["preference_val"]},
        objective=options,
        optim={"lr": 3e-3, "schedule": "constant", "warmup_steps": 0},
        train={
            "steps": 6, "epochs": None, "batch_rows": every_row, "log_every": 1, "eval_every": 3,
            "frozen": ("vq/*",) if subtask in ("T2I", "TI2TI") else (),
        },
    )  # fmt: skip


def check(tmp_path, worlds, subtask, recipe, variant):
    figures = run(tmp_path, worlds(subtask), subtask, recipe, variant)
    assert figures["steps"] == 6 and not figures["dropped"]
    rows = read_metrics(tmp_path, stage="train")
    losses = series(rows, "loss")[1]
    assert all(map(math.isfinite, losses))
    assert losses[-1] < losses[0]
    if recipe != "sft":
        held_out = series(rows, "eval/loss")[1]
        assert held_out[-1] != held_out[0]
    assert (tmp_path / "model/model.safetensors").is_file()


@pytest.mark.parametrize("cell", QUICK, ids=identity)
def test_each_loss_and_each_subtask(cell, worlds, tmp_path):
    check(tmp_path, worlds, *cell)


@pytest.mark.slow
@pytest.mark.parametrize("cell", [c for c in CELLS if c not in QUICK], ids=identity)
def test_the_whole_grid(cell, worlds, tmp_path):
    check(tmp_path, worlds, *cell)
