"""LLaVA against transformers: logits and gradients through tower, projector and decoder."""

import itertools

import jax
import numpy as np
import pytest
import torch
from transformers import LlavaConfig, LlavaForConditionalGeneration

from aa_jax import models
from aa_jax.errors import MediaError, ModelError

CASES = {
    "penultimate layer, 1-2 images": ({}, [2, 1]),
    "list of layers with the class token, no projector bias, tied": (
        dict(
            vision_feature_layer=[-3, 3],
            vision_feature_select_strategy="full",
            multimodal_projector_bias=False,
            projector_hidden_act="quick_gelu",
            text=dict(tie_word_embeddings=True),
            vision=dict(image_size=5, patch_size=4),
        ),
        [1, 1],
    ),
    "Mistral, a window of six tokens": (
        dict(text=dict(model_type="mistral", sliding_window=6)),
        [2, 1],
    ),
    "first layer's input, uneven image, gelu tower": (
        dict(vision_feature_layer=[0], vision=dict(image_size=10, hidden_act="gelu")),
        [1, 2],
    ),
}


@pytest.mark.parametrize(
    "case",
    [pytest.param(name, marks=pytest.mark.slow) if "window" in name else name for name in CASES],
)
def test_logits_and_gradients(case, world, tmp_path):
    changes, images = CASES[case]
    config = world.llava_config(**changes)
    batch = world.image_batch(config, [14, 12], 15, images)
    world.assert_parity(config, tmp_path, batch, images)


GRID = list(
    itertools.product(
        (-1, 2, [1, -1]), ("default", "full"), (True, False), ((8, 4), (9, 3)), ([1, 1], [2, 1])
    )
)


@pytest.mark.slow
@pytest.mark.parametrize(("layer", "strategy", "bias", "size", "images"), GRID)
def test_logits_and_gradients_grid(layer, strategy, bias, size, images, world, tmp_path):
    config = world.llava_config(
        vision_feature_layer=layer,
        vision_feature_select_strategy=strategy,
        multimodal_projector_bias=bias,
        vision=dict(image_size=size[0], patch_size=size[1]),
    )
    batch = world.image_batch(config, [26, 23], 27, images)
    world.assert_parity(config, tmp_path, batch, images)


@pytest.fixture(scope="module")
def small(world, tmp_path_factory):
    config = world.llava_config()
    return config, *world.pair(config, tmp_path_factory.mktemp("llava"))


def test_text_only_batch(small, world):
    """The same model reads rows without any image."""
    _, reference, model, params = small
    batch = world.text_batch([9, 6], 10)
    out = jax.jit(lambda p: world.logits(model, p, batch))(params)
    with torch.no_grad():
        expected = world.torch_logits(reference, batch).numpy()
    np.testing.assert_allclose(np.asarray(out)[world.real_mask(batch)], expected, atol=1e-4, rtol=0)


def test_features_given_or_cached_or_encoded_are_one(small, world):
    """features=, media and media["tower_features"] give the same states, and the features match
    transformers' get_image_features."""
    config, reference, model, params = small
    batch = world.image_batch(config, [14, 12], 15, [2, 2])
    text = {key: value for key, value in batch.items() if key != "media"}
    hidden = jax.jit(model.hidden_states)
    features = jax.jit(model.encode_media)(params, batch["media"])
    pixels = torch.tensor(batch["media"]["pixel_values"]).flatten(0, 1)
    with torch.no_grad():
        expected = torch.cat(list(reference.get_image_features(pixels).pooler_output))
    assert features.shape == (2, 2 * model.config.features_per_image, 16)
    np.testing.assert_allclose(features.reshape(-1, 16), expected.numpy(), atol=1e-5)
    tower = jax.jit(model.tower_features)(params, batch["media"])
    assert tower.shape == (2, 2, model.config.features_per_image, 12)
    cached = {**text, "media": {"tower_features": tower}}
    direct = hidden(params, batch)
    np.testing.assert_allclose(hidden(params, text, features), direct, atol=1e-5)
    np.testing.assert_allclose(hidden(params, cached), direct, atol=1e-5)


def test_index_past_the_features_is_seen(small, world):
    """A placeholder without a feature must not read some other image: its row becomes NaN."""
    config, _, model, params = small
    batch = world.image_batch(config, [14, 12], 15, [1, 1])
    batch["feature_index"][0, 3] = 99
    hidden = np.asarray(jax.jit(model.hidden_states)(params, batch))
    assert np.isnan(hidden[0, 3:14]).all() and np.isfinite(hidden[1]).all()


def test_llava_7b_builds_from_its_published_config():
    """The first released config (few attributes, legacy extras) gives the released model's size,
    counted by transformers on the meta device."""
    published = {
        "architectures": ["LlavaForConditionalGeneration"],
        "ignore_index": -100,
        "image_token_index": 32000,
        "model_type": "llava",
        "pad_token_id": 32001,
        "projector_hidden_act": "gelu",
        "text_config": {
            "_name_or_path": "lmsys/vicuna-7b-v1.5",
            "architectures": ["LlamaForCausalLM"],
            "max_position_embeddings": 4096,
            "model_type": "llama",
            "rms_norm_eps": 1e-05,
            "torch_dtype": "float16",
            "vocab_size": 32064,
        },
        "torch_dtype": "float16",
        "transformers_version": "4.36.0.dev0",
        "vision_config": {
            "hidden_size": 1024,
            "image_size": 336,
            "intermediate_size": 4096,
            "model_type": "clip_vision_model",
            "num_attention_heads": 16,
            "num_hidden_layers": 24,
            "patch_size": 14,
            "projection_dim": 768,
            "vocab_size": 32000,
        },
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
        "vocab_size": 32064,
    }
    model = models.build(published, dtype="bfloat16", param_dtype="bfloat16", remat="dots")
    ours = sum(int(np.prod(x.shape)) for x in jax.tree.leaves(model.abstract()))
    kwargs = {k: v for k, v in published.items() if k not in ("architectures", "torch_dtype")}
    with torch.device("meta"):
        reference = LlavaForConditionalGeneration(LlavaConfig(**kwargs))
    assert ours == sum(p.numel() for p in reference.parameters()) == 7_063_427_072
    assert model.config.features_per_image == 576
    del published["vision_config"]  # transformers' default tower is this very one
    assert models.build(published).config == model.config


def test_wrong_batches_are_refused(small, world):
    config, _, model, params = small
    batch = world.image_batch(config, [14, 12], 15, [1, 1])
    without_index = {k: v for k, v in batch.items() if k != "feature_index"}
    with pytest.raises(ModelError, match="feature_index"):
        model.hidden_states(params, without_index)
    without_media = {k: v for k, v in batch.items() if k != "media"}
    with pytest.raises(ModelError, match="'media' or features"):
        model.hidden_states(params, without_media)
    wide = {**batch, "media": {"pixel_values": np.zeros((2, 1, 3, 8, 12), np.float32)}}
    with pytest.raises(MediaError, match=r"\(3, 8, 12\).*\(3, 8, 8\)"):
        model.hidden_states(params, wide)
    text_model = models.build(world.llama_config())
    with pytest.raises(ModelError, match="reads text only"):
        text_model.hidden_states(text_model.init(jax.random.key(0)), batch)
    with pytest.raises(ModelError, match="language_model/embed/weight"):
        text_model.hidden_states(params, world.text_batch([3], 4))
