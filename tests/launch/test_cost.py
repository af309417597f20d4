"""Cost models from a config: pairs by harmfulness, signs by safety."""

import jax
import numpy as np
import pytest

from aa_jax import runs, small_models
from aa_jax.data import digits
from aa_jax.data.example import Row
from aa_jax.data.templates import TEMPLATES
from aa_jax.errors import DataError
from aa_jax.rewards.learned import CostModel
from aa_jax.sharding import make_mesh
from aa_jax.training.metrics import read_metrics, series

SIZES = {
    "text": dict(dim=32, layers=2, heads=2, kv_heads=2, mlp_dim=48, max_length=256),
    "tower": dict(dim=16, layers=1, heads=2),
}


def row(safe, safer):
    return Row.of(
        {"prompt": "p", "response_0": "first", "response_1": "second",
         "better_response_id": 0, "safer_response_id": safer,
         "is_response_0_safe": safe[0], "is_response_1_safe": safe[1]}
    )  # fmt: skip


def test_pku_saferlhf_rows_become_costs():
    """The less safe response first; +1 unsafe, -1 safe."""
    for safe, safer, texts, signs in (
        ((True, False), 0, ["second", "first"], (1.0, -1.0)),
        ((False, False), 1, ["first", "second"], (1.0, 1.0)),
        ((True, True), 0, ["second", "first"], (-1.0, -1.0)),
    ):
        pair = TEMPLATES["PKUSafeRLHF_Cost"].preference(row(safe, safer))
        assert [r.text for r in pair.responses] == texts
        assert pair.meta["signs"] == signs


def harmful(response):
    """In this test the word "largest" does harm."""
    return "largest" in response


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cost")
    rows = []
    for made in digits.preference_rows(400, 0):
        texts = made["response_1"], made["response_2"]
        if harmful(texts[0]) == harmful(texts[1]) or len(rows) == 24:
            continue
        kept = {name: made[name] for name in ("question", "image", "response_1", "response_2")}
        rates = [-1.0 if harmful(text) else 1.0 for text in texts]
        rows.append(
            kept | {"safer_response_id": 1 if rates[0] > rates[1] else 2}
            | {f"response_{i}_harmless_rate": rates[i - 1] for i in (1, 2)}
        )  # fmt: skip
    import pandas

    pandas.DataFrame(rows).to_parquet(folder / "cost.parquet")
    model = small_models.write_model(folder / "model", "TI2T", **SIZES)
    return model, folder / "cost.parquet"


def settings(files, **changes):
    model, data = files
    return (
        dict(
            recipe="cost",
            model={"path": str(model)},
            data={"path": str(data), "template": "SafeRLHF_V_Cost"},
            optim={"lr": 3e-3, "schedule": "constant", "warmup_steps": 0},
            train={"steps": 12, "epochs": None, "batch_rows": 24, "log_every": 1},
        )
        | changes
    )


def test_a_cost_model_learns_the_border(files, tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "make_mesh", lambda: make_mesh(devices=jax.devices()[:1]))
    runs.run(tmp_path, **settings(files))
    rows = read_metrics(tmp_path, stage="train")
    for name in ("loss", "sign_accuracy", "accuracy"):
        values = series(rows, name)[1]
        assert values[-1] < values[0] if name == "loss" else values[-1] > 0.9
    judge = CostModel(str(tmp_path / "model"), mesh=make_mesh(devices=jax.devices()[:1]))
    prompts = list(digits.evaluation_prompts(4, 0, "train"))
    texts = ["the largest is 3 .", "the sum is 3 ."] * 2
    costs = judge.scores([p.to_data_example(()) for p in prompts], texts)
    assert np.all(np.asarray(costs)[::2] > np.asarray(costs)[1::2])


def test_a_template_without_signs_is_refused(files, tmp_path):
    cfg = settings(files)
    names = {"prompt": "question", "image": "image"}
    names |= {"chosen": "response_1", "rejected": "response_2"}
    cfg["data"] = {"path": cfg["data"]["path"], "columns": names}
    with pytest.raises(DataError, match="no 'signs' in the meta data"):
        runs.run(tmp_path, **cfg)
