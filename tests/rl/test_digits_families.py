"""The reinforcement learning experiment of the digits world for every family, everything tiny."""

import copy
import json

import jax
import numpy as np
import pytest

from aa_jax import models, small_models
from aa_jax.errors import ConfigError
from aa_jax.llf.respond import read_lines
from aa_jax.models import adapt, heads
from aa_jax.rl import digits_run, digits_table

TEXT = {"dim": 32, "layers": 1, "heads": 2, "kv_heads": 2, "mlp_dim": 48}
SHORT = {"batch_rows": 4, "steps": 2, "optim": {"lr": 3e-3}}
TINY = {
    "max_digits": 2,
    "start": {
        "model": {"text": TEXT, "tower": {"dim": 16, "layers": 1, "heads": 2}},
        "pretrain_examples": 16, "pretrain": SHORT, "demonstrations": {"n": 16}, "sft": SHORT,
        "preference_prompts": 16,
    },
    "algorithms": {
        "grpo": {"rollout": {"prompts": 2, "samples": 2}},
        "ppo": {"rollout": {"prompts": 2}, "kl": {"coef": 0.1}},
    },
    "lrs": (1e-3,),
    "rollout": {"iterations": 1},
    "reward": {"batch_rows": 4, "epochs": 1, "optim": {"lr": 1e-3}},
    "sampling": {"batch_rows": 8},
    "optim": {},
    "frozen": (), "prompts": 4, "validation_prompts": 4, "test_prompts": 4,
}  # fmt: skip
DRAWN = {
    "image_tokenizer": {"sizes": {"codes": 16, "embed_dim": 4}, "continuous_steps": 1, "steps": 1,
                        "batch_rows": 8, "test_strips": 8},
    "model": {"text": TEXT, "tower": {"codes": 16, "embed_dim": 4}},
}  # fmt: skip


def labelled(monkeypatch):
    """An untrained model answers badly: one of its two answers becomes the truth."""
    from aa_jax.data import digits

    def read(path):
        lines = read_lines(path)
        text = "There are 3 digits." if path.name == "response_2.jsonl" else "3"
        return [{**line, "finished": True, "text": text} for line in lines]

    monkeypatch.setattr(digits_run, "read_lines", read)
    monkeypatch.setattr(digits, "prefer", lambda task, a, b: 1 + (len(task.facts) > 1))


@pytest.mark.slow
@pytest.mark.parametrize("subtask", ["T2T", "TA2T", "TV2T"])
def test_text_answers(tmp_path, monkeypatch, subtask):
    labelled(monkeypatch)
    config = {**TINY, "subtask": subtask}
    found = digits_run.run(tmp_path, **config)
    assert list(found) == ["reward", "rl", "evaluate_rl"]
    assert [cell["arm"] for cell in found["rl"]["cells"]] == ["grpo", "ppo"]
    assert found["evaluate_rl"]["initial"]["win_rate"][0] == 0.5
    rows = digits_table.table([tmp_path]).splitlines()[2:]
    assert [row.split(" | ")[0] for row in rows] == ["| initial", "| grpo", "| ppo"]
    assert digits_run.run(tmp_path, **config) == found


@pytest.mark.slow
@pytest.mark.parametrize("subtask", ["T2I", "TI2TI"])
def test_drawings(tmp_path, monkeypatch, subtask):
    """What is paid, stored and graded are pictures of the sampled tokens."""
    from aa_jax.rl import digits_subtasks

    values = iter(range(10**6))  # no two answers are equally good

    class Paid(digits_subtasks.Oracle):
        def __call__(self, requests):
            return [
                one.__class__(next(values), True, one.parts) for one in super().__call__(requests)
            ]

    monkeypatch.setattr(digits_subtasks, "Oracle", Paid)
    config = copy.deepcopy(TINY) | {"subtask": subtask, "frozen": ("vq/*",)}
    config["start"] |= DRAWN
    found = digits_run.run(tmp_path, **config)
    assert [cell["arm"] for cell in found["rl"]["cells"]] == ["grpo", "ppo"]
    lines = [json.loads(x) for x in (tmp_path / "evaluate_rl/ppo.jsonl").read_text().splitlines()]
    assert len(lines) == 4
    for line in lines:
        (picture,) = digits_subtasks._pictures(line)
        assert picture.shape == (16, 16, 3) and picture.dtype == np.uint8
        assert line["text"].count("<image>") == 1
    assert digits_run.run(tmp_path, **config) == found


def test_what_no_subtask_has_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="subtask is 'T2X'.*T2T, TI2T.*TI2TI"):
        digits_run.run(tmp_path / "a", **TINY, subtask="T2X")
    with pytest.raises(ConfigError, match="'annotators'; of TA2T.*one of oracle"):
        digits_run.run(tmp_path / "a", **TINY, subtask="TA2T", labels="annotators")
    arms = {"ppo_lagrangian": {"rollout": {"prompts": 2}}}
    with pytest.raises(ConfigError, match="keeps a cost below a limit.*section cost"):
        digits_run.run(tmp_path / "a", **{**TINY, "algorithms": arms}, subtask="T2T")
    assert not (tmp_path / "a").exists()


def finished(folder, name):
    (folder / name).mkdir(parents=True, exist_ok=True)
    (folder / name / "done.json").write_text('{"summary": {}, "seconds": 0.0}')


@pytest.mark.slow
def test_a_policy_with_adapters(tmp_path):
    """Only its linear layers move; the folder of the adapters alone makes the same policy."""
    base = small_models.write_model(tmp_path / "sft/model", "T2T", max_digits=2, text=TEXT)
    model, params = models.load(base)
    head = heads.init_score_head(model, jax.random.key(1))
    heads.save(tmp_path / "reward/model", model, {"model": params, "score_head": head},
               extra_files_from=base)  # fmt: skip
    for name in ("sft", "collect", "reward"):
        finished(tmp_path, name)
    arms = {"grpo": {"rollout": {"prompts": 2, "samples": 2}}}
    config = {**TINY, "algorithms": arms, "lora": {"rank": 2}, "subtask": "T2T",
              "optim": {"schedule": "constant", "warmup_steps": 0}}  # fmt: skip
    found = digits_run.run(tmp_path, **config, stage="rl")
    (cell,) = found["rl"]["cells"]
    assert cell["arm"] == "grpo" and cell["updates"] == 1
    folder = tmp_path / "rl/grpo_lr0.001"
    moved = {}
    before, after = (
        models.names.flatten(tree) for tree in (params, models.load(folder / "model")[1])
    )
    for name, leaf in after.items():
        moved[name] = float(np.abs(np.asarray(leaf) - np.asarray(before[name])).max())
    assert all(value == 0 or "layers" in name for name, value in moved.items())
    assert max(moved.values()) > 1e-5
    adapted, merged = adapt.attach(model, params, path=folder / "adapter")
    _, merged = adapt.dense(adapted, merged)
    for name, leaf in models.names.flatten(merged).items():
        np.testing.assert_allclose(leaf, after[name], atol=1e-6)
