"""Programs for Ascend: lowered for its name, checked, written, and executed by another plug-in."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aa_jax import models, objectives
from aa_jax.errors import ConfigError
from aa_jax.plan import presets, program
from aa_jax.platforms import PLATFORMS, portable
from aa_jax.platforms.target import Target, backend, compiling_for, device_count
from aa_jax.sampling import make_sampler
from aa_jax.training.optim import make_optimizer

ASCEND = PLATFORMS["ascend"]
FAMILIES = ("llama-2-7b", "qwen2.5-7b", "llava-1.5-7b", "qwen2-vl-7b")


def tiny(name):
    hf = presets.model_config(name)
    (hf.get("text_config") or hf).update(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2,
    )  # fmt: skip
    if "text_config" in hf:
        hf["image_token_index"] = 5
        hf["vision_config"] |= dict(
            hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
            image_size=28,
        )  # fmt: skip
    elif "vision_config" in hf:
        hf["vision_config"] |= dict(depth=2, embed_dim=16, num_heads=2, hidden_size=32)
        hf |= dict(image_token_id=5, video_token_id=6)
        hf["rope_scaling"]["mrope_section"] = [2, 3, 3]
    return hf


def train_step(name, dtype="bfloat16"):
    """(a DPO update as a plain function, its abstract arguments)."""
    model = models.build(tiny(name), dtype=dtype, remat="full")
    objective = objectives.dpo(model)
    batch = program.abstract_batch(model, "preference", 2, 64, 16, program.Layout(patches=16))
    batch["ref_logps"] = jax.ShapeDtypeStruct((2, 2), jnp.float32)
    tx, _ = make_optimizer(lr=1e-2, total_steps=10, schedule="constant", warmup_steps=0)

    def step(params, opt_state, batch):
        loss, grads = jax.value_and_grad(lambda p: objective(p, batch)[0])(params)
        updates, opt_state = tx.update(grads, opt_state, params)
        return loss, jax.tree.map(jnp.add, params, updates), opt_state

    params = model.abstract()
    return model, step, (params, jax.eval_shape(tx.init, params), batch), tx


def sampler(name, **options):
    model = models.build(tiny(name), dtype="bfloat16")
    batch = program.abstract_batch(model, "prompt", 2, 32, 1, program.Layout(patches=16))
    del batch["sequence_mask"]
    sample = make_sampler(model, max_new_tokens=4, eos_ids=[2], **options)
    return sample, (model.abstract(), batch, jax.ShapeDtypeStruct((2,), jnp.uint32))


@pytest.mark.parametrize("name", FAMILIES)
def test_training_lowers_to_allowed_operations_alone(name):
    _, step, arguments, _ = train_step(name)
    exported = portable.export(step, *arguments, platform=ASCEND)
    assert exported.platforms == ("ascend",)
    text = exported.mlir_module()
    assert "custom_call" not in text
    found = portable.operations(text)
    assert set(found) <= ASCEND.operations
    assert found["stablehlo.dot_general"] > 20  # the expression that finds operations finds them


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_sampling_lowers_to_allowed_operations_alone(name, temperature):
    sample, arguments = sampler(name, temperature=temperature)
    text = portable.export(sample, *arguments, platform=ASCEND).mlir_module()
    assert "custom_call" not in text and "stablehlo.while" in text


def test_what_is_not_allowed_is_named():
    sample, arguments = sampler("llama-2-7b", top_p=0.9)
    with pytest.raises(ConfigError, match="stablehlo.sort.*'ascend' does not run"):
        portable.export(sample, *arguments, platform=ASCEND)
    solve = functools.partial(jnp.linalg.solve, jnp.eye(2))
    with pytest.raises(ConfigError, match="'ascend'"):
        portable.export(solve, jnp.ones(2), platform=ASCEND)


def test_the_exported_step_computes_what_the_jitted_one_does(tmp_path):
    model, step, (_, _, abstract), tx = train_step("llava-1.5-7b", dtype="float32")
    params = model.init(jax.random.key(0))
    rng = np.random.default_rng(0)
    batch = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), abstract)
    length = batch["tokens"].shape[1]
    batch["tokens"] = rng.integers(6, 64, batch["tokens"].shape).astype(np.int32)
    batch["positions"][:] = np.arange(length)
    batch["intervals"][..., 3] = np.arange(length) + 1
    batch["feature_index"][:] = -1
    batch["feature_index"][:, 1:5] = np.arange(4)
    batch["targets"] = rng.integers(6, 64, batch["targets"].shape).astype(np.int32)
    batch["target_positions"][:] = 30 + np.arange(16)
    for name in ("loss_mask", "sequence_mask"):
        batch[name][:] = 1
    pixels = batch["media"]["pixel_values"]
    batch["media"]["pixel_values"] = rng.normal(size=pixels.shape).astype(np.float32)
    arguments = params, tx.init(params), batch
    file = tmp_path / "step.stablehlo"
    portable.export(step, *arguments, platform=ASCEND, path=file)
    found = portable.load(file).call(*jax.tree.leaves(arguments))
    want = jax.tree.leaves(jax.jit(step)(*arguments))
    for one, expected in zip(found, want, strict=True):
        np.testing.assert_allclose(one, expected, atol=1e-5, rtol=1e-5)
    weights = len(jax.tree.leaves(params))
    moved = [
        float(jnp.abs(new - old).max())
        for new, old in zip(found[1 : 1 + weights], jax.tree.leaves(params), strict=True)
    ]
    assert max(moved) > 1e-3  # an update, not nothing


def test_tracing_for_other_devices_ends_with_its_block():
    here = backend(), device_count()
    with compiling_for(Target("tpu", 64, "")):
        assert (backend(), device_count()) == ("tpu", 64)
    assert (backend(), device_count()) == here
