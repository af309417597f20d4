"""The experiment on the digits world with everything tiny: what it writes, and that it resumes."""

import json

import numpy as np
import pytest

from aa_jax.errors import ConfigError
from aa_jax.rl import digits_run, digits_table

FROZEN = ("vision_tower/*",)
TINY = {
    "start": {
        "model": {"vision_dim": 16, "vision_layers": 2, "vision_heads": 2, "dim": 32, "layers": 2,
                  "heads": 2, "kv_heads": 2, "mlp_dim": 48},
        "tower": {"steps": 3, "batch_rows": 8},
        "pretrain_examples": 64,
        "pretrain": {"frozen": FROZEN, "batch_rows": 4, "pack_length": 128, "steps": 4,
                     "optim": {"lr": 3e-3}},
        "demonstrations": {"n": 64},
        "sft": {"frozen": FROZEN, "batch_rows": 4, "pack_length": 128, "steps": 4,
                "optim": {"lr": 3e-3}},
        "preference_prompts": 48, "pairs": 16, "sampling": {"batch_rows": 16},
    },
    "algorithms": {
        "grpo": {"rollout": {"prompts": 4, "samples": 2}},
        "critic": {"algorithm": "ppo", "rollout": {"prompts": 4}, "kl": {"coef": 0.1}},
    },
    "lrs": (1e-3,),
    "rollout": {"iterations": 2},
    "reward": {"batch_rows": 8, "epochs": 1, "optim": {"lr": 1e-3}},
    "sampling": {"batch_rows": 16},
    "optim": {},
    "prompts": 16, "validation_prompts": 8, "test_prompts": 8,
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("labels", ["oracle", "annotators"])
def test_every_stage_writes_what_the_next_one_reads(tmp_path, monkeypatch, labels):
    from aa_jax.llf import lab
    from aa_jax.llf import respond as llf_respond

    real = lab.respond

    def respond(*args, **kwargs):  # an untrained model seldom ends an answer in time
        return [{**line, "finished": True, "text": line["text"] or "1"} for line in
                real(*args, **kwargs)]  # fmt: skip

    def read_lines(path):  # and its answers are equally bad
        lines = llf_respond.read_lines(path)
        text = "There are 3 digits." if path.name == "response_2.jsonl" else "3"
        return [{**line, "finished": True, "text": text} for line in lines]

    monkeypatch.setattr(lab, "respond", respond)
    monkeypatch.setattr(digits_run, "read_lines", read_lines)
    lrs = (1e-3,) if labels == "oracle" else (1e-3, 1e-4)
    config = {**TINY, "lrs": lrs, "labels": labels}
    found = digits_run.run(tmp_path, **config)
    assert list(found) == ["reward", "rl", "evaluate_rl"]
    assert {cell["arm"] for cell in found["rl"]["cells"]} == {"grpo", "critic"}
    for chosen in found["rl"]["chosen"].values():
        assert list(chosen) == ["grpo", "critic"] and set(chosen.values()) <= set(lrs)
    result = found["evaluate_rl"]
    assert result["initial"]["win_rate"][0] == 0.5
    # With one rate there is nothing to choose, and no second row.
    assert ("grpo_by_reward" in result) == (len(lrs) > 1)
    for row in [name for name in result if name != "initial"]:
        scores = json.loads((tmp_path / f"evaluate_rl/{row}_scores.json").read_text())
        assert len(scores["mean"]) == 8
        assert result[row]["mean"][0] == pytest.approx(sum(scores["mean"]) / 8)
    rows = [line.split(" | ") for line in digits_table.table([tmp_path]).splitlines()[2:]]
    assert [row[0].removeprefix("| ") for row in rows] == [
        name for name in result if not name.endswith("_greedy")
    ]
    assert rows[1][3].startswith(f"{result['grpo']['mean'][0]:.3f} [")
    assert digits_run.run(tmp_path, **config) == found


def test_unknown_labels_are_refused_before_anything_runs(tmp_path):
    with pytest.raises(ConfigError, match="'people'.*oracle, annotators"):
        digits_run.run(tmp_path / "run", labels="people", **TINY)
    assert not (tmp_path / "run").exists()


def finished(folder, seed, arms):
    """A folder as a finished run leaves it, of scores without meaning."""
    rng, values = np.random.default_rng(seed), {}
    for row in ("initial", *arms):
        for name in (row, row + "_greedy"):
            values[name] = {"reward": 1.0}
            scores = {"mean": rng.random(20).tolist(), "words": [3.0] * 20}
            path = folder / f"evaluate_rl/{name}_scores.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(scores))
    cells = [{"arm": arm, "lr": 1e-4, "kl": 0.5} for arm in arms]
    chosen = {"oracle": dict.fromkeys(arms, 1e-4)}
    for stage, found in (("evaluate_rl", values), ("rl", {"cells": cells, "chosen": chosen})):
        (folder / stage).mkdir(exist_ok=True)
        (folder / stage / "done.json").write_text(json.dumps({"summary": found, "seconds": 1}))
    return folder


def test_a_table_of_runs_of_unequal_arms(tmp_path):
    runs = [finished(tmp_path / "0", 0, ["grpo", "ppo"]), finished(tmp_path / "1", 1, ["ppo"])]
    table = digits_table.table(runs).splitlines()
    assert [line.split(" | ")[0] for line in table[2:4]] == ["| initial", "| ppo"]
    assert table[4:] == ["", "Not in every run, and left out: grpo."]
