"""Llama against transformers: logits and gradients over crossed options."""

import itertools

import jax
import numpy as np
import pytest
import torch

from aa_jax import models

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 100.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 100.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
}

CASES = {
    "grouped": {},
    "tied, all heads, linear rope": dict(
        num_key_value_heads=4,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "linear", "rope_theta": 500.0, "factor": 2.0},
    ),
    "one kv head, biases, llama3 rope, wide heads": dict(
        num_key_value_heads=1,
        attention_bias=True,
        mlp_bias=True,
        head_dim=6,
        rope_parameters=LLAMA3,
    ),
    "dynamic rope beyond its context": dict(
        max_position_embeddings=6,
        rope_parameters={"rope_type": "dynamic", "rope_theta": 100.0, "factor": 2.0},
    ),
    "longrope beyond its context": dict(
        max_position_embeddings=32,
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": 100.0,
            "short_factor": [1.0, 1.5],
            "long_factor": [2.0, 5.0],
            "original_max_position_embeddings": 8,
        },
    ),
    "yarn rope, gelu": dict(rope_parameters=YARN, hidden_act="gelu", rms_norm_eps=1e-5),
}


@pytest.mark.parametrize("case", CASES)
def test_logits_and_gradients(case, world, tmp_path):
    # transformers takes the longest row's length for all rows of a batch, so there it is one row
    batch = world.text_batch([9, 6, 1] if "beyond" not in case else [9], 10)
    world.assert_parity(world.llama_config(**CASES[case]), tmp_path, batch)


GRID = list(
    itertools.product(
        (1, 2, 4),
        (False, True),
        (False, True),
        ((None, None), (10, LLAMA3), (6, YARN)),
    )
)


@pytest.mark.slow
@pytest.mark.parametrize(("kv_heads", "tied", "bias", "rotary"), GRID)
def test_logits_and_gradients_grid(kv_heads, tied, bias, rotary, world, tmp_path):
    config = world.llama_config(
        num_key_value_heads=kv_heads,
        tie_word_embeddings=tied,
        attention_bias=bias,
        mlp_bias=bias,
        head_dim=rotary[0],
        rope_parameters=rotary[1],
    )
    world.assert_parity(config, tmp_path, world.text_batch([9, 6, 1], 10))


@pytest.mark.parametrize("case", [name for name in CASES if "beyond" in name])
def test_a_row_means_the_same_in_every_batch(case, world):
    """Angles that depend on a row's length take its own, not the longest row's."""
    model = models.build(world.llama_config(**CASES[case]))
    params = jax.tree.map(lambda x: 5 * x, jax.jit(model.init)(jax.random.key(0)))
    batch = world.text_batch([9, 6], 10)
    alone = jax.tree.map(lambda x: x[1:], batch)
    hidden = jax.jit(model.hidden_states)
    np.testing.assert_allclose(
        hidden(params, batch)[1, :6], hidden(params, alone)[0, :6], atol=1e-5
    )


def test_bfloat16_compute_stays_close(world, tmp_path):
    """Parameters in fp32, activations in bf16: hidden states within bf16's own error."""
    reference, model, params = world.pair(world.llama_config(), tmp_path, dtype="bfloat16")
    batch = world.text_batch([9, 6], 10)
    real = world.real_mask(batch)
    hidden = jax.jit(model.hidden_states)(params, batch)
    assert hidden.dtype == "bfloat16"
    assert params["embed"]["weight"].dtype == "float32"
    inputs, mask = world.torch_inputs(batch)
    with torch.no_grad():
        expected = reference.model(**inputs).last_hidden_state[torch.tensor(mask)].numpy()
    error = np.abs(np.asarray(hidden, np.float32)[real] - expected)
    assert error.max() < 0.15 and error.mean() < 0.02


def test_published_size(world):
    """Llama 2 7B has 6,738,415,616 parameters (meta-llama/Llama-2-7b-hf); nothing is allocated."""
    model = models.build(
        {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "rms_norm_eps": 1e-5}
    )
    assert sum(np.prod(x.shape) for x in jax.tree.leaves(model.abstract())) == 6_738_415_616


def test_layers_cost_no_lowering_time(world):
    """The program of 32 layers is as long as that of 4: one layer is lowered, then scanned."""

    def lines(layers):
        model = models.build(world.llama_config(num_hidden_layers=layers), remat="full")
        batch = world.text_batch([5], 6)

        def loss(params, batch):
            return model.hidden_states(params, batch).sum()

        return jax.jit(jax.grad(loss)).lower(model.abstract(), batch).as_text().count("\n")

    assert abs(lines(32) - lines(4)) <= 2
