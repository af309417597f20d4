"""Qwen2-VL from a folder and pictures to trained parameters: layouts agree, recipes run."""

import importlib.util
from pathlib import Path

import jax
import numpy as np
import pytest

from aa_jax import models, objectives, recipes
from aa_jax.data.collate import Shapes, collate, plan_shapes
from aa_jax.data.example import Example, Media, Part, message
from aa_jax.data.processor import Processor
from aa_jax.data.tokens import encode_example
from aa_jax.models.names import flatten
from aa_jax.sharding import make_mesh


def load(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def tiny(world, tmp_path_factory):
    """A Qwen2.5-VL with windows, and a processor of the same patches."""
    builders, vl = load(HERE.parent / "data" / "conftest.py"), load(HERE / "vl_world.py")
    folder = tmp_path_factory.mktemp("qwen2_5_vl")
    _, ids = builders.save_qwen_vl(folder, tokens_per_second=2)
    processor = Processor.from_pretrained(folder)
    config = vl.config(
        world,
        "qwen2_5_vl",
        text=dict(vocab_size=processor.vocab_size, max_position_embeddings=256),
        vision=dict(patch_size=4, window_size=16, depth=2),
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
    )
    model = models.build(config)
    params = jax.tree.map(lambda x: 3 * x, jax.jit(model.init)(jax.random.key(0)))
    return builders, processor, model, params


def pairs(builders):
    """Two pictures of different shapes, a short film, and plain text."""
    ask = message("user", "which digit?", [Part("image", index=0), Part("image", index=1)])
    pictures = (builders.random_image(0, 24, 32), builders.random_image(1, 16, 40))
    film = np.random.default_rng(2).integers(0, 256, (4, 16, 24, 3), dtype=np.uint8)
    watch = message("user", "count", [Part("video", index=0)])
    clip = Media("video", array=film, sampling_rate=2)
    return [
        Example((ask,), ("three", "seven and one"), pictures, "t:0"),
        Example((watch,), ("nine", "two"), (clip,), "t:1"),
        Example((message("user", "hello world"),), ("a", "the digits"), (), "t:2"),
    ]


@pytest.fixture(scope="module")
def logps(tiny):
    _, _, model, params = tiny

    @jax.jit
    def run(batch):
        return objectives.token_logps(model, params, batch).logps

    return run


def summed(logps, batch):
    return np.asarray(logps(batch) * batch["loss_mask"]).sum(-1)


def test_shared_prefix_equals_separate_rows(tiny, logps):
    """prompt | chosen | rejected with images, video and text: the log-probs of separate rows."""
    builders, processor, _, _ = tiny
    items = [encode_example(example, processor) for example in pairs(builders)]
    shared = collate(items, plan_shapes(items, "preference"), "preference")
    apart = collate(items, plan_shapes(items, "preference_rows"), "preference_rows")
    expected = summed(logps, apart).reshape(3, 2)
    got = summed(logps, shared)
    assert np.abs(expected).min() > 1
    np.testing.assert_allclose(got, expected, atol=1e-5 * np.abs(expected).max())


def test_packed_rows_equal_separate_rows(tiny, logps):
    """Three examples with their own media in one row, and each in its own."""
    builders, processor, _, _ = tiny
    examples = [e.replace(responses=e.responses[:1]) for e in pairs(builders)]
    items = [encode_example(example, processor) for example in examples]
    single = plan_shapes(items, "supervised")
    apart = collate(items, single, "supervised")
    length = sum(len(item.prompt) + len(item.responses[0]) for item in items)
    slots = [len(item.responses[0]) for item in items]
    patches = sum(item.patches for item in items)
    row = Shapes(length, sum(slots), 3, None, patches, single.patch_numbers)
    packed = collate([items], row, "supervised")
    got = np.asarray(logps(packed))[0, 0]
    expected = np.asarray(logps(apart))[:, 0]
    start = 0
    for b, count in enumerate(slots):
        np.testing.assert_allclose(got[start : start + count], expected[b, :count], atol=1e-5)
        start += count


@pytest.mark.parametrize("recipe", ["sft", "dpo"])
def test_recipes_train_it(recipe, tiny, tmp_path):
    """Two steps on pictures, film and text over eight devices: the loss falls on the same
    examples, the tower trains unless it is frozen, nothing is dropped."""
    builders, processor, model, params = tiny
    examples = pairs(builders)
    if recipe == "sft":
        examples = [e.replace(responses=e.responses[:1]) for e in examples]
    frozen = ("vision_tower/*",) if recipe == "dpo" else ()
    trained, figures = recipes.train(
        recipe,
        model=model,
        params=params,
        processor=processor,
        examples=examples,
        workdir=tmp_path,
        mesh=make_mesh(fsdp=4, data=2),
        batch_rows=8,
        steps=2,
        log_every=1,
        frozen=frozen,
        optim={"lr": 1e-2, "schedule": "constant", "warmup_steps": 0},
    )
    assert figures["steps"] == 2 and figures["examples"] == 3 and not figures["dropped"]
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    losses = [float(line.split('"loss": ')[1].split(",")[0].rstrip("}")) for line in lines if
              '"loss": ' in line]  # fmt: skip
    assert len(losses) == 2 and losses[1] < losses[0]
    before, after = flatten(params), flatten(trained)
    moved = {path for path in after if np.any(np.asarray(after[path]) != np.asarray(before[path]))}
    assert "projector/linear_2/kernel" in moved and "language_model/embed/weight" in moved
    assert any(path.startswith("vision_tower/") for path in moved) == (not frozen)
