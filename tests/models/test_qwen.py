"""Qwen2, Qwen2.5 and Qwen3 text models against transformers."""

import itertools

import jax
import numpy as np
import pytest
from transformers import Qwen2ForCausalLM, Qwen3ForCausalLM

from aa_jax import models
from aa_jax.errors import ModelError

YARN = {
    "rope_type": "yarn",
    "rope_theta": 100.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
}
CASES = {
    "qwen2, grouped, tied": ("qwen2", dict(tie_word_embeddings=True)),
    "qwen2, one kv head, wide heads, yarn": (
        "qwen2",
        dict(num_key_value_heads=1, head_dim=6, rope_parameters=YARN, rms_norm_eps=1e-5),
    ),
    "qwen2, a window of 3 from layer 1 on": (
        "qwen2",
        dict(use_sliding_window=True, sliding_window=3, max_window_layers=1),
    ),
    "qwen3, grouped": ("qwen3", {}),
    "qwen3, all heads, tied, biases": (
        "qwen3",
        dict(num_key_value_heads=4, head_dim=8, tie_word_embeddings=True, attention_bias=True),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_logits_and_gradients(case, world, tmp_path):
    family, changes = CASES[case]
    config = getattr(world, family + "_config")(**changes)
    world.assert_parity(config, tmp_path, world.text_batch([9, 6, 1], 10))


GRID = list(
    itertools.product(
        ("qwen2", "qwen3"), (1, 2, 4), (False, True), ((4, None), (6, YARN)), ("silu", "gelu")
    )
)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "kv_heads", "tied", "rotary", "act"), GRID)
def test_logits_and_gradients_grid(family, kv_heads, tied, rotary, act, world, tmp_path):
    config = getattr(world, family + "_config")(
        num_key_value_heads=kv_heads,
        tie_word_embeddings=tied,
        head_dim=rotary[0],
        rope_parameters=rotary[1],
        hidden_act=act,
    )
    world.assert_parity(config, tmp_path, world.text_batch([9, 6, 1], 10))


PUBLISHED = {
    "Qwen2.5-7B": (
        {
            "architectures": ["Qwen2ForCausalLM"],
            "attention_dropout": 0.0,
            "bos_token_id": 151643,
            "eos_token_id": 151643,
            "hidden_act": "silu",
            "hidden_size": 3584,
            "initializer_range": 0.02,
            "intermediate_size": 18944,
            "max_position_embeddings": 131072,
            "max_window_layers": 28,
            "model_type": "qwen2",
            "num_attention_heads": 28,
            "num_hidden_layers": 28,
            "num_key_value_heads": 4,
            "rms_norm_eps": 1e-06,
            "rope_theta": 1000000.0,
            "sliding_window": 131072,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
            "transformers_version": "4.40.1",
            "use_cache": True,
            "use_mrope": False,
            "use_sliding_window": False,
            "vocab_size": 152064,
        },
        7_615_616_512,
    ),
    "Qwen3-8B": (
        {
            "architectures": ["Qwen3ForCausalLM"],
            "attention_bias": False,
            "attention_dropout": 0.0,
            "bos_token_id": 151643,
            "eos_token_id": 151645,
            "head_dim": 128,
            "hidden_act": "silu",
            "hidden_size": 4096,
            "initializer_range": 0.02,
            "intermediate_size": 12288,
            "max_position_embeddings": 40960,
            "max_window_layers": 36,
            "model_type": "qwen3",
            "num_attention_heads": 32,
            "num_hidden_layers": 36,
            "num_key_value_heads": 8,
            "rms_norm_eps": 1e-06,
            "rope_scaling": None,
            "rope_theta": 1000000,
            "sliding_window": None,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
            "transformers_version": "4.51.0",
            "use_cache": True,
            "use_sliding_window": False,
            "vocab_size": 151936,
        },
        8_190_735_360,
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs(name):
    """The released config.json builds, and its model has the released number of parameters."""
    config, parameters = PUBLISHED[name]
    model = models.build(config, dtype="bfloat16", param_dtype="bfloat16", remat="full")
    assert sum(int(np.prod(x.shape)) for x in jax.tree.leaves(model.abstract())) == parameters
    assert model.config.rope.theta == 1e6


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            dict(use_sliding_window=True, max_window_layers=1, sliding_window=0),
            "sliding_window is 0; it must be a positive whole number",
        ),
        (
            dict(layer_types=["full_attention", "sliding_attention"]),
            "layer_types holds sliding_attention, but use_sliding_window is not true",
        ),
        (
            dict(layer_types=["chunked_attention", "full_attention"]),
            "layer_types holds chunked_attention; handled are full_attention, sliding_attention",
        ),
        (dict(layer_types=["full_attention"]), "layer_types is .* must name the kind of 2 layers"),
        (dict(max_window_layers="1"), "max_window_layers is '1'; it must be a whole number"),
        (dict(rope_parameters={"rope_type": "su"}), "has rope_type 'su'; handled are default"),
        (dict(qk_layernorm=True), r"qk_layernorm \(= True\) is not handled"),
    ],
)
@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_refusals(family, changes, message, world):
    with pytest.raises(ModelError, match=message):
        models.build(getattr(world, family + "_config")(**changes))


def test_an_unused_window_is_no_obstacle(world):
    plain = models.build(world.qwen2_config()).config
    for unused in (
        dict(use_sliding_window=False, sliding_window=4, max_window_layers=0),
        dict(use_sliding_window=True, sliding_window=4, max_window_layers=2),
        dict(use_sliding_window=True, sliding_window=None, max_window_layers=0),
        dict(layer_types=["full_attention"] * 2, sliding_window=None),
    ):
        assert models.build(world.qwen2_config(**unused)).config == plain


WINDOWS = {
    "all layers": dict(sliding_window=4, max_window_layers=0),
    "the upper layers": dict(sliding_window=5, max_window_layers=2, num_hidden_layers=4),
    "layers by name": dict(
        sliding_window=2,
        num_hidden_layers=3,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
}


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
@pytest.mark.parametrize("case", WINDOWS)
def test_windows_are_read_as_transformers_reads_them(family, case, world):
    config = getattr(world, family + "_config")(use_sliding_window=True, **WINDOWS[case])
    ours = models.build(config).config
    theirs = world.CLASSES[config["architectures"][0]][0](
        **{k: v for k, v in config.items() if k != "architectures"}
    )
    kinds = ["full_attention" if i in ours.full_layers else "sliding_attention"
             for i in range(ours.num_layers)]  # fmt: skip
    assert (kinds, ours.window) == (theirs.layer_types, theirs.sliding_window)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
@pytest.mark.parametrize("case", WINDOWS)
def test_windows(family, case, world, tmp_path):
    """Logits and gradients; 64 greedy tokens with and without a cache, and behind a prompt that
    several samples read; packed rows."""
    config = getattr(world, family + "_config")(
        use_sliding_window=True, max_position_embeddings=128, **WINDOWS[case]
    )
    world.assert_parity(config, tmp_path, world.text_batch([12, 7, 1], 12))
    small = world.pair(config, tmp_path)
    mistral = world.sibling("test_mistral")
    mistral.test_a_packed_row_and_a_shared_prefix_are_separate_rows(small, world)
    mistral.test_greedy_text_is_transformers(small, world)


def test_absent_kv_heads_are_not_null(world):
    """transformers: absent means the class's 32, null means as many as query heads."""
    null = world.qwen2_config(num_key_value_heads=None)
    assert models.build(null).config.num_kv_heads == 4
    absent = {k: v for k, v in null.items() if k != "num_key_value_heads"}
    with pytest.raises(ModelError, match="num_key_value_heads = 32 does not divide 4 heads"):
        models.build(absent)


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_round_trip(family, world, tmp_path):
    """Saved here, loaded by transformers: every tensor is back, bit for bit."""
    config = getattr(world, family + "_config")(tie_word_embeddings=family == "qwen3")
    reference, model, params = world.pair(config, tmp_path / "in")
    models.save(tmp_path / "out", model, params)
    cls = {"qwen2": Qwen2ForCausalLM, "qwen3": Qwen3ForCausalLM}[family]
    again, info = cls.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()), info
    for name, tensor in reference.state_dict().items():
        assert (again.state_dict()[name] == tensor).all(), name
