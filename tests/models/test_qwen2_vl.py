"""Qwen2-VL and Qwen2.5-VL against transformers: images and videos of any size, M-RoPE."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from aa_jax import models
from aa_jax.errors import MediaError, ModelError

CASES = {
    "two images of different shapes": (
        "qwen2_vl",
        {},
        [[3, ("image", 1, 4, 6), 2, ("image", 1, 2, 2), 3], [1, ("image", 1, 6, 2), 4]],
    ),
    "video and image, tied, plain activation, biased": (
        "qwen2_vl",
        dict(
            text=dict(tie_word_embeddings=True, num_key_value_heads=4),
            vision=dict(hidden_act="gelu", depth=2),
        ),
        [[2, ("video", 3, 2, 4), 2, ("image", 1, 2, 2), 2], [("video", 2, 4, 2), 3]],
    ),
    "windows of several sizes": (
        "qwen2_5_vl",
        {},
        [[2, ("image", 1, 6, 10), 2], [3, ("image", 1, 2, 2), 1, ("image", 1, 4, 4), 2]],
    ),
    "video in seconds, no full layer": (
        "qwen2_5_vl",
        dict(vision=dict(fullatt_block_indexes=[7], window_size=4)),
        [[2, ("video", 3, 4, 2, 1.5), 2, ("image", 1, 2, 6), 3], [4, ("video", 2, 2, 2, 3.0), 1]],
    ),
}
WIDTH = 32


@pytest.fixture(scope="module")
def vl(world):
    import importlib.util
    from pathlib import Path

    path = Path(__file__).with_name("vl_world.py")
    spec = importlib.util.spec_from_file_location("vl_world", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def check(world, vl, generation, changes, rows, folder, width=WIDTH):
    config = vl.config(world, generation, **changes)
    batch = vl.batch(config, rows, width)
    reference, model, params = world.pair(config, folder)
    real = world.real_mask(batch)
    labels = np.random.default_rng(9).integers(0, 40, real.shape).astype(np.int32)
    out, grads = world.evaluate(model)(params, batch, labels)
    expected = vl.torch_logits(reference, batch, rows)
    np.testing.assert_allclose(np.asarray(out)[real], expected.detach().numpy(), atol=1e-4, rtol=0)
    world.torch_cross_entropy(expected, labels[real].astype(np.int64)).backward()
    world.assert_same_gradients(model, grads, reference)
    with torch.no_grad():
        left = vl.torch_logits(reference, batch, rows, pad_left=3)
    np.testing.assert_allclose(np.asarray(out)[real], left.numpy(), atol=1e-4, rtol=0)


@pytest.mark.parametrize("case", CASES)
def test_logits_and_gradients(case, world, vl, tmp_path):
    generation, changes, rows = CASES[case]
    check(world, vl, generation, changes, rows, tmp_path)


GRID = list(
    itertools.product(
        ("qwen2_vl", "qwen2_5_vl"),
        (1, 2, 4),
        (False, True),
        ([[1, ("image", 1, 2, 8), 2]], [[("image", 1, 6, 6), 1, ("video", 2, 4, 2, 2.0), 1], [5]]),
    )
)


@pytest.mark.slow
@pytest.mark.parametrize(("generation", "kv_heads", "tied", "rows"), GRID)
def test_logits_and_gradients_grid(generation, kv_heads, tied, rows, world, vl, tmp_path):
    changes = dict(text=dict(num_key_value_heads=kv_heads, tie_word_embeddings=tied))
    if generation == "qwen2_vl":  # its videos have one position per temporal patch
        rows = [[piece if isinstance(piece, int) else piece[:4] for piece in row] for row in rows]
    check(world, vl, generation, changes, rows, tmp_path)


@pytest.fixture(scope="module", params=["qwen2_vl", "qwen2_5_vl"])
def small(request, world, vl, tmp_path_factory):
    config = vl.config(world, request.param, text=dict(max_position_embeddings=128))
    return config, *world.pair(config, tmp_path_factory.mktemp(request.param))


ROWS = [[2, ("image", 1, 4, 6), 3, ("video", 2, 2, 4), 2], [1, ("image", 1, 2, 6), 4]]


def test_features_are_transformers_and_may_be_cached(small, vl):
    """encode_media equals get_image_features whatever is packed beside it; features=, media and
    media["tower_features"] give the same states."""
    config, reference, model, params = small
    batch = vl.batch(config, ROWS, 26, patches=44)  # 40 and 12 are in use
    features = np.asarray(jax.jit(model.encode_media)(params, batch["media"]))
    assert features.shape == (2, 11, 32)
    inputs, _, _ = vl.torch_inputs(batch, ROWS)
    with torch.no_grad():
        images = reference.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"])
        videos = reference.get_video_features(
            inputs["pixel_values_videos"], inputs["video_grid_thw"]
        )
    first, second = (image.numpy() for image in images.pooler_output)
    expected = np.concatenate([first, videos.pooler_output[0].numpy()])
    np.testing.assert_allclose(features[0, :10], expected, atol=1e-5)
    np.testing.assert_allclose(features[1, :3], second, atol=1e-5)
    hidden = jax.jit(model.hidden_states)
    text = {key: value for key, value in batch.items() if key != "media"}
    tower = jax.jit(model.tower_features)(params, batch["media"])
    direct = hidden(params, batch)
    np.testing.assert_allclose(hidden(params, text, features), direct, atol=1e-5)
    cached = {**text, "media": {"tower_features": tower}}
    np.testing.assert_allclose(hidden(params, cached), direct, atol=1e-5)


def test_greedy_text_is_transformers(small, world, vl):
    """64 tokens after prompts with media: fewer positions than tokens, so the cache keeps both."""
    config, reference, model, params = small
    batch = vl.batch(config, ROWS, 26)
    last = batch["last_positions"][:, 0]

    @jax.jit
    def generate(params, batch):
        head = model.head(params)
        hidden, cache = model.prefill(params, batch, 26 + 64)
        first = jnp.argmax(hidden[jnp.arange(2), last] @ head.T, axis=-1).astype(jnp.int32)

        def step(carry, _):
            token, cache = carry
            hidden, cache = model.decode(params, token, cache)
            return (jnp.argmax(hidden @ head.T, axis=-1).astype(jnp.int32), cache), token

        return jax.lax.scan(step, (first, cache), length=64)[1].T, cache["position"]

    ours, position = generate(params, batch)
    real = [row[: last[b] + 1].max() + 1 for b, row in enumerate(batch["positions"])]
    np.testing.assert_array_equal(position, real)
    assert position[0] < last[0] + 1
    inputs, _, steps = vl.torch_inputs(batch, ROWS, pad_left=1)
    if config["model_type"] == "qwen2_5_vl":
        inputs["second_per_grid_ts"] = steps
    reference.generation_config.eos_token_id = None
    with torch.no_grad():
        expected = reference.generate(**inputs, max_new_tokens=64, do_sample=False, pad_token_id=0)
    expected = expected[:, inputs["input_ids"].shape[1] :].numpy()
    np.testing.assert_array_equal(ours, expected)


def test_decoding_equals_the_whole_row(small, vl):
    """The states of the last tokens, decoded one by one, are those of the row read at once."""
    config, _, model, params = small
    batch = vl.batch(config, ROWS[:1], 24)
    whole = np.asarray(jax.jit(model.hidden_states)(params, batch))
    real = int(batch["last_positions"][0, 0]) + 1
    prompt = {**batch, "last_positions": batch["last_positions"] - 2}
    prompt["intervals"] = batch["intervals"].copy()
    prompt["intervals"][:, real - 2 :] = 0
    _, cache = jax.jit(model.prefill, static_argnums=2)(params, prompt, 24)
    for at in (real - 2, real - 1):
        token = jnp.asarray(batch["tokens"][:, at])
        hidden, cache = jax.jit(model.decode)(params, token, cache)
        np.testing.assert_allclose(hidden[0], whole[0, at], atol=1e-5)


def test_text_alone_needs_one_position(small, world):
    _, reference, model, params = small
    batch = world.text_batch([9, 6], 10)
    three = {**batch, "positions": np.repeat(batch["positions"][..., None], 3, -1)}
    run = jax.jit(lambda p, b: world.logits(model, p, b))
    out = np.asarray(run(params, batch))
    np.testing.assert_allclose(run(params, three), out, atol=1e-6)
    with torch.no_grad():
        expected = world.torch_logits(reference, batch).numpy()
    np.testing.assert_allclose(out[world.real_mask(batch)], expected, atol=1e-4, rtol=0)


def test_round_trip(small, tmp_path):
    """Saved here, loaded by transformers: every tensor is back, bit for bit."""
    config, reference, model, params = small
    models.save(tmp_path / "out", model, params)
    again, info = type(reference).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()), info
    for name, tensor in reference.state_dict().items():
        assert (again.state_dict()[name] == tensor).all(), name


PUBLISHED_TEXT = {
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
    "vision_token_id": 151654,
    "image_token_id": 151655,
    "video_token_id": 151656,
    "hidden_act": "silu",
    "hidden_size": 3584,
    "initializer_range": 0.02,
    "intermediate_size": 18944,
    "max_position_embeddings": 32768,
    "max_window_layers": 28,
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "use_sliding_window": False,
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    "vocab_size": 152064,
}
PUBLISHED = {
    "qwen2_vl": {
        "architectures": ["Qwen2VLForConditionalGeneration"],
        "model_type": "qwen2_vl",
        "vision_config": {
            "depth": 32,
            "embed_dim": 1280,
            "mlp_ratio": 4,
            "num_heads": 16,
            "in_chans": 3,
            "hidden_size": 3584,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "spatial_patch_size": 14,
            "temporal_patch_size": 2,
        },
    },
    "qwen2_5_vl": {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": "qwen2_5_vl",
        "vision_config": {
            "depth": 32,
            "hidden_act": "silu",
            "hidden_size": 1280,
            "intermediate_size": 3420,
            "num_heads": 16,
            "in_chans": 3,
            "out_hidden_size": 3584,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "spatial_patch_size": 14,
            "window_size": 112,
            "fullatt_block_indexes": [7, 15, 23, 31],
            "tokens_per_second": 2,
            "temporal_patch_size": 2,
        },
    },
}


@pytest.mark.parametrize(
    ("generation", "parameters"), [("qwen2_vl", 8_291_375_616), ("qwen2_5_vl", 8_292_166_656)]
)
def test_published_7b_configs(generation, parameters, world):
    """The released flat config builds; transformers counts as many parameters for it."""
    config = {**PUBLISHED_TEXT, **PUBLISHED[generation]}
    model = models.build(config, dtype="bfloat16", param_dtype="bfloat16", remat="full")
    ours = sum(int(np.prod(x.shape)) for x in jax.tree.leaves(model.abstract()))
    make_config, make = world.CLASSES[config["architectures"][0]]
    kwargs = {k: v for k, v in config.items() if k not in ("architectures", "torch_dtype")}
    with torch.device("meta"):
        reference = make(make_config(**kwargs))
    assert ours == sum(p.numel() for p in reference.parameters()) == parameters
    assert model.config.text.rope.sections == (16, 24, 24) and model.config.text.rope.theta == 1e6
    # As transformers writes it today: the decoder in a section of its own.
    nested = make_config(**kwargs).to_dict() | {"architectures": config["architectures"]}
    assert models.build(nested).config == model.config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(vision=dict(num_heads=3)), "num_heads = 3 does not split the width 16 into heads"),
        (dict(vision=dict(window_size=2)), "window_size = 2 pixels is smaller than one feature"),
        (dict(vision=dict(out_hidden_size=8)), "features of width 8 to a decoder of 32"),
        (dict(vision=dict(in_chans=1)), "in_chans is 1, but the tower is built for 3"),
        (dict(vision=dict(fullatt_block_indexes="all")), "it must be a list of layers"),
        (dict(vision=dict(deepstack=[1])), r"vision_config.deepstack \(= \[1\]\) is not handled"),
        (
            dict(text=dict(rope_parameters={"rope_type": "default", "mrope_section": [2, 2, 2]})),
            r"mrope_section \[2, 2, 2\], which must add up to half the head size, 4",
        ),
        (
            dict(text=dict(rope_parameters={"mrope_section": [1, 1, 1, 1]})),
            r"mrope_section \[1, 1, 1, 1\]; it must be three whole numbers",
        ),
        (
            dict(text=dict(rope_parameters={"mrope_section": [5, -2, 1]})),
            r"mrope_section \[5, -2, 1\]; it must be three whole numbers",
        ),
        (dict(hidden_size=64), "hidden_size is 64, but text_config.hidden_size is 32"),
        (dict(image_token_id="x"), "image_token_id is 'x', not one of 40 tokens"),
        (dict(video_token_id=5), "video_token_id = 5 is image_token_id too"),
        (
            dict(vision=dict(model_type="siglip")),
            "vision_config.model_type is 'siglip'; only parts",
        ),
        (
            dict(vision=dict(rope_parameters={"rope_theta": "x"})),
            "vision_config.rope_parameters has rope_theta 'x'; it must be a number above 0",
        ),
    ],
)
def test_refusals(changes, message, world, vl):
    with pytest.raises(ModelError, match=message):
        models.build(vl.config(world, "qwen2_5_vl", **changes))


def test_windows_begin_at_the_layer_transformers_begins_at(world, vl):
    """A config that does not say begins them at layer 80, not at the 28 of text models."""
    text = dict(use_sliding_window=True, sliding_window=4, num_hidden_layers=30)
    config = vl.config(world, "qwen2_vl", text=text)
    theirs = transformers.Qwen2VLTextConfig(**text).layer_types
    ours = models.build(config).config.text
    assert set(theirs) == {"full_attention"} and ours.window is None
    text = transformers.Qwen2VLTextConfig(**text | {"num_hidden_layers": 82})
    config["text_config"] |= {"num_hidden_layers": 82}
    ours = models.build(config).config.text
    seen = tuple(i for i, kind in enumerate(text.layer_types) if kind == "full_attention")
    assert (ours.window, ours.full_layers) == (4, seen) and len(seen) == 80


def test_pixels_of_another_processor(small, vl):
    config, _, model, params = small
    batch = vl.batch(config, ROWS, 26)
    media = {**batch["media"], "pixel_values": np.zeros((2, 8, 1176), np.float32)}
    with pytest.raises(MediaError, match=r"\[2, 8, 1176\]; .* reads \[rows, patches, 24\]"):
        model.encode_media(params, media)
