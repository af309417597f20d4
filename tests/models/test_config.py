"""What config.json may hold: everything understood, inert, or refused by name."""

import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from aa_jax import models
from aa_jax.errors import ConfigError, ModelError
from aa_jax.models.config import Reader


def test_all_problems_are_in_one_error(world):
    config = world.llava_config(
        text=dict(
            attention_dropout=0.1,
            hidden_act="mish",
            qk_norm=True,
            num_hidden_layers=0,
            rope_parameters={"rope_type": "proportional", "rope_theta": 1e4},
        ),
        vision=dict(use_head=True, patch_size=16),
        vision_feature_layer=[7, "x"],
        vision_feature_select_strategy="cls",
        multimodal_projector_bias="yes",
        image_token_id=9,
        quantization_config={"bits": 4},
    )
    with pytest.raises(ModelError) as error:
        models.build(config)
    text = str(error.value)
    for expected in (
        "config.text_config.attention_dropout is 0.1; only 0 is handled",
        "config.text_config.hidden_act is 'mish'; it must be one of gelu,",
        "config.text_config.qk_norm (= True) is not handled",
        "config.text_config.num_hidden_layers is 0; it must be a positive whole number",
        "config.text_config.rope_parameters has rope_type 'proportional'; handled are default, dyn",
        "config.vision_config.use_head (= True) is not handled",
        "config.vision_config.patch_size = 16 is larger than the image",
        "config.vision_feature_layer names 7, but the tower has 3 layers",
        "config.vision_feature_layer names 'x', but the tower has 3 layers",
        "config.vision_feature_select_strategy is 'cls'; it must be one of default, full",
        "config.multimodal_projector_bias is 'yes'; it must be true or false",
        "config.image_token_id is 9, but image_token_index is 5",
        "config.quantization_config is {'bits': 4}; only None is handled",
    ):
        assert expected in text
    assert text.count("\n  - ") == 13


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(num_key_value_heads=3), "num_key_value_heads = 3 does not divide 4 heads"),
        (dict(head_dim=5), "head_dim is 5; rotary positions need an even one"),
        (dict(rms_norm_eps="tiny"), "rms_norm_eps is 'tiny'; it must be a number"),
        (dict(rope_scaling={"type": "linear"}), "of type 'linear' lacks 'factor'"),
        (dict(rope_scaling=[2]), r"rope_scaling is \[2\]; it must be an object"),
        (
            dict(rope_parameters={"rope_theta": 1e4, "partial_rotary_factor": 0.5}),
            "rotates only a part of each head",
        ),
        (
            dict(rope_parameters={"rope_theta": 1e4, "long_factor": [1]}),
            "of type 'default' holds 'long_factor', which is not handled",
        ),
        (
            dict(rope_parameters={"rope_type": "dynamic", "factor": 2.0}, head_dim=2),
            "of type 'dynamic' needs heads of at least 4",
        ),
        (
            dict(rope_scaling={"type": "longrope", "long_factor": [1, 2], "short_factor": [1]}),
            "of type 'longrope' needs a list of 2 numbers as short_factor",
        ),
        (
            dict(rope_parameters={"rope_theta": 1e4, "mrope_section": [1, 1]}),
            "of type 'default' holds 'mrope_section', which is not handled",
        ),
        (dict(rope_theta=0), "rope_theta is 0.0; it must be a number above 0"),
        (dict(rope_parameters={"rope_theta": "big"}), "rope_theta is 'big'; it must be a number"),
        (dict(rope_parameters={"rope_type": ["linear"]}), "has rope_type .*handled are"),
        (dict(rms_norm_eps=float("nan")), "rms_norm_eps is nan; it must be a number"),
        (
            dict(rope_scaling={"type": "linear", "factor": "2"}),
            "of type 'linear' has factor '2'; it must be a number above 0",
        ),
        (
            dict(rope_scaling={"type": "yarn", "factor": 2, "truncate": 1}),
            "of type 'yarn' has truncate 1; it must be true or false",
        ),
        (
            dict(rope_scaling={"type": "longrope", "long_factor": [1, 0], "short_factor": [1, 2]}),
            r"has long_factor \[1, 0\]; it must be a list of numbers above 0",
        ),
        (
            dict(
                rope_scaling={
                    "type": "llama3",
                    "factor": 2,
                    "low_freq_factor": 1,
                    "high_freq_factor": 1,
                }
            ),
            "needs a high_freq_factor above its low_freq_factor, 1",
        ),
        (dict(architectures=7), "names the architecture 7 "),
        (dict(architectures=None, model_type=["llama"]), "handled are .*Llama"),
        (dict(architectures=["GPT2LMHeadModel"]), "GPT2LMHeadModel.*handled are .*LlamaFor"),
        (dict(architectures=None, model_type="gpt2"), "model_type 'gpt2'.*handled are .*Llama"),
    ],
)
def test_refusals(changes, message, world):
    with pytest.raises(ModelError, match=message):
        models.build(world.llama_config(**changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(vision_feature_layer=[]), "vision_feature_layer is an empty list"),
        (dict(vision_feature_layer=True), "vision_feature_layer names True"),
        (dict(image_token_index="<image>"), "image_token_index is '<image>', not one of 40 tokens"),
        (dict(image_token_index=40), "image_token_index is 40, not one of 40 tokens"),
    ],
)
def test_refusals_of_what_joins_tower_and_decoder(changes, message, world):
    with pytest.raises(ModelError, match=message):
        models.build({**world.llava_config(), **changes})


def test_an_empty_vision_config_is_clips_own_and_an_absent_one_llavas(world):
    """As in transformers: CLIP's base tower of an object without attributes, LLaVA's of none."""
    config = {**world.llava_config(), "vision_config": {}}
    for given in ({}, None):
        theirs = transformers.LlavaConfig(vision_config=given).vision_config
        ours = models.build({**config, "vision_config": given}).config.vision
        assert (ours.hidden_size, ours.num_layers, ours.num_heads, ours.patch_size) == (
            theirs.hidden_size, theirs.num_hidden_layers, theirs.num_attention_heads,
            theirs.patch_size,
        )  # fmt: skip
        assert (ours.image_size, ours.intermediate_size) == (
            theirs.image_size, theirs.intermediate_size,
        )  # fmt: skip


def test_sub_configs_of_another_family(world):
    config = world.llava_config(text=dict(model_type="gemma"))
    config["vision_config"] = "clip"
    with pytest.raises(ModelError) as error:
        models.build(config)
    assert "text_config is of model_type 'gemma'; handled: llama, mistral" in str(error.value)
    assert "vision_config is 'clip'; it must be an object" in str(error.value)


def test_the_model_type_alone_names_the_architecture(world):
    config = world.llama_config(architectures=None)
    assert models.build(config).config == models.build(world.llama_config()).config


def test_unknown_choices(world):
    for kwargs, message in (
        (dict(dtype="float8"), "dtype is 'float8'; it must be one of bfloat16, float16, float32"),
        (dict(param_dtype="int8"), "param_dtype is 'int8'"),
        (dict(remat="some"), "remat is 'some'; it must be one of dots, full, none"),
    ):
        with pytest.raises(ConfigError, match=message):
            models.build(world.llama_config(), **kwargs)


OLD_AND_NEW = [
    (dict(rope_theta=500.0), {"rope_type": "default", "rope_theta": 500.0}),
    (
        dict(rope_theta=500.0, rope_scaling={"type": "linear", "factor": 2.0}),
        {"rope_type": "linear", "rope_theta": 500.0, "factor": 2.0},
    ),
]


@pytest.mark.parametrize(("old", "new"), OLD_AND_NEW)
def test_both_spellings_of_rope_are_one(old, new, world):
    left = models.build(world.llama_config(**old)).config
    assert left == models.build(world.llama_config(rope_parameters=new)).config


ROPES = [
    {"rope_type": "linear", "factor": 3.0},
    {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096},
    {"rope_type": "yarn", "factor": 4.0, "beta_fast": 16, "beta_slow": 2, "truncate": False},
    {"rope_type": "yarn", "factor": 8.0, "mscale": 1.0, "mscale_all_dim": 0.5},
    {"rope_type": "yarn", "factor": 8.0, "attention_factor": 1.25},
    {"rope_type": "dynamic", "factor": 4.0},
    {
        "rope_type": "longrope",
        "short_factor": [1.0 + 0.01 * i for i in range(64)],
        "long_factor": [2.0 + 0.3 * i for i in range(64)],
        "original_max_position_embeddings": 4096,
    },
    {
        "rope_type": "longrope",
        "short_factor": [1.5] * 64,
        "long_factor": [4.0] * 64,
        "attention_factor": 1.3,
    },
]


@pytest.mark.parametrize("rope", ROPES, ids=lambda rope: "-".join(map(str, rope.values()))[:40])
def test_frequencies_of_published_sizes(rope):
    """Heads of 128 and context lengths of real releases, against transformers' tables; where a
    row's length decides, for a short row, one at the border and a long one."""
    raw = {"max_position_embeddings": 16384, "rope_parameters": {"rope_theta": 5e5, **rope}}
    reference = LlamaConfig(hidden_size=1024, num_attention_heads=8, **raw)
    expected, factor = ROPE_INIT_FUNCTIONS[rope["rope_type"]](reference)
    reader = Reader(raw, "config")
    ours, our_factor = reader.rope(128, 16384).frequencies()
    assert not reader.problems
    np.testing.assert_allclose(ours, expected.numpy(), rtol=2e-6)
    assert our_factor == pytest.approx(factor, rel=1e-6)
    built = reader.rope(128, 16384)
    if not built.by_length:
        return
    lengths = jnp.array([1, 4096, 16384, 16385, 60000], jnp.int32)
    for length, row in zip(lengths, built.frequencies_at(lengths), strict=True):
        expected, factor = ROPE_INIT_FUNCTIONS[rope["rope_type"]](reference, seq_len=int(length))
        np.testing.assert_allclose(row, expected.numpy(), rtol=5e-6, err_msg=str(length))
        assert our_factor == pytest.approx(factor, rel=1e-6)
