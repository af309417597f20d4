"""Preference losses by changing only the config: with a reference, without, and unpaired."""

import importlib.util
from collections.abc import Sequence
from pathlib import Path

import pytest

from aa_jax import models, recipes, runs
from aa_jax.data.collate import plan_shapes
from aa_jax.data.processor import Processor
from aa_jax.data.tokens import Sizes
from aa_jax.errors import ConfigError
from aa_jax.sharding import make_mesh
from aa_jax.training.metrics import read_metrics, series

SPEC = importlib.util.spec_from_file_location(
    "launch_runs", Path(__file__).with_name("test_runs.py")
)
LAUNCH_RUNS = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(LAUNCH_RUNS)


def train(folder, checkpoint, data, recipe, steps=3, **objective):
    """(losses of the training steps, losses on held-out rows)."""
    cfg = LAUNCH_RUNS.settings("dpo", checkpoint, data)
    cfg["recipe"], cfg["objective"] = recipe, objective
    cfg["train"] |= {"steps": steps, "eval_every": 1, "epochs": None}
    cfg["eval_data"] = {"size": 10}
    runs.run(folder, **cfg)
    rows = read_metrics(folder, stage="train")
    return series(rows, "loss")[1], series(rows, "eval/loss")[1]


def refuse(*args, **kwargs):
    raise AssertionError("a reference was asked for")


def test_a_reference_free_loss_trains_without_a_reference(
    checkpoint, preferences, tmp_path, monkeypatch
):
    monkeypatch.setattr(recipes, "reference_logps", refuse)
    _, held_out = train(tmp_path, checkpoint, preferences, "preference", variant="simpo")
    assert held_out[-1] < held_out[0]


def test_kto_trains_on_pairs_taken_apart(checkpoint, preferences, tmp_path):
    first, held_out = train(tmp_path, checkpoint, preferences, "kto", steps=12)
    # Policy and reference are equal before the first update: 1 - sigmoid(0), and no KL.
    assert first[0] == pytest.approx(0.5, abs=1e-6)
    assert held_out[-1] < held_out[0]


def test_wrong_options_are_errors_before_anything_is_read(checkpoint, preferences, tmp_path):
    for recipe, objective, message in (
        ("dpo", {"variant": "ppo"}, "no preference loss 'ppo'"),
        ("preference", {"variant": "orpo", "tau": 1.0}, "'orpo' takes no tau"),
        ("kto", {"variant": "dpo"}, "no loss of unpaired responses 'dpo'"),
    ):
        with pytest.raises(ConfigError, match=message):
            train(tmp_path, checkpoint, preferences, recipe, **objective)
    cfg = LAUNCH_RUNS.settings("dpo", checkpoint, preferences)
    cfg["recipe"] = "kto"
    cfg["train"]["pack_length"] = 256
    with pytest.raises(ConfigError, match="pack_length is for supervised recipes; 'kto'"):
        runs.run(tmp_path, **cfg)


class EarlierTurns(Sequence):
    """Encoded data whose examples also train an earlier turn."""

    sizes = [Sizes(prompt=9, responses=(3,), trained=4)]

    def __len__(self):
        return 1

    def __getitem__(self, index):
        raise AssertionError("read too far")

    def shapes(self, layout):
        raise AssertionError("read too far")


def test_kto_refuses_earlier_turns_in_the_response(checkpoint, tmp_path):
    model, params = models.load(checkpoint)
    with pytest.raises(ConfigError, match="'kto' judges a response as a whole.*train_on='last'"):
        recipes.train(
            "kto", model=model, params=params, examples=EarlierTurns(), workdir=tmp_path,
            processor=Processor.from_pretrained(checkpoint), mesh=make_mesh(), optim={"lr": 1e-3},
        )  # fmt: skip


class Unread(EarlierTurns):
    """Encoded pairs of known lengths."""

    sizes = [Sizes(prompt=9, responses=(3, 4)), Sizes(prompt=5, responses=(2, 1))]

    def shapes(self, layout):
        return plan_shapes(self.sizes, layout)


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_angles_that_depend_on_the_row_are_not_shared(kind, checkpoint, tmp_path):
    """A pair's longer response would change the log-probs of the other."""
    numbers = {
        "dynamic": {"factor": 2.0},
        "longrope": {
            "original_max_position_embeddings": 12,
            "short_factor": [1.0, 1.0], "long_factor": [2.0, 2.0],
        },
    }[kind]  # fmt: skip
    rope = {"rope_type": kind, "rope_theta": 100.0, **numbers}
    sizes = dict(vocab_size=20, hidden_size=8, intermediate_size=12, num_hidden_layers=1)
    heads = dict(num_attention_heads=2, rope_parameters=rope)
    llama = {"architectures": ["LlamaForCausalLM"], **sizes, **heads}

    def train(recipe, positions, **options):
        if kind == "longrope":
            rope["original_max_position_embeddings"] = positions
        model = models.build({**llama, "max_position_embeddings": positions})
        recipes.train(
            recipe, model=model, params={}, examples=Unread(), workdir=tmp_path,
            processor=Processor.from_pretrained(checkpoint), mesh=make_mesh(), optim={"lr": 1e-3},
            **options,
        )  # fmt: skip

    with pytest.raises(ConfigError, match="share_prefix=True puts .* beyond 12 .* has 13"):
        train("dpo", 12)
    with pytest.raises(ConfigError, match=f"pack_length=64 puts .*{kind!r}"):
        train("sft", 12, pack_length=64)
    for positions, share in ((13, True), (12, False)):
        with pytest.raises(ConfigError, match="not the same tree"):  # on to the parameters
            train("dpo", positions, share_prefix=share)
