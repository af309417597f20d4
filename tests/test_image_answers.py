"""Text to image by the recipes every model trains by: images as answers, then sampled and drawn."""

import json

import jax
import numpy as np
import pytest
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers import models as tokenizer_models
from transformers import PreTrainedTokenizerFast

from aa_jax import image_recipe, models, recipes
from aa_jax.data.collate import collate, plan_shapes
from aa_jax.data.digits import load_digits, render_strip
from aa_jax.data.example import Example, Message, Part, message
from aa_jax.data.processor import Processor
from aa_jax.data.tokens import encode_example
from aa_jax.errors import ConfigError, ModelError
from aa_jax.models.chameleon.tokenizer import (
    build_tokenizer,
    image_encoder,
    save_tokenizer,
    to_uint8,
)
from aa_jax.rl.actor import Actor
from aa_jax.sampling import ImageSpans, generate, make_sampler
from aa_jax.sharding import make_mesh

WORDS = (
    "<pad> <s> </s> <image> <racm3:break> <eoss> <unk> USER : ASSISTANT draw one two three".split()
)
CODES, LETTERS = 16, "ABCDEFGHIJ"


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """(model, parameters, processor, image tokenizer, its parameters) of one tiny checkpoint."""
    table = {word: i for i, word in enumerate(WORDS)}
    backend = Tokenizer(tokenizer_models.WordLevel(table, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>",
        unk_token="<unk>",
    )  # fmt: skip
    tokenizer.add_tokens(WORDS[:6], special_tokens=True)
    folder = tmp_path_factory.mktemp("tiny")
    tokenizer.save_pretrained(folder)
    edges = {"height": 8, "width": 8}
    settings = {
        "image_processor_type": "ChameleonImageProcessor",
        "do_resize": False,
        "size": edges,
        "crop_size": edges,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    (folder / "processor_config.json").write_text(json.dumps({"image_seq_length": 4}))
    vq_config = image_recipe.digits_config(1, codes=CODES, embed_dim=4)
    names = {f"IMGIMG{''.join(LETTERS[int(d)] for d in str(c))}Z": 20 + c for c in range(CODES)}
    config = {
        "architectures": ["ChameleonForConditionalGeneration"],
        "model_type": "chameleon",
        "vocab_size": 40,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "vocabulary_map": {**{word: table[word] for word in WORDS[3:6]}, **names},
        "vq_config": vq_config,
    }
    model, vq = models.build(config), build_tokenizer(vq_config)
    params, drawn = model.init(jax.random.key(0)), vq.init(jax.random.key(1))
    encode = image_encoder(vq, drawn, model.config.images)
    return model, params, Processor.from_pretrained(folder, image_encoder=encode), vq, drawn


def examples():
    """Four requests, each answered with the digit drawn (a second time as the worse answer)."""
    digits, made = load_digits(), []
    for n in range(4):
        images = tuple(render_strip(digits, [i], 1) for i in (n, n + 10))
        answers = tuple(Message("assistant", (Part("image", index=i),)) for i in (0, 1))
        made.append(
            Example((message("user", "draw " + WORDS[11 + n % 3]),), answers, images, f"t:{n}")
        )
    return made


def test_dpo_on_images(parts, tmp_path):
    """Two steps over pairs of images: first log 2, then less; the head of image tokens moves."""
    model, params, processor, _, _ = parts
    trained, figures = recipes.train(
        "dpo",
        model=model,
        params=params,
        processor=processor,
        examples=examples(),
        workdir=tmp_path,
        mesh=make_mesh(devices=jax.devices()[:1]),
        batch_rows=4,
        epochs=None,
        steps=2,
        optim=dict(lr=1e-2, schedule="constant", warmup_steps=0),
        frozen=("vq/*",),
        log_every=1,
    )
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    np.testing.assert_allclose(losses[0], np.log(2), atol=1e-5)
    assert losses[1] < losses[0] and not figures["dropped"]
    moved = trained["language_model"]["head"]["weight"] - params["language_model"]["head"]["weight"]
    assert np.abs(moved[20:36]).max() > 0


def test_sampled_answers_are_pictures(parts):
    """One whole image per request, drawn by the tokenizer's decoder."""
    model, params, processor, vq, drawn = parts
    images = model.config.images
    spans = ImageSpans(
        image_ids=images.token_ids, begin_id=images.begin_id, end_id=images.end_id,
        length=processor.image_tokens.length, eos_ids=(processor.eos_id,), vocab_size=40,
        min_images=1, max_images=1,
    )  # fmt: skip
    items = [encode_example(e.replace(responses=()), processor) for e in examples()]
    batch = collate(items, plan_shapes(items, "prompt"), "prompt")
    sampler = make_sampler(model, max_new_tokens=12, eos_ids=[processor.eos_id], constraint=spans)
    samples = generate(sampler, params, batch, np.arange(4))
    decode = jax.jit(vq.decode)
    for ids, mask in zip(samples.tokens, samples.mask, strict=True):
        found = [p for kind, p in spans.split(ids[: int(mask.sum())]) if kind == "image"]
        assert len(found) == 1
        picture = to_uint8(np.asarray(decode(drawn, images.codes(found[0]).reshape(1, 2, 2))))[0]
        assert picture.shape == (8, 8, 3) and picture.dtype == np.uint8


def test_a_policy_that_draws(parts, tmp_path):
    """One image per response; what a reward sees is what its tokens decode to."""
    model, params, processor, vq, drawn = parts
    save_tokenizer(tmp_path / "vq", vq, drawn)
    items = [encode_example(e.replace(responses=()), processor) for e in examples()]
    plan = dict(prompt=plan_shapes(items, "prompt"), max_new_tokens=12, batch_rows=8)
    mesh = make_mesh(devices=jax.devices()[:1])
    actor = Actor(
        model, processor, mesh, images="one", image_tokenizer=str(tmp_path / "vq"), **plan
    )
    seeds = np.arange(8, dtype=np.uint32).reshape(4, 2)
    samples = [one for group in actor.respond(params, items, seeds) for one in group]
    for sample, (text, (picture,)) in zip(samples, actor.read(samples), strict=True):
        assert text.split().count("<image>") == 1
        codes = [t - 20 for t in np.asarray(sample.tokens) if 20 <= t < 36]
        expected = vq.decode(drawn, np.array(codes, np.int32).reshape(1, 2, 2))
        np.testing.assert_array_equal(picture, to_uint8(np.asarray(expected))[0])
    with pytest.raises(ConfigError, match="give sampling.image_tokenizer"):
        Actor(model, processor, mesh, images="one", **plan)
    with pytest.raises(ConfigError, match="'two'; it must be free, never or one"):
        Actor(model, processor, mesh, images="two", **plan)
    other = build_tokenizer(image_recipe.digits_config(1, codes=8))
    save_tokenizer(tmp_path / "8", other, other.init(jax.random.key(0)))
    with pytest.raises(ModelError, match="names 16 image tokens.*has 8 codes"):
        Actor(model, processor, mesh, images="one", image_tokenizer=str(tmp_path / "8"), **plan)


def test_a_tokenizer_of_another_size_is_refused(parts):
    model, _, _, _, _ = parts
    other = build_tokenizer(image_recipe.digits_config(1, codes=8))
    with pytest.raises(ModelError, match="names 16 image tokens.*has 8 codes"):
        image_encoder(other, {}, model.config.images)
