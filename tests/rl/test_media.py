"""Prompts with patches and with clips: what is sampled is what the trainer's own pass scores."""

import importlib.util
import json
from pathlib import Path

import jax
import numpy as np
import pytest

from aa_jax import models
from aa_jax.data.collate import Shapes, collate, grow, plan_shapes
from aa_jax.data.processor import Processor
from aa_jax.data.tokens import encode_example
from aa_jax.llf.respond import respond
from aa_jax.models import heads
from aa_jax.rewards.learned import RewardModel
from aa_jax.rl.actor import Actor, with_responses
from aa_jax.sampling import make_sampler
from aa_jax.sharding import make_mesh

TESTS = Path(__file__).parents[1]


def load(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def patches(folder, generation="qwen2_5_vl"):
    """A Qwen2-VL or 2.5; prompts with two pictures, a film, and text alone."""
    tests = load(TESTS / "models/test_qwen2_vl_training.py")
    vl, builders = load(TESTS / "models/vl_world.py"), load(TESTS / "data/conftest.py")
    newer = generation == "qwen2_5_vl"
    _, ids = builders.save_qwen_vl(folder, tokens_per_second=2 if newer else None)
    processor = Processor.from_pretrained(folder)
    config = vl.config(
        load(TESTS / "models/world.py"), generation,
        text=dict(vocab_size=processor.vocab_size, max_position_embeddings=256),
        vision=dict(patch_size=4, depth=2, **({"window_size": 16} if newer else {})),
        image_token_id=ids["<|image_pad|>"], video_token_id=ids["<|video_pad|>"],
    )  # fmt: skip
    model = models.build(config)
    params = jax.tree.map(lambda x: 3 * x, jax.jit(model.init)(jax.random.key(0)))
    return model, params, processor, tests.pairs(builders)


def clips(folder):
    """A Qwen2-Audio; prompts with one or two clips of different lengths."""
    tests = load(TESTS / "test_audio_recipes.py")

    class Folders:
        def mktemp(self, name):
            folder.mkdir(exist_ok=True)
            return folder

    path = tests.folder.__wrapped__(Folders())
    model, params = models.load(path)
    params = jax.tree.map(lambda x: 3 * x, params)
    return model, params, Processor.from_pretrained(path), tests.examples(("three", "one two"))


def older_patches(folder):
    """A Qwen2-VL of the first generation."""
    return patches(folder, "qwen2_vl")


@pytest.fixture(
    scope="module",
    params=[patches, pytest.param(older_patches, marks=pytest.mark.slow), clips],
    ids=["patches", "older patches", "clips"],
)
def media(request, tmp_path_factory):
    return request.param(tmp_path_factory.mktemp(request.param.__name__) / "c")


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(devices=jax.devices()[:1])


def prompts_of(examples):
    return [example.replace(responses=()) for example in examples]


def test_sampler_and_trainer_agree(media, mesh):
    """Prefill and cached decode against one pass over prompt | response | response."""
    model, params, processor, examples = media
    encoded = [encode_example(example, processor) for example in prompts_of(examples)]
    actor = Actor(
        model, processor, mesh, prompt=plan_shapes(encoded, "prompt"), max_new_tokens=5,
        batch_rows=len(encoded),
    )  # fmt: skip
    seeds = np.arange(len(encoded), dtype=np.uint32)[:, None] + np.uint32([0, 100])
    pairs = actor.respond(params, encoded, seeds)
    answered = [
        with_responses(item, [sample.tokens for sample in pair])
        for item, pair in zip(encoded, pairs, strict=True)
    ]
    batch = collate(answered, plan_shapes(answered, "group"), "group")
    logps = actor.logps(params, batch, len(encoded))
    for b, pair in enumerate(pairs):
        for s, sample in enumerate(pair):
            got = logps[b, s, : len(sample.logps)]
            np.testing.assert_allclose(got, sample.logps, atol=1e-5)


def test_answers_do_not_depend_on_the_batch(media, mesh, tmp_path):
    """One request per batch, so that the shapes grow on the way, or all at once."""
    model, params, processor, examples = media
    sampler = make_sampler(
        model, max_new_tokens=5, eos_ids=processor.stop_ids, pad_id=processor.pad_id
    )
    prompts = prompts_of(examples)
    length = max(len(encode_example(prompt, processor).prompt) for prompt in prompts)
    lines = {
        rows: respond(
            tmp_path / f"{rows}.jsonl", prompts, params=params, sampler=sampler,
            processor=processor, prompt_length=length, batch_rows=rows, seed=0, title="answers",
            mesh=mesh,
        )
        for rows in (1, len(prompts))
    }  # fmt: skip
    for one, other in zip(*lines.values(), strict=True):
        assert one["text"] == other["text"] and one["tokens"] == other["tokens"] > 0
        assert one["logp"] == pytest.approx(other["logp"], abs=1e-4)
    assert len(json.loads((tmp_path / "1.jsonl").read_text().splitlines()[0])) == 5


def test_a_learned_reward_reads_them(media, mesh, tmp_path):
    """Scores of a mixed batch are those of each example alone in a batch of its own size."""
    model, params, processor, examples = media
    processor.save_pretrained(tmp_path / "from")
    tree = {"model": params, "score_head": heads.init_score_head(model, jax.random.key(1))}
    heads.save(tmp_path / "reward", model, tree, extra_files_from=tmp_path / "from")
    judge = RewardModel(str(tmp_path / "reward"), mesh=mesh, batch_rows=len(examples))
    texts = [example.responses[0].text for example in examples]
    prompts = prompts_of(examples)
    # The last first: its media are fewer or other, so the shapes must grow in every axis.
    judge.scores(prompts[-1:], texts[-1:])
    got = judge.scores(prompts, texts)
    alone = []
    for example in examples:
        item = encode_example(example.replace(responses=example.responses[:1]), processor)
        batch = collate([item], plan_shapes([item], "supervised"), "supervised")
        alone.append(float(heads.score(model, tree, batch)[0, 0]))
    assert np.ptp(alone) > 1e-3
    np.testing.assert_allclose(got, alone, atol=1e-5 * np.abs(alone).max())


def test_shapes_only_grow():
    first = Shapes(16, 4, images=1, image_size=(8, 8), media={"a": (2, 8, 30)})
    then = grow(first, Shapes(8, 6, images=2, patches=4, media={"a": (1, 8, 50), "b": (3,)}))
    assert then == Shapes(
        16, 6, images=2, image_size=(8, 8), patches=4, media={"a": (2, 8, 50), "b": (3,)}
    )
    assert grow(None, first) == first and grow(then, first) == then
