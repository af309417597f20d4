"""Cached decoding: the same states as the whole row at once, the same text as transformers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from aa_jax import models
from aa_jax.errors import ConfigError
from aa_jax.models import caches


def test_ragged_decode_equals_full_forward(world, tmp_path):
    """Prompts of unequal length continue row by row exactly where they end (right padding)."""
    _, model, params = world.pair(world.llama_config(), tmp_path)
    full = world.text_batch([12, 9, 11], 12)
    prompts = np.array([7, 4, 6])
    prompt = world.text_batch(prompts, 7)
    prompt["tokens"] = np.where(world.real_mask(prompt), full["tokens"][:, :7], 0)
    expected = np.asarray(jax.jit(model.hidden_states)(params, full))
    hidden, cache = jax.jit(model.prefill, static_argnums=2)(params, prompt, 12)
    decode = jax.jit(model.decode)
    rows = np.arange(3)
    np.testing.assert_allclose(hidden[rows, prompts - 1], expected[rows, prompts - 1], atol=1e-5)
    for step in range(5):
        tokens = jnp.asarray(full["tokens"][rows, prompts + step])
        hidden, cache = decode(params, tokens, cache)
        np.testing.assert_allclose(hidden, expected[rows, prompts + step], atol=1e-5)
    np.testing.assert_array_equal(cache["length"], prompts + 5)
    assert cache["k"].shape == (2, 3, 2, 12, 4)


def test_full_cache_is_left_alone(world):
    """A row that has no slot left writes nothing, so the other rows' decoding may go on."""
    model = models.build(world.llama_config())
    params = model.init(jax.random.key(0))
    _, cache = jax.jit(model.prefill, static_argnums=2)(params, world.text_batch([5, 3], 5), 5)
    _, after = jax.jit(model.decode)(params, jnp.array([7, 8], jnp.int32), cache)
    np.testing.assert_array_equal(after["k"][:, 0], cache["k"][:, 0])
    assert np.any(after["k"][:, 1, :, 3] != cache["k"][:, 1, :, 3])


@pytest.mark.parametrize("apart", [False, True], ids=["stacked", "by layer"])
def test_the_cache_is_never_copied(world, apart):
    """A decoding loop updates its donated cache in place: the program holds no copy of it."""
    model = models.build(world.llama_config())

    def prefill(params):
        cache = model.prefill(params, world.text_batch([5, 3], 5), 9)[1]
        return caches.for_loop(cache) if apart else cache

    cache = jax.eval_shape(prefill, model.abstract())

    def loop(params, cache):
        decode = model.decoder(params)

        def step(i, carry):
            token, cache = carry
            hidden, cache = decode(token, cache)
            return jnp.argmax(hidden, axis=-1).astype(jnp.int32), cache

        return jax.lax.fori_loop(0, 4, step, (jnp.zeros(2, jnp.int32), cache))

    program = jax.jit(loop, donate_argnums=1).lower(model.abstract(), cache).compile().as_text()
    layer, shape = (2, 2, 9, 4), "f32[2,2,9,4]" if apart else "f32[2,2,2,9,4]"
    assert {x.shape for x in jax.tree.leaves((cache["k"], cache["v"]))} == {
        layer if apart else (2, *layer)
    }
    made = [line.split(f"= {shape}")[1] for line in program.splitlines() if f"= {shape}" in line]
    assert made and not [line for line in made if "copy(" in line]
    if apart:  # nor is a layer, or its weights, taken out of a stack at every step
        body = program[program.index("jit(loop)/while/body") :]
        assert "dynamic-slice(" not in body and "f32[1,2,2,9,4]" not in program


def test_by_layer_or_stacked(world):
    """The same hidden states and the same keys."""
    model = models.build(world.llama_config())
    params = model.init(jax.random.key(0))
    _, cache = jax.jit(model.prefill, static_argnums=2)(params, world.text_batch([5, 3], 5), 9)
    token = jnp.array([7, 8], jnp.int32)
    hidden, stacked = jax.jit(model.decode)(params, token, cache)
    found, apart = jax.jit(model.decode)(params, token, caches.for_loop(cache))
    np.testing.assert_allclose(found, hidden, atol=1e-6)
    np.testing.assert_allclose(np.stack(apart["k"]), stacked["k"], atol=1e-6)
    np.testing.assert_array_equal(apart["length"], stacked["length"])


def test_cache_must_hold_the_prompt(world):
    model = models.build(world.llama_config())
    with pytest.raises(ConfigError, match="cache_size is 4.*5 tokens wide"):
        model.prefill(model.init(jax.random.key(0)), world.text_batch([5], 5), 4)


@pytest.mark.parametrize("family", ["llama", "llava"])
def test_greedy_text_is_transformers(family, world, tmp_path):
    """64 greedy tokens for prompts of unequal length, decoded inside one lax.scan."""
    if family == "llama":
        config, images = world.llama_config(max_position_embeddings=128), None
        batch = world.text_batch([7, 4], 7)
    else:
        config, images = world.llava_config(text=dict(max_position_embeddings=128)), [2, 1]
        batch = world.image_batch(config, [13, 8], 13, images)
    reference, model, params = world.pair(config, tmp_path)
    last = batch["last_positions"][:, 0]

    @jax.jit
    def generate(params, batch):
        head = model.head(params)
        hidden, cache = model.prefill(params, batch, 13 + 64)
        first = jnp.argmax(hidden[jnp.arange(2), last] @ head.T, axis=-1).astype(jnp.int32)

        def step(carry, _):
            token, cache = carry
            hidden, cache = model.decode(params, token, cache)
            return (jnp.argmax(hidden @ head.T, axis=-1).astype(jnp.int32), cache), token

        return jax.lax.scan(step, (first, cache), length=64)[1].T

    ours = np.asarray(generate(params, batch))
    inputs, _ = world.torch_inputs(batch, images, pad_left=1)
    del inputs["position_ids"]  # generate derives them from the mask
    reference.generation_config.eos_token_id = None  # all 64, whatever they are
    with torch.no_grad():
        expected = reference.generate(**inputs, max_new_tokens=64, do_sample=False, pad_token_id=0)
    expected = expected[:, inputs["input_ids"].shape[1] :].numpy()
    assert expected.shape == (2, 64)
    np.testing.assert_array_equal(ours, expected)
