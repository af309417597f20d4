"""LLaVA-NeXT against transformers: logits, gradients, greedy text, folders, refusals."""

import jax
import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file

from aa_jax import models
from aa_jax.errors import ModelError
from aa_jax.models import heads
from aa_jax.models.names import flatten
from aa_jax.sampling import generate, make_sampler

CASES = {
    "one to three images, Llama": (dict(), [[(9, 30)], [(12, 13), (30, 9), (3, 4)]]),
    "Mistral, two layers of the tower": (
        dict(mistral=True, vision_feature_layer=[-2, 1], multimodal_projector_bias=False),
        [[(16, 15), (8, 24)], [(40, 11)]],
    ),
    "Mistral with a window shorter than an image": (
        dict(mistral=True, window=7),
        [[(9, 30)], [(12, 13), (3, 4)]],
    ),
}


@pytest.fixture(scope="module")
def tiles(world):
    return world.sibling("next_world")


@pytest.fixture(scope="module")
def small(world, tiles, tmp_path_factory):
    """(config, transformers model, our model, our parameters, folder)."""
    folder = tmp_path_factory.mktemp("llava_next")
    config = tiles.config(world, text=dict(max_position_embeddings=256))
    return config, *world.pair(config, folder), folder


@pytest.mark.parametrize(
    "case",
    [pytest.param(name, marks=pytest.mark.slow) if "window" in name else name for name in CASES],
)
def test_logits_and_gradients(case, world, tiles, tmp_path):
    changes, rows = CASES[case]
    config = tiles.config(world, **changes)
    width = 3 + max(sum(len(tiles.ORDER.features(*s, tiles.SIDE)) + 1 for s in row) for row in rows)
    batch = tiles.batch(world, rows, width)
    reference, model, params = world.pair(config, tmp_path)
    real = world.real_mask(batch)
    labels = np.random.default_rng(9).integers(0, 40, real.shape).astype(np.int32)
    out, grads = world.evaluate(model)(params, batch, labels)
    expected = tiles.torch_logits(world, reference, batch, rows)
    np.testing.assert_allclose(np.asarray(out)[real], expected.detach().numpy(), atol=1e-4, rtol=0)
    world.torch_cross_entropy(expected, labels[real].astype(np.int64)).backward()
    assert np.abs(grads["image_newline"]).max() > 0
    world.assert_same_gradients(model, grads, reference)
    with torch.no_grad():
        left = tiles.torch_logits(world, reference, batch, rows, pad_left=3)
    np.testing.assert_allclose(np.asarray(out)[real], left.numpy(), atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", ["llava", "llava_next"])
@pytest.mark.parametrize("whole", [False, True])
def test_the_text_configs_tie_counts_where_transformers_copies_it(family, whole, world, tiles):
    """In LLaVA the text config's flag ties the head too, in LLaVA-NeXT it does not."""
    make = {"llava": world.llava_config, "llava_next": lambda **k: tiles.config(world, **k)}[family]
    config = make(text=dict(tie_word_embeddings=True), tie_word_embeddings=whole)
    reference = world.torch_model(config)
    tied = reference.get_output_embeddings().weight is reference.get_input_embeddings().weight
    assert models.build(config).config.text.tied == tied


def test_greedy_text_is_transformers(small, world, tiles):
    config, reference, model, params, _ = small
    rows = [[(9, 30)], [(12, 13), (30, 9)]]
    batch = tiles.batch(world, rows, 60)
    inputs, _ = tiles.torch_inputs(world, batch, rows, pad_left=1)
    inputs.pop("position_ids")
    reference.generation_config.eos_token_id = None
    with torch.no_grad():
        theirs = reference.generate(**inputs, max_new_tokens=64, do_sample=False, pad_token_id=0)
    sampler = make_sampler(model, max_new_tokens=64, eos_ids=[10**6], temperature=0.0)
    ours = generate(sampler, params, batch, np.zeros(2, np.uint32))
    np.testing.assert_array_equal(ours.tokens, theirs[:, inputs["input_ids"].shape[1] :])


def test_a_row_does_not_see_its_neighbours_tiles(small, world, tiles):
    """Alone, or beside a row with more tiles, or with the tower's features given: the same."""
    _, _, model, params, _ = small
    rows = [[(9, 30)], [(12, 13), (30, 9)]]
    both = tiles.batch(world, rows, 60)
    hidden = jax.jit(model.hidden_states)(params, both)
    count = tiles.ORDER.tiles(9, 30)
    alone = jax.tree.map(lambda x: x[:1], both)
    alone["media"]["pixel_values"] = alone["media"]["pixel_values"][:, :count]
    np.testing.assert_allclose(model.hidden_states(params, alone)[0], hidden[0], atol=1e-5)
    tower = model.tower_features(params, both["media"])
    features = model.encode_media(params, {**both["media"], "tower_features": tower})
    given = model.hidden_states(params, both, features)
    np.testing.assert_allclose(given, hidden, atol=1e-5)
    assert features.shape[1] == both["media"]["pixel_values"].shape[1] * 5


def test_folders_go_both_ways(small, world, tiles, tmp_path):
    config, reference, model, params, folder = small
    models.save(tmp_path / "ours", model, params)
    again = transformers.LlavaNextForConditionalGeneration.from_pretrained(tmp_path / "ours")
    theirs = dict(reference.named_parameters())
    for name, parameter in again.named_parameters():
        assert torch.equal(parameter, theirs[name]), name
    _, back = models.load(tmp_path / "ours")
    jax.tree.map(np.testing.assert_array_equal, back, params)
    # The layout in memory, and the one of the released files.
    names = {name: p.detach().numpy() for name, p in reference.named_parameters()}
    assert "model.image_newline" in names
    old = {model.names.canonical(name): x for name, x in names.items()}
    assert "image_newline" in old and "language_model.model.norm.weight" in old
    for layout in (names, old):
        save_file(layout, tmp_path / "model.safetensors")
        (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
        _, loaded = models.load(tmp_path)
        jax.tree.map(np.testing.assert_array_equal, loaded, params)
    kept = load_file(tmp_path / "ours" / "model.safetensors")
    assert kept.keys() == old.keys()
    score = {"model": params, "score_head": heads.init_score_head(model, jax.random.key(0))}
    batch = tiles.batch(world, [[(9, 30)]], 30)
    assert np.isfinite(heads.score(model, score, batch)).all()


@pytest.mark.parametrize("text", ["mistral", "vicuna"])
def test_published_sizes(text):
    """LLaVA 1.6 7B's published configs; the count is transformers' own."""
    published = {
        "architectures": ["LlavaNextForConditionalGeneration"],
        "model_type": "llava_next",
        "image_grid_pinpoints": [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]],
        "ignore_index": -100,
        "image_token_index": 32000,
        "projector_hidden_act": "gelu",
        "text_config": {
            "mistral": {
                "_name_or_path": "mistralai/Mistral-7B-Instruct-v0.2",
                "architectures": ["MistralForCausalLM"],
                "intermediate_size": 14336,
                "max_position_embeddings": 32768,
                "model_type": "mistral",
                "num_key_value_heads": 8,
                "rms_norm_eps": 1e-05,
                "rope_theta": 1000000.0,
                "sliding_window": None,
                "torch_dtype": "bfloat16",
                "vocab_size": 32064,
            },
            "vicuna": {
                "_name_or_path": "lmsys/vicuna-7b-v1.5",
                "architectures": ["LlamaForCausalLM"],
                "max_position_embeddings": 4096,
                "model_type": "llama",
                "rms_norm_eps": 1e-05,
                "torch_dtype": "float16",
                "vocab_size": 32064,
            },
        }[text],
        "use_image_newline_parameter": True,
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
    model = models.build(published, dtype="bfloat16", param_dtype="bfloat16", remat="full")
    ours = sum(int(np.prod(x.shape)) for x in jax.tree.leaves(model.abstract()))
    kwargs = {k: v for k, v in published.items() if k not in ("architectures", "torch_dtype")}
    with torch.device("meta"):
        reference = transformers.LlavaNextForConditionalGeneration(
            transformers.LlavaNextConfig(**kwargs)
        )
    assert ours == sum(p.numel() for p in reference.parameters())
    assert ours == {"mistral": 7_566_747_648, "vicuna": 7_063_431_168}[text]
    assert model.config.pinpoints == tuple(map(tuple, published["image_grid_pinpoints"]))
    leaves = flatten(model.axes())
    assert leaves["image_newline"] == ("embed",)


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(vision_feature_select_strategy="full"), "'full'; tiles"),
        (dict(image_grid_pinpoints=[[8, 12]]), "multiples of the tower's 8"),
        (dict(image_grid_pinpoints=5), "image_grid_pinpoints"),
        (dict(use_image_newline_parameter=False), "use_image_newline_parameter"),
        (dict(kind="gemma"), "model_type 'gemma'; handled: llama, mistral"),
    ],
)
def test_what_would_change_the_model_is_refused(change, words, world, tiles):
    config = tiles.config(world)
    kind = change.pop("kind", None)
    config |= change
    if kind:
        config["text_config"]["model_type"] = kind
    with pytest.raises(ModelError, match=words):
        models.build(config)
