"""Every shipped config: its keys exist, and one train step of the real model has a shape."""

import importlib.util
import inspect
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from aa_jax import config, image_recipe, llf, models, recipes, rl, runs
from aa_jax.errors import ConfigError
from aa_jax.llf import digits_run
from aa_jax.llf.lab import Lab
from aa_jax.llf.start import llava_config
from aa_jax.models import adapt, heads
from aa_jax.models.chameleon.tokenizer import build_tokenizer
from aa_jax.rl import digits_start
from aa_jax.rl.algorithms import find_algorithm
from aa_jax.rl.estimators import find_estimator
from aa_jax.rl.objectives import actor_critic, policy
from aa_jax.rl.rollouts import Plan
from aa_jax.rl.train import train
from aa_jax.training.optim import make_optimizer
from aa_jax.training.state import frozen_paths, merge, split

ROOT = Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "configs").rglob("*.py"))
SPEC = importlib.util.spec_from_file_location("published", Path(__file__).with_name("published.py"))
PUBLISHED = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(PUBLISHED)
TRAINING = [path for path in CONFIGS if '"recipe"' in path.read_text()]

# What a user must give, by what is in the name of a config; the first match counts.
PATHS = {
    "digits": (),
    "world": (),
    "arithmetic": (),
    "lagrangian": ("model.path", "prompts.path", "reward.path", "cost.path"),
    "ppo": ("model.path", "prompts.path", "reward.path"),
    "grpo": ("model.path", "prompts.path", "reward.path"),
    "": ("model.path", "data.path"),
}


def load(path):
    # Nothing is opened here.
    keys = list(PATHS[next(k for k in PATHS if k in path.stem)])
    if 'image_tokenizer": required' in path.read_text():
        keys.append("sampling.image_tokenizer")
    return config.load(path, [f"--config.{key}=/somewhere" for key in keys])


def media(folder: str, rows: int) -> dict:
    """Shapes of one medium per row: a 336-pixel image, 30 seconds, 4 frames of 280 pixels; images
    as tokens are part of the text."""
    shape = jax.ShapeDtypeStruct
    return {
        "ti2t": {"pixel_values": shape((rows, 1, 3, 336, 336), jnp.float32)},
        "ta2t": {
            "input_features": shape((rows, 1, 128, 3000), jnp.float32),
            "feature_lengths": shape((rows, 1), jnp.int32),
        },
        "tv2t": {
            "pixel_values": shape((rows, 800, 1176), jnp.float32),
            "grid_thw": shape((rows, 1, 3), jnp.int32),
        },
    }.get(folder, {})


def batch(folder: str, rows: int, length: int, sequences: int, slots: int) -> dict:
    """Shapes of a batch with one medium per row."""
    shape = jax.ShapeDtypeStruct
    whole = shape((rows, length), jnp.int32)
    slot = shape((rows, sequences, slots), jnp.int32)
    shown = media(folder, rows)
    return {
        **({"media": shown, "feature_index": whole} if shown else {}),
        "tokens": whole, "label": shape((rows,), jnp.float32),
        "negative": shape((rows,), jnp.float32),
        "positions": shape((rows, length, 3), jnp.int32) if folder == "tv2t" else whole,
        "intervals": shape((rows, length, 4), jnp.int32),
        "target_positions": slot, "targets": slot,
        "loss_mask": shape((rows, sequences, slots), jnp.float32),
        "last_positions": shape((rows, sequences), jnp.int32),
        "sequence_mask": shape((rows, sequences), jnp.float32),
        "ref_logps": shape((rows, sequences), jnp.float32),
        "signs": shape((rows, sequences), jnp.float32),
    }  # fmt: skip


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_a_config_is_short_and_says_how_to_run_it(path):
    text = path.read_text()
    assert len(text.splitlines()) < 80
    assert str(path.relative_to(ROOT)) in text.split('"""')[1]


@pytest.mark.parametrize("path", TRAINING, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_one_train_step_of_the_real_model_has_a_shape(path):
    folder = path.parent.name
    published, (least, most) = PUBLISHED.MODELS[folder]
    cfg = config.resolve(load(path))
    accepted = inspect.signature(runs.run).parameters
    assert set(cfg) <= set(accepted)
    assert set(cfg["train"]) <= set(inspect.signature(recipes.train).parameters)
    assert set(cfg["data"]) <= set(inspect.signature(runs.load_dataset).parameters)
    options = {k: v for k, v in cfg["model"].items() if k != "path"}
    model = models.build(published, **options)
    row = recipes.find_recipe(cfg["recipe"])
    params = model.abstract()
    if "lora" in cfg:
        assert set(cfg["lora"]) <= set(inspect.signature(adapt.attach).parameters)
        made = []
        params = jax.eval_shape(
            lambda p: made.append(adapt.attach(model, p, **cfg["lora"])) or made[-1][1], params
        )
        model = made[-1][0]
    frozen = [*model.frozen, *cfg["train"].get("frozen", ())]
    options = cfg.get("objective", {})
    if row.head:
        head = jax.eval_shape(lambda: row.head(model, jax.random.key(0), options))
        params = {"model": params, "score_head": head}
        frozen = [f"model/{glob}" for glob in frozen]
        assert jax.tree.structure(heads.axes(model, head), is_leaf=lambda x: isinstance(x, tuple))
    objective = row.objective(model, **cfg.get("objective", {}))
    tx, _ = make_optimizer(total_steps=100, **cfg["optim"])
    sequences = 2 if row.layout == "preference" else 1

    def step(params, batch):
        trainable, held = split(params, frozen_paths(params, frozen))
        state = tx.init(trainable)
        grads, metrics = jax.grad(lambda p: objective(merge(p, held), batch), has_aux=True)(
            trainable
        )
        updates, state = tx.update(grads, state, trainable)
        return merge(optax.apply_updates(trainable, updates), held), metrics

    rows = batch(folder, 2, 1024, sequences, 128)
    if twin := row.twin(options):
        rows[twin] = dict(rows)
    for name in row.extras(options):
        rows.setdefault(name, jax.ShapeDtypeStruct((2,), jnp.float32))
    after, metrics = jax.eval_shape(step, params, rows)
    assert jax.tree.map(lambda x: x.shape, after) == jax.tree.map(lambda x: x.shape, params)
    assert all(leaf.shape == () for leaf in jax.tree.leaves(metrics["loss"]))
    plain = adapt.plain(model)
    count = sum(np.prod(leaf.shape) for leaf in jax.tree.leaves(plain.abstract()))
    assert least * 1e9 < count < most * 1e9


def test_the_tokenizer_config_binds_and_one_step_has_a_shape():
    cfg = load(ROOT / "configs/t2i/digits_vq.py")
    config.bind(image_recipe.train_tokenizer, cfg, path="config", workdir="run")
    values = config.resolve(cfg)
    sizes = image_recipe.digits_config(values["max_digits"], **values["sizes"])
    tokenizer = build_tokenizer(sizes)
    objective = image_recipe.reconstruct(tokenizer, beta=values["beta"])
    rows, edge = values["batch_rows"], 8 * values["max_digits"]
    shape = jax.ShapeDtypeStruct
    strips = {
        "pixels": shape((rows, 3, edge, edge), jnp.float32),
        "row_mask": shape((rows,), jnp.float32),
    }
    grads, metrics = jax.eval_shape(jax.grad(objective, has_aux=True), tokenizer.abstract(), strips)
    assert jax.tree.map(lambda x: x.shape, grads) == jax.tree.map(
        lambda x: x.shape, tokenizer.abstract()
    )
    assert metrics["mse"].total.shape == ()


@pytest.mark.parametrize("name", ["digits_llf", "llava_llf"])
def test_the_llf_configs_bind_to_their_pipelines(name):
    run, cfg = llf.select(load(ROOT / f"configs/ti2t/{name}.py"))
    config.bind(run, cfg, path="config", workdir="run")
    values = config.resolve(cfg)
    trains = set(inspect.signature(recipes.train).parameters)
    for section in {"sft", "feedback"} & set(values):
        assert set(values[section]) <= trains
    assert set(values["dpo"]) - {"lrs"} <= trains
    assert set(values["sampling"]) <= set(inspect.signature(Lab).parameters)
    if name == "digits_llf":
        assert set(values["model"]) <= set(inspect.signature(llava_config).parameters)
    else:
        accepted = set(inspect.signature(runs.load_dataset).parameters)
        assert set(values["data"]) | set(values["prompts"]) <= accepted
        build = set(inspect.signature(models.build).parameters)
        assert set(values["model"]) - {"path"} <= build & set(inspect.signature(Lab).parameters)


def test_an_unknown_pipeline_lists_those_there_are():
    cfg = load(ROOT / "configs/ti2t/digits_llf.py")
    cfg.pipeline = "digit"
    with pytest.raises(ConfigError, match="'digit'.*digits, dataset"):
        llf.select(cfg)


# What the run takes beside the training's own arguments.
FURTHER = {"pipeline", "algorithm", "model", "mesh", "checkpoint_every", "sft", "slip", "digits",
           "demonstrations", "test_problems"}  # fmt: skip
RL = [
    path for path in CONFIGS if path.stem.rpartition("_")[2] in ("rl", "ppo", "grpo", "lagrangian")
]


@pytest.mark.parametrize("path", RL, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_the_rl_configs_bind(path):
    name = path.stem
    run, cfg = rl.select(load(path))
    config.bind(run, cfg, path="config", workdir="run")
    values = config.resolve(cfg)
    runs_of = values.get("algorithms") or {values["algorithm"]: values}
    for algorithm, own in runs_of.items():
        kind = find_algorithm(own.get("algorithm", algorithm))
        Plan(**{**values["rollout"], **own.get("rollout", {})})
        find_estimator(kind.estimator)
        accepted = set(inspect.signature(train).parameters)
        assert set(own) - accepted <= FURTHER
        options = {"loss": kind.loss, **own.get("objective", {})}
        model = models.build(PUBLISHED.LLAVA_7B)
        actor_critic(model, model, **options) if kind.critic else policy(model, **options)
    if name.startswith("digits_") and values.get("subtask", "TI2T") == "TI2T":
        config.bind(digits_run.run, cfg.start, path="config.start", workdir="run")
    elif name.startswith("digits_"):
        config.bind(digits_start.stages, cfg.start, path="config.start", workdir="r", asked=None)
        for part in ("pretrain", "sft"):
            config.bind(recipes.train, cfg.start[part], path=f"config.start.{part}")
