"""Every shipped config: its keys exist, and one train step of the real model has a shape."""

import inspect
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from aa_jax import config, image_recipe, models, recipes, runs
from aa_jax.llf import digits_run
from aa_jax.llf.start import llava_config
from aa_jax.models import heads
from aa_jax.models.chameleon.tokenizer import build_tokenizer
from aa_jax.training.optim import make_optimizer
from aa_jax.training.state import frozen_paths, merge, split

ROOT = Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "configs").rglob("*.py"))
TRAINING = [path for path in CONFIGS if not {"llf", "vq"} & {*path.stem.split("_")}]

LLAVA_7B = {
    "architectures": ["LlavaForConditionalGeneration"],
    "model_type": "llava",
    "image_token_index": 32000,
    "projector_hidden_act": "gelu",
    "vision_feature_layer": -2,
    "vision_feature_select_strategy": "default",
    "text_config": {
        "model_type": "llama", "vocab_size": 32064, "hidden_size": 4096,
        "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 32, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5,
        "hidden_act": "silu", "rope_theta": 10000.0,
    },
    "vision_config": {
        "model_type": "clip_vision_model", "hidden_size": 1024, "intermediate_size": 4096,
        "num_hidden_layers": 24, "num_attention_heads": 16, "image_size": 336, "patch_size": 14,
        "projection_dim": 768, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5,
    },
}  # fmt: skip


def load(path):
    # The two paths a user must give; nothing is opened here.
    return config.load(
        path,
        [] if "digits" in path.stem else ["--config.model.path=/ckpt", "--config.data.path=/data"],
    )


def batch(rows: int, length: int, sequences: int, slots: int) -> dict:
    """Shapes of a batch with one 336-pixel image per row."""
    shape = jax.ShapeDtypeStruct
    whole = shape((rows, length), jnp.int32)
    slot = shape((rows, sequences, slots), jnp.int32)
    return {
        "tokens": whole, "positions": whole, "feature_index": whole,
        "intervals": shape((rows, length, 4), jnp.int32),
        "media": {"pixel_values": shape((rows, 1, 3, 336, 336), jnp.float32)},
        "target_positions": slot, "targets": slot,
        "loss_mask": shape((rows, sequences, slots), jnp.float32),
        "last_positions": shape((rows, sequences), jnp.int32),
        "sequence_mask": shape((rows, sequences), jnp.float32),
        "ref_logps": shape((rows, sequences), jnp.float32),
    }  # fmt: skip


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_a_config_is_short_and_says_how_to_run_it(path):
    text = path.read_text()
    assert len(text.splitlines()) < 80
    assert str(path.relative_to(ROOT)) in text.split('"""')[1]


@pytest.mark.parametrize("path", TRAINING, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_one_train_step_of_llava_7b_has_a_shape(path):
    cfg = config.resolve(load(path))
    accepted = inspect.signature(runs.run).parameters
    assert set(cfg) <= set(accepted)
    assert set(cfg["train"]) <= set(inspect.signature(recipes.train).parameters)
    assert set(cfg["data"]) <= set(inspect.signature(runs.load_dataset).parameters)
    options = {k: v for k, v in cfg["model"].items() if k != "path"}
    model = models.build(LLAVA_7B, **options)
    row = recipes.find_recipe(cfg["recipe"])
    params, frozen = model.abstract(), list(cfg["train"]["frozen"])
    if row.score_head:
        kernel = jax.ShapeDtypeStruct((4096, 1), jnp.float32)
        params = {"model": params, "score_head": {"kernel": kernel}}
        frozen = [f"model/{glob}" for glob in frozen]
        assert jax.tree.structure(heads.axes(model), is_leaf=lambda x: isinstance(x, tuple))
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

    after, metrics = jax.eval_shape(step, params, batch(2, 1024, sequences, 128))
    assert jax.tree.map(lambda x: x.shape, after) == jax.tree.map(lambda x: x.shape, params)
    assert metrics["loss"].total.shape == ()
    count = sum(np.prod(leaf.shape) for leaf in jax.tree.leaves(model.abstract()))
    # LLaVA-1.5-7B has 7.06 billion parameters; the text model's config rounds the vocabulary up.
    assert 7.0e9 < count < 7.1e9


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


def test_the_llf_config_binds_to_the_pipeline():
    cfg = load(ROOT / "configs/ti2t/digits_llf.py")
    config.bind(digits_run.run, cfg, path="config", workdir="run")
    values = config.resolve(cfg)
    for name in ("sft", "feedback"):
        assert set(values[name]) <= set(inspect.signature(recipes.train).parameters)
    assert set(values["model"]) <= set(inspect.signature(llava_config).parameters)
