"""Reward models from the 0-3 grades of each dimension, by changing only the config."""

import jax
import numpy as np
import pytest

from aa_jax import models, runs, small_models
from aa_jax.data.example import InvalidRow, Row
from aa_jax.data.templates import TEMPLATES
from aa_jax.errors import ConfigError, DataError
from aa_jax.losses import ordered_thresholds
from aa_jax.models import heads
from aa_jax.models.safetensors import read_header
from aa_jax.sharding import make_mesh
from aa_jax.training.metrics import read_metrics, series

SIZES = {
    "text": dict(dim=32, layers=2, heads=2, kv_heads=2, mlp_dim=48, max_length=256),
    "tower": dict(dim=16, layers=1, heads=2),
}
ROW = {"question": "q", "response_1": "a", "response_2": "b", "overall_response": 3}


def graded(**values):
    return TEMPLATES["AA_T2T"].graded(Row.of(ROW | values))


def test_grades_are_the_rate_columns_of_each_response():
    """A tie is no obstacle: the pair's label is not read."""
    first, second = graded(clarity_rate_1=2, clarity_rate_2="3", safety_rate_1=None,
                           safety_rate_2=0.0)  # fmt: skip
    assert [x.responses[0].text for x in (first, second)] == ["a", "b"]
    assert (first.meta["clarity_rate"], first.meta["safety_rate"]) == (2, -1)
    assert (second.meta["clarity_rate"], second.meta["safety_rate"]) == (3, 0)
    only = graded(clarity_rate_1=None, clarity_rate_2=1)
    assert [x.responses[0].text for x in only] == ["b"]
    with pytest.raises(InvalidRow, match="neither") as error:
        graded(clarity_rate_1=None, clarity_rate_2=float("nan"))
    assert error.value.reason == "no grades"
    for wrong in (-1, 1.5, True, "good"):
        with pytest.raises(InvalidRow, match="clarity_rate_1 is .* a grade is 0, 1, 2, 3") as error:
            graded(clarity_rate_1=wrong, clarity_rate_2=1)
        assert error.value.reason == "invalid grade"
    with pytest.raises(DataError, match="no column <dimension>_rate_1.*'response_1'"):
        graded()


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return small_models.write(
        tmp_path_factory.mktemp("graded"), "TI2T", model=SIZES,
        data=dict(pairs=24, demonstrations=8, held_out=8),
    )  # fmt: skip


def train(folder, files, **objective):
    return runs.run(
        folder, recipe="graded", model={"path": files["model"]},
        data={"path": files["preference"], "template": "AA_TI2T"},
        eval_data={"path": files["preference_val"]}, objective=objective,
        optim={"lr": 1e-2, "schedule": "constant", "warmup_steps": 0},
        train={
            "steps": 12, "epochs": None, "batch_rows": 48, "log_every": 1, "eval_every": 6,
            "frozen": ("vision_tower/*",),
        },
    )  # fmt: skip


def test_a_model_of_grades_is_a_reward_model(files, tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "make_mesh", lambda: make_mesh(devices=jax.devices()[:1]))
    asked = ("clarity", "prompt_following", "safety")
    train(tmp_path, files, dimensions=asked)
    rows = read_metrics(tmp_path, stage="train")
    loss, error = series(rows, "loss")[1], series(rows, "absolute_error")[1]
    assert loss[-1] < 0.8 * loss[0] and error[-1] < error[0]
    # Everything in this world is safe: three grades of three.
    assert series(rows, "accuracy/safety")[1][-1] == 1.0
    assert {"eval/loss", "eval/accuracy/clarity"} <= {name for row in rows for name in row}

    stored = read_header(tmp_path / "model" / heads.HEAD_FILE)
    head = {
        name: np.array(stored[f"grade_head.{name}"].read()) for name in ("kernel", "thresholds")
    }
    assert head["kernel"].shape == (32, 3) and head["thresholds"].shape == (3, 3)
    model, params = heads.load(tmp_path / "model")
    np.testing.assert_allclose(
        params["score_head"]["kernel"][:, 0], head["kernel"].mean(1), rtol=1e-6
    )
    assert models.load(tmp_path / "model")[0].family == model.family


def test_fresh_thresholds_are_one_apart_and_centred(files):
    model = models.build(models.hf.read_config(files["model"]))
    head = heads.init_grade_head(model, jax.random.key(0), 2)
    np.testing.assert_allclose(ordered_thresholds(head["thresholds"]), [[-1, 0, 1]] * 2, atol=1e-6)
    assert head["kernel"].shape == (32, 2)


def test_wrong_dimensions_are_named(files, tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "make_mesh", lambda: make_mesh(devices=jax.devices()[:1]))
    with pytest.raises(ConfigError, match="dimensions must be named once each"):
        train(tmp_path, files, dimensions=("safety", "safety"))
    with pytest.raises(DataError, match="no 'beauty_rate' in the meta data.*clarity_rate"):
        train(tmp_path, files, dimensions=("beauty",))
