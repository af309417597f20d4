"""Chameleon against transformers: logits, gradients, greedy text, and images in and out."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file

from aa_jax import models
from aa_jax.errors import MediaError, ModelError
from aa_jax.models import heads
from aa_jax.models.chameleon.tokenizer import build_tokenizer, load_tokenizer
from aa_jax.models.names import flatten
from aa_jax.sampling import Forbid, ImageSpans, generate, make_sampler

BEGIN, END, CODES, EDGE = 3, 4, 20, 8
VOCAB = 40 + CODES  # the last tokens are images', in an order of their own
ORDER = np.random.default_rng(0).permutation(CODES)
SPAN = (EDGE // 2) ** 2


def letters(code):
    return "IMGIMG" + str(code).translate(str.maketrans("0123456789", "ABCDEFGHIJ")) + "Z"


def chameleon_config(world, vq=None, **changes):
    names = {letters(code): int(40 + ORDER[code]) for code in range(CODES)}
    return world.llama_config(
        **{
            "architectures": ["ChameleonForConditionalGeneration"],
            "model_type": "chameleon",
            "vocab_size": VOCAB,
            "vocabulary_map": {
                "<image>": world.IMAGE,
                "<racm3:break>": BEGIN,
                "<eoss>": END,
                **names,
            },
            "vq_config": {
                "embed_dim": 6,
                "num_embeddings": CODES,
                "latent_channels": 8,
                "resolution": EDGE,
                "base_channels": 32,
                "channel_multiplier": [1, 1],
                "num_res_blocks": 1,
                **(vq or {}),
            },
            **changes,
        }
    )


@pytest.fixture(scope="module")
def chameleon(world):
    """`world`, which now knows the family."""
    world.CLASSES["ChameleonForConditionalGeneration"] = (
        transformers.ChameleonConfig,
        transformers.ChameleonForConditionalGeneration,
    )
    return world


@pytest.fixture(scope="module")
def small(chameleon, tmp_path_factory):
    """(config, transformers model, our model, our parameters, folder)."""
    folder = tmp_path_factory.mktemp("chameleon")
    config = chameleon_config(chameleon, max_position_embeddings=128)
    return config, *chameleon.pair(config, folder), folder


def token_batch(world, lengths, width, seed=0):
    """Rows of text with image tokens among them."""
    batch = world.text_batch(lengths, width, seed=seed)
    rng = np.random.default_rng(seed + 1)
    some = (rng.random(batch["tokens"].shape) < 0.3) & world.real_mask(batch)
    batch["tokens"] = np.where(some, rng.integers(40, VOCAB, some.shape), batch["tokens"])
    batch["tokens"] = batch["tokens"].astype(np.int32)
    return batch


def pixel_batch(world, lengths, width, images, seed=0):
    """Rows with ``images[b]`` images as pixels behind placeholders."""
    batch = world.text_batch(lengths, width, seed=seed)
    rng = np.random.default_rng(seed + 1)
    pixels = rng.normal(size=(len(lengths), max(images), 3, EDGE, EDGE)).astype(np.float32)
    index = np.full((len(lengths), width), -1, np.int32)
    for row, count in enumerate(images):
        for image in range(count):
            start = 1 + image * (SPAN + 1)
            assert start + SPAN < lengths[row]
            batch["tokens"][row, start : start + SPAN] = world.IMAGE
            index[row, start : start + SPAN] = image * SPAN + np.arange(SPAN)
    return {**batch, "feature_index": index, "media": {"pixel_values": pixels}}


def masked_logits(model, params, batch):
    """Logits as transformers gives them: image tokens at the lowest number."""
    hidden = model.hidden_states(params, batch)
    logits = jnp.einsum("btd,vd->btv", hidden, model.head(params))
    ids = np.asarray(model.config.images.token_ids)
    return logits.at[..., ids].set(jnp.finfo(jnp.float32).min)


CASES = {
    "grouped heads, image tokens": ({}, None),
    "swin norm, biases, tied, pixels": (
        dict(swin_norm=True, attention_bias=True, mlp_bias=True, tie_word_embeddings=True),
        [2, 1],
    ),
    "one key head, scaled rope, attention in the tokenizer, pixels": (
        dict(
            num_key_value_heads=1,
            rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0},
            model_parallel_size=4,
            vq=dict(attn_resolutions=[4]),
        ),
        [1, 1],
    ),
}


def check_parity(chameleon, config, images, folder):
    """Logits <= 1e-4, gradients <= 1e-4 relative, padding on either side."""
    if images is None:
        batch = token_batch(chameleon, [14, 9], 15)
    else:
        lengths = [4 + 17 * count for count in images]
        batch = pixel_batch(chameleon, lengths, max(lengths) + 1, images)
    reference, model, params = chameleon.pair(config, folder)
    real = chameleon.real_mask(batch)
    labels = np.random.default_rng(9).integers(0, 40, real.shape).astype(np.int32)

    out, grads = chameleon.evaluate(model, masked_logits)(params, batch, labels)
    expected = chameleon.torch_logits(reference, batch, images)
    np.testing.assert_allclose(np.asarray(out)[real], expected.detach().numpy(), atol=1e-4, rtol=0)
    chameleon.torch_cross_entropy(expected, labels[real].astype(np.int64)).backward()
    chameleon.assert_same_gradients(model, grads, reference)
    with torch.no_grad():
        left = chameleon.torch_logits(reference, batch, images, pad_left=3)
    np.testing.assert_allclose(np.asarray(out)[real], left.numpy(), atol=1e-4, rtol=0)


@pytest.mark.parametrize("case", CASES)
def test_logits_and_gradients(case, chameleon, tmp_path):
    changes, images = CASES[case]
    check_parity(chameleon, chameleon_config(chameleon, **changes), images, tmp_path)


def test_pixels_and_tokens_made_ahead_are_one(small, chameleon):
    """The same images as pixels in the forward pass, as cached tokenizer output, as features and as
    tokens of the row; transformers' tokens for them."""
    _, reference, model, params, _ = small
    batch = pixel_batch(chameleon, [36, 20], 37, [2, 1])
    pixels = batch["media"]["pixel_values"]
    tower = jax.jit(model.tower_features)(params, batch["media"])
    assert tower.shape == (2, 2, SPAN, 1)
    with torch.no_grad():
        expected = reference.model.get_image_tokens(torch.tensor(pixels).flatten(0, 1)).numpy()
    np.testing.assert_array_equal(np.asarray(tower).reshape(4, SPAN), expected)
    hidden = jax.jit(model.hidden_states)
    direct = hidden(params, batch)
    text = {key: value for key, value in batch.items() if key != "media"}
    cached = {**text, "media": {"tower_features": tower}}
    np.testing.assert_allclose(hidden(params, cached), direct, atol=1e-5)
    features = jax.jit(model.encode_media)(params, batch["media"])
    np.testing.assert_allclose(hidden(params, text, features), direct, atol=1e-5)
    ahead = {key: text[key] for key in ("tokens", "positions", "intervals")}
    flat = np.asarray(tower).reshape(2, -1).astype(np.int32)
    index = batch["feature_index"]
    picked = np.take_along_axis(flat, np.maximum(index, 0), axis=1)
    ahead["tokens"] = np.where(index >= 0, picked, batch["tokens"])
    np.testing.assert_allclose(hidden(params, ahead), direct, atol=1e-5)


def test_greedy_text_is_transformers(small, chameleon):
    """64 tokens after prompts of unequal length that show images; none of them a piece of one."""
    _, reference, model, params, _ = small
    batch = pixel_batch(chameleon, [36, 20], 36, [2, 1])
    ids = model.config.images.token_ids
    sampler = make_sampler(
        model, max_new_tokens=64, eos_ids=ids, temperature=0.0, constraint=Forbid(ids, VOCAB)
    )
    samples = generate(sampler, params, batch, np.arange(2))
    inputs, _ = chameleon.torch_inputs(batch, [2, 1], pad_left=1)
    del inputs["position_ids"]
    reference.generation_config.eos_token_id = None
    with torch.no_grad():
        expected = reference.generate(**inputs, max_new_tokens=64, do_sample=False, pad_token_id=0)
    np.testing.assert_array_equal(samples.tokens, expected[:, inputs["input_ids"].shape[1] :])


def test_packed_rows_and_scores(small, chameleon):
    """Two examples with an image each in one row, apart, and wider: the same states and scores."""
    _, _, model, backbone, _ = small
    params = {"model": backbone, "score_head": heads.init_score_head(model, jax.random.key(1))}
    score = jax.jit(lambda p, b: heads.score(model, p, b))
    hidden = jax.jit(model.hidden_states)
    apart = pixel_batch(chameleon, [20, 19], 45, [1, 1])
    expected = np.asarray(hidden(backbone, apart))
    packed = {
        "tokens": np.zeros((1, 45), np.int32),
        "positions": np.zeros((1, 45), np.int32),
        "intervals": np.zeros((1, 45, 4), np.int32),
        "feature_index": np.full((1, 45), -1, np.int32),
        "media": {"pixel_values": apart["media"]["pixel_values"].reshape(1, 2, 3, EDGE, EDGE)},
        "last_positions": np.array([[20, 39]], np.int32),
    }
    for row, (start, n) in enumerate([(1, 20), (21, 19)]):
        where, steps = slice(start, start + n), np.arange(n)
        packed["tokens"][0, where] = apart["tokens"][row, :n]
        packed["positions"][0, where] = steps
        packed["intervals"][0, where, 2], packed["intervals"][0, where, 3] = (
            start,
            start + steps + 1,
        )
        index = apart["feature_index"][row, :n]
        packed["feature_index"][0, where] = np.where(index >= 0, index + row * SPAN, -1)
    found = np.asarray(hidden(backbone, packed))[0]
    np.testing.assert_allclose(found[1:21], expected[0, :20], atol=1e-5)
    np.testing.assert_allclose(found[21:40], expected[1, :19], atol=1e-5)
    np.testing.assert_allclose(score(params, packed)[0], score(params, apart)[:, 0], atol=1e-5)
    narrow = pixel_batch(chameleon, [20, 19], 20, [1, 1])
    narrow["tokens"][:] = apart["tokens"][:, :20]
    np.testing.assert_allclose(score(params, narrow), score(params, apart), atol=1e-5)


def test_transformers_loads_our_export(chameleon, tmp_path):
    config = chameleon_config(chameleon, tie_word_embeddings=False)
    model = models.build(config)
    params = model.init(jax.random.key(0))
    models.save(tmp_path / "out", model, params)
    cls = transformers.ChameleonForConditionalGeneration
    reference, info = cls.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()), info
    batch = pixel_batch(chameleon, [20, 19], 20, [1, 1])
    with torch.no_grad():
        expected = chameleon.torch_logits(reference.eval(), batch, [1, 1]).numpy()
    out = jax.jit(lambda p: masked_logits(model, p, batch))(params)
    found = np.asarray(out)[chameleon.real_mask(batch)]
    np.testing.assert_allclose(found, expected, atol=1e-4, rtol=0)


def test_a_folder_that_holds_the_decoder_too(small, tmp_path):
    """It loads as a model, and as an image tokenizer that writes pixels."""
    config, _, model, params, folder = small
    tokenizer, _ = load_tokenizer(folder)
    assert not tokenizer.has_decoder
    whole = build_tokenizer(config)
    drawn = whole.init(jax.random.key(0))
    tensors = load_file(folder / "model.safetensors")
    leaves = flatten(drawn)
    for path, rule in whole.names.for_leaves(leaves).items():
        if path.startswith("decoder/"):
            value = rule.transform.to_hf(np.asarray(leaves[path]))
            tensors[f"model.vqmodel.{rule.hf}"] = np.ascontiguousarray(value)
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    _, again = models.load(tmp_path)
    jax.tree.map(np.testing.assert_array_equal, again, params)
    tokenizer, loaded = load_tokenizer(tmp_path)
    assert tokenizer.has_decoder
    np.testing.assert_array_equal(
        loaded["decoder"]["conv_out"]["bias"], drawn["decoder"]["conv_out"]["bias"]
    )
    np.testing.assert_array_equal(loaded["codebook"], params["vq"]["codebook"])


def test_sampled_images_become_pixels(small, chameleon):
    """Interleaved sampling writes whole images; their tokens are codes the tokenizer decodes."""
    config, _, model, params, _ = small
    images = model.config.images
    constraint = ImageSpans(
        image_ids=images.token_ids,
        begin_id=images.begin_id,
        end_id=images.end_id,
        length=model.config.features_per_image,
        eos_ids=(2,),
        vocab_size=VOCAB,
        min_images=1,
    )
    sampler = make_sampler(model, max_new_tokens=24, eos_ids=[2], constraint=constraint)
    batch = pixel_batch(chameleon, [20, 19], 20, [1, 1])
    samples = generate(sampler, params, batch, np.arange(2))
    tokenizer = build_tokenizer(config)
    vq = {**tokenizer.init(jax.random.key(0)), **params["vq"]}
    decode = jax.jit(tokenizer.decode)
    for ids, mask in zip(samples.tokens, samples.mask, strict=True):
        pieces = [
            piece for kind, piece in constraint.split(ids[: int(mask.sum())]) if kind == "image"
        ]
        assert len(pieces) == 1 and pieces[0].shape == (SPAN,)
        codes = images.codes(pieces[0])
        np.testing.assert_array_equal(40 + ORDER[codes], pieces[0])
        pixels = decode(vq, codes.reshape(1, EDGE // 2, EDGE // 2))
        assert pixels.shape == (1, 3, EDGE, EDGE) and np.isfinite(pixels).all()
    with pytest.raises(MediaError, match="Token 7 is no piece of an image"):
        images.codes(np.array([41, 7]))


def test_chameleon_7b_builds_from_its_published_config():
    """facebook/chameleon-7b's sizes, counted by transformers on the meta device."""
    published = {
        "architectures": ["ChameleonForConditionalGeneration"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "hidden_size": 4096,
        "initializer_range": 0.02,
        "intermediate_size": 11008,
        "max_position_embeddings": 4096,
        "mlp_bias": False,
        "model_parallel_size": 1,
        "model_type": "chameleon",
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 32,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "rope_theta": 10000.0,
        "swin_norm": False,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": 65536,
        "vocabulary_map": {"<image>": 8711, "<racm3:break>": 8197, "<eoss>": 8196}
        | {letters(code): 4 + code for code in range(8192)},
        "vq_config": {"model_type": "chameleon_vqgan"},
    }
    model = models.build(published)
    assert model.config.features_per_image == 1024
    images = model.config.images
    assert (images.begin_id, images.end_id, images.placeholder_id) == (8197, 8196, 8711)
    assert images.code_tokens == tuple(range(4, 8196))
    skip = ("architectures", "torch_dtype", "vocabulary_map", "model_type", "rope_scaling")
    kept = {k: v for k, v in published.items() if k not in skip}
    with torch.device("meta"):
        config = transformers.ChameleonConfig(**kept, vocabulary_map={"<image>": 8711})
        reference = transformers.ChameleonForConditionalGeneration(config)
    count = sum(parameter.numel() for parameter in reference.parameters())
    assert sum(np.prod(leaf.shape) for leaf in jax.tree.leaves(model.abstract())) == count


def test_refusals(small, chameleon):
    config, _, model, params, _ = small
    with pytest.raises(ModelError, match="vq_config.double_latent is true.*\n.*new_option"):
        models.build(chameleon_config(chameleon, vq=dict(double_latent=True), new_option=1))
    with pytest.raises(ModelError, match="boi_token_id is 9, but vocabulary_map says 3"):
        models.build({**config, "boi_token_id": 9})
    named = {**config["vocabulary_map"], letters(3): VOCAB}
    with pytest.raises(ModelError, match="IMGIMGDZ an id that 60 tokens do not have"):
        models.build({**config, "vocabulary_map": named})
    with pytest.raises(ModelError, match="hidden_size = 16 is not 4 heads"):
        models.build({**config, "head_dim": 6})
    named = {name: v for name, v in config["vocabulary_map"].items() if name != letters(3)}
    partial = models.build({**config, "vocabulary_map": named})
    batch = pixel_batch(chameleon, [20, 19], 20, [1, 1])
    with pytest.raises(ModelError, match="does not name a token for each of the 20 codes"):
        jax.eval_shape(partial.encode_media, params, batch["media"])
    without = {k: v for k, v in batch.items() if k != "media"}
    with pytest.raises(ModelError, match="'media' or features"):
        jax.eval_shape(model.hidden_states, params, without)


GRID = list(itertools.product((False, True), (1, 2, 4), (False, True)))


@pytest.mark.slow
@pytest.mark.parametrize(("swin", "kv_heads", "pixels"), GRID)
def test_logits_and_gradients_grid(swin, kv_heads, pixels, chameleon, tmp_path):
    """Norm order x key heads x how images come, with the other options drawn per case."""
    number = GRID.index((swin, kv_heads, pixels))
    bias, mlp_bias, tied = (bool(number >> bit & 1) for bit in (0, 1, 2))
    changes = dict(
        swin_norm=swin,
        num_key_value_heads=kv_heads,
        attention_bias=bias,
        mlp_bias=mlp_bias,
        tie_word_embeddings=tied,
        hidden_act=("silu", "gelu", "relu")[number % 3],
        vq=dict(channel_multiplier=[1, 2] if bias else [2, 1], num_res_blocks=1 + tied),
    )
    config = chameleon_config(chameleon, **changes)
    images = [1, 2] if pixels else None
    check_parity(chameleon, config, images, tmp_path)
