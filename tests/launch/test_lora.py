"""Adapters from a config: every recipe, RL, kills, and what is in memory and on disk."""

import importlib.util
import json
from pathlib import Path

import jax
import numpy as np
import peft as hf_peft
import pytest
import torch
import transformers
from safetensors.numpy import load_file

from aa_jax import config, models, objectives, recipes, rl, runs
from aa_jax.errors import CheckpointError
from aa_jax.llf import pipeline
from aa_jax.llf.lab import Lab, Lengths
from aa_jax.models import heads
from aa_jax.models.names import flatten
from aa_jax.sharding import make_mesh
from aa_jax.training import loop
from aa_jax.training.metrics import read_metrics, series

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")


def sibling(name):
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


RUNS = sibling("test_runs")


def settings(recipe, checkpoint, data, **lora):
    cfg = RUNS.settings("dpo", checkpoint, data)
    cfg["recipe"] = recipe
    if recipe != "dpo":
        cfg["objective"] = {}
    cfg["train"] |= {"steps": 2, "epochs": None, "frozen": ()}
    return {**cfg, "lora": {"rank": 2, "alpha": 4.0, **lora}}


def torch_model(folder):
    return transformers.LlavaForConditionalGeneration.from_pretrained(folder).eval()


def text_logits(model):
    ids = torch.arange(10, 22)[None]
    with torch.no_grad():
        return model(input_ids=ids).logits.numpy()


@pytest.mark.parametrize(
    "recipe, kind",
    [
        ("dpo", None),
        ("reward", "nf4"),
        *[pytest.param(*case, marks=pytest.mark.slow) for case in
          [("sft", None), ("feedback", "int8"), ("dpo", "nf4"), ("kto", None), ("reward", None)]],
    ],
)  # fmt: skip
def test_every_recipe_trains_adapters_alone(recipe, kind, checkpoint, preferences, tmp_path):
    cfg = settings(recipe, checkpoint, preferences)
    cfg["model"]["quantize"] = None if kind is None else {"kind": kind, "block": 8}
    figures = runs.run(tmp_path, **cfg)
    assert figures["steps"] == 2
    assert series(read_metrics(tmp_path, stage="train"), "grad_norm")[1][-1] > 0
    # transformers and peft find in the two folders the same model.
    base = torch_model(checkpoint)
    if kind is not None:
        model, params = models.load(checkpoint, quantize={"kind": kind, "block": 8})
        models.save(tmp_path / "base", model, params)
        base = torch_model(tmp_path / "base")
    before = text_logits(base)
    wrapped = hf_peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    after = text_logits(wrapped)
    merged = text_logits(torch_model(tmp_path / "model"))
    np.testing.assert_allclose(merged, after, atol=1e-4, rtol=0)
    assert np.abs(after - before).max() > 1e-3
    # A checkpoint holds what trains, not the base.
    trained = sum(x.numel() for n, x in wrapped.named_parameters() if "lora_" in n)
    record = json.loads((tmp_path / "checkpoints/train/2/record/metadata").read_text())
    stored = {name: leaf for name, leaf in record["body"]["leaves"].items() if len(leaf) == 3}
    assert not any(name.endswith(("norm/scale", "embed/weight")) for name in stored)
    numbers = sum(int(np.prod(shape)) for shape, *_ in stored.values())
    assert 3 * trained <= numbers < 3 * trained + 200  # two moments; a head, steps, the RNG
    if recipe == "reward":
        assert (tmp_path / "adapter" / heads.HEAD_FILE).read_bytes() == (
            tmp_path / "model" / heads.HEAD_FILE
        ).read_bytes()
        heads.load(tmp_path / "model")


class Killed(Exception):
    pass


@pytest.mark.slow
def test_killed_and_continued_bit_for_bit_beside_the_same_base(
    checkpoint, preferences, tmp_path, monkeypatch
):
    cfg = settings("sft", checkpoint, preferences)
    cfg["train"] |= {"steps": 3, "checkpoint_every": 1}
    runs.run(tmp_path / "whole", **cfg)

    def kill(self, params, *rest):
        raise Killed

    cut = {**cfg, "eval_data": {"size": 4}, "train": {**cfg["train"], "eval_every": 2}}
    evaluation = recipes._evaluation
    monkeypatch.setattr(recipes, "_evaluation", lambda *a, **k: kill)
    with pytest.raises(Killed):
        runs.run(tmp_path / "killed", **cut)
    monkeypatch.setattr(recipes, "_evaluation", evaluation)
    other = tmp_path / "other"
    model, params = models.load(checkpoint)
    params["language_model"]["layers"]["attn"]["q"]["kernel"] *= 1.0001
    models.save(other, model, params, extra_files_from=checkpoint)
    with pytest.raises(CheckpointError, match="layers/attn/q/kernel.*same base model"):
        runs.run(tmp_path / "killed", **{**cfg, "model": {**cfg["model"], "path": str(other)}})
    runs.run(tmp_path / "killed", **cfg)
    for name in ("adapter/adapter_model.safetensors", "model/model.safetensors"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def first_losses(checkpoint, preferences, folder, mesh, **lora):
    cfg = settings("dpo", checkpoint, preferences, **lora)
    cfg["mesh"] = mesh
    runs.run(folder, **cfg)
    return series(read_metrics(folder, stage="train"), "loss")[1]


@pytest.mark.slow
def test_the_reference_is_the_base_and_of_a_continued_adapter_its_start(
    checkpoint, preferences, tmp_path, monkeypatch
):
    """Log-probs of the reference are those of the plain model; DPO starts at log 2 both ways."""
    seen, kept = [], recipes.reference_logps

    def watch(model, params, data, form, rows, mesh, cache=None):
        values = kept(model, params, data, form, rows, mesh, cache)
        seen.append((values, data, form, rows, mesh))
        return values

    monkeypatch.setattr(recipes, "reference_logps", watch)
    mesh = {"fsdp": 2, "tensor": 2, "data": -1}
    losses = first_losses(checkpoint, preferences, tmp_path / "new", mesh, targets=("*",))
    plain, base = models.load(checkpoint)
    np.testing.assert_allclose(seen[0][0], kept(plain, base, *seen[0][1:]), atol=1e-4)
    assert losses[0] == pytest.approx(np.log(2), abs=1e-6)
    again = {"path": str(tmp_path / "new/adapter"), "targets": None}
    losses = first_losses(checkpoint, preferences, tmp_path / "more", mesh, **again)
    assert losses[0] == pytest.approx(np.log(2), abs=1e-6)
    assert np.abs(seen[1][0] - seen[0][0]).max() > 1e-3


@pytest.mark.slow
def test_the_mesh_changes_nothing(checkpoint, preferences, tmp_path):
    """Adapters on every layer, 8 devices: data alone, and fsdp 2 x tensor 2 x data 2."""
    options = dict(targets=("*",))
    one = first_losses(checkpoint, preferences, tmp_path / "one", {"data": -1}, **options)
    mesh = {"fsdp": 2, "tensor": 2, "data": -1}
    many = first_losses(checkpoint, preferences, tmp_path / "many", mesh, **options)
    np.testing.assert_allclose(one, many, rtol=1e-5)


def buffers(tree):
    """Where the first device keeps the arrays of a tree."""
    first = jax.devices()[0]
    shards = [s for x in jax.tree.leaves(tree) if isinstance(x, jax.Array)
              for s in x.addressable_shards if s.device == first]  # fmt: skip
    return {shard.data.unsafe_buffer_pointer() for shard in shards}


@pytest.mark.slow
def test_policy_critic_and_reference_of_ppo_share_one_base(
    checkpoint, preferences, tmp_path, monkeypatch
):
    """In memory there is one base, three sets of adapters' size, and the value head."""
    from aa_jax.rl import train as rl_train

    reward = tmp_path / "reward"
    runs.run(
        reward, recipe="reward", model={"path": str(checkpoint)},
        data={"path": str(preferences), "template": "AA_TI2T"}, optim={"lr": 1e-3},
        train={"batch_rows": 16, "steps": 1}, lora={"rank": 2},
    )  # fmt: skip
    held = {}

    def fit(**arguments):
        rollouts, state = arguments["batches"], arguments["state"]
        held["policy"], held["critic"] = (state["params"][k] for k in ("policy", "critic"))
        held["reference"], held["opt"] = rollouts._reference, state["opt_state"]
        return loop.fit(**arguments)

    monkeypatch.setattr(rl_train, "fit", fit)
    cfg = config.load(
        ROOT / "configs/ti2t/llava_ppo.py",
        [
            f"--config.model.path={checkpoint}", f"--config.prompts.path={preferences}",
            f"--config.reward.path={reward / 'model'}", "--config.reward.dtype=float32",
            "--config.model.dtype=float32", "--config.model.param_dtype=float32",
            "--config.mesh.fsdp=1", "--config.mesh.data=-1", "--config.optim.lr=1e-3",
            "--config.rollout.prompts=8", "--config.rollout.iterations=2",
            "--config.sampling.max_new_tokens=8", "--config.sampling.batch_rows=8",
            "--config.reward.batch_rows=8", "--config.kl.coef=0.1",
        ],
    )  # fmt: skip
    run, chosen = rl.select(cfg)
    values = config.resolve(chosen)
    values["critic"], values["frozen"] = {}, ()

    counted = {}
    kept = objectives.token_logps

    def count(*args, **kwargs):
        if not counted:
            counted.update({name: buffers(tree) for name, tree in held.items()})
        return kept(*args, **kwargs)

    monkeypatch.setattr(objectives, "token_logps", count)
    run(tmp_path / "ppo", **values, lora={"rank": 2})
    _, base = models.load(checkpoint)
    adapters = 2 * 7  # a and b of the decoder's seven linear layers
    together = counted["policy"] | counted["critic"] | counted["reference"]
    assert len(together) == len(jax.tree.leaves(base)) + 3 * adapters + 1  # and the value head
    assert len(counted["opt"]) <= 2 * (2 * adapters + 1) + 8  # two moments of each, and counts
    lines = read_metrics(tmp_path / "ppo", stage="rl.rollout")
    assert series(lines, "kl")[1][0] == pytest.approx(0.0, abs=1e-5)
    assert max(series(lines, "sampler_gap")[1]) < 1e-4
    assert (tmp_path / "ppo/adapter/adapter_model.safetensors").exists()
    trained, start = models.load(tmp_path / "ppo/model")[1], flatten(base)
    moved = {k for k, x in flatten(trained).items() if not np.array_equal(x, start[k])}
    assert len(moved) == 7 and all("language_model/layers/" in k for k in moved)


def test_a_stage_of_language_feedback_trains_adapters(checkpoint, preferences, tmp_path):
    lengths = Lengths(64, 64, 64, 12, 12)
    lab = Lab(tmp_path, make_mesh(), 0, lengths, batch_rows=8, remat="none")
    data = runs.load_dataset(
        "supervised",
        lab.load(str(checkpoint))[2],
        path=str(preferences),
        template="AA_TI2T",
        keep=8,
    )
    figures = pipeline.train_model(
        tmp_path / "sft", lab, "sft", base=str(checkpoint), examples=data, batch_rows=8, steps=1,
        optim={"lr": 1e-2, "warmup_steps": 0}, lora={"rank": 2, "targets": ("q_proj",)},
    )  # fmt: skip
    assert figures["steps"] == 1
    names = load_file(tmp_path / "sft/adapter/adapter_model.safetensors")
    assert len(names) == 2 * (2 + 2)  # A and B in both layers of the tower and of the decoder
    trained, base = (flatten(models.load(f)[1]) for f in (tmp_path / "sft/model", checkpoint))
    moved = {path for path in base if not np.array_equal(trained[path], base[path])}
    assert "language_model/layers/attn/q/kernel" in moved
    assert all(path.endswith("attn/q/kernel") for path in moved)
