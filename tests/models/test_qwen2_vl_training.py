"""Qwen2-VL from a folder and pictures to trained parameters: layouts agree, recipes run."""

import importlib.util
from pathlib import Path

import jax
import numpy as np
import pytest
from transformers import Qwen2_5_VLForConditionalGeneration

from aa_jax import models, objectives, recipes, runs
from aa_jax.data import digits
from aa_jax.data.collate import Shapes, collate, plan_shapes
from aa_jax.data.example import Example, Media, Part, message
from aa_jax.data.processor import Processor
from aa_jax.data.tokens import encode_example
from aa_jax.models.names import flatten
from aa_jax.sharding import make_mesh, shardings
from aa_jax.training.metrics import read_metrics, series


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
        text=dict(vocab_size=-(-processor.vocab_size // 8) * 8, max_position_embeddings=256),
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
    row = Shapes(
        length=length,
        response_length=sum(slots),
        images=3,
        patches=patches,
        patch_numbers=single.patch_numbers,
    )
    packed = collate([items], row, "supervised")
    got = np.asarray(logps(packed))[0, 0]
    expected = np.asarray(logps(apart))[:, 0]
    start = 0
    for b, count in enumerate(slots):
        np.testing.assert_allclose(got[start : start + count], expected[b, :count], atol=1e-5)
        start += count


OPTIM = {"lr": 5e-3, "schedule": "constant", "warmup_steps": 0}


def moved(before, after):
    """Paths of the parameters that changed."""
    before, after = flatten(before), flatten(after)
    return {path for path in after if np.any(np.asarray(after[path]) != np.asarray(before[path]))}


def test_a_folder_and_a_dataset_are_enough(tiny, tmp_path):
    """`launch/train.py`'s run: SFT on pictures of a parquet file; the loss on these rows falls, the
    frozen tower stays, and transformers loads what is written."""
    _, processor, model, params = tiny
    processor.save_pretrained(tmp_path / "ckpt")
    models.save(tmp_path / "ckpt-model", model, params, extra_files_from=tmp_path / "ckpt")
    rows = digits.preference_rows(8, 0, "train", annotator=digits.calibrated())
    figures = runs.run(
        tmp_path / "run",
        recipe="sft",
        model={"path": str(tmp_path / "ckpt-model")},
        data={
            "path": str(digits.write_parquet(rows, tmp_path / "p.parquet")),
            "template": "AA_TI2T",
        },
        optim=OPTIM,
        train={"steps": 2, "batch_rows": 8, "log_every": 1, "frozen": ("vision_tower/*",)},
        mesh={"fsdp": 4, "data": 2},
    )
    assert figures["steps"] == 2 and figures["examples"] == 8
    _, losses = series(read_metrics(tmp_path / "run", stage="train"), "loss")
    assert losses[1] < losses[0]
    reference, info = Qwen2_5_VLForConditionalGeneration.from_pretrained(
        tmp_path / "run" / "model", output_loading_info=True
    )
    assert not any(info.values()), info
    _, trained = models.load(tmp_path / "run" / "model")
    changed = moved(params, trained)
    assert "projector/linear_2/kernel" in changed and "language_model/embed/weight" in changed
    assert not any(path.startswith("vision_tower/") for path in changed)


def dpo(tiny, workdir, mesh):
    """(parameters after two steps of DPO on three pairs, figures)."""
    builders, processor, model, params = tiny
    return recipes.train(
        "dpo",
        model=model,
        params=jax.device_put(params, shardings(model.axes(), model.abstract(), mesh)),
        processor=processor,
        examples=pairs(builders),
        workdir=workdir,
        mesh=mesh,
        batch_rows=3,
        steps=2,
        log_every=1,
        optim=OPTIM,
    )


@pytest.fixture(scope="module")
def on_one_device(tiny, tmp_path_factory):
    """(parameters after two steps, figures, run directory)."""
    workdir = tmp_path_factory.mktemp("dpo")
    return *dpo(tiny, workdir, make_mesh(devices=jax.devices()[:1])), workdir


def test_dpo_on_pictures_film_and_text(tiny, on_one_device):
    """Two steps on pairs of every kind: from log 2 downwards, the tower trains too."""
    _, _, _, params = tiny
    trained, figures, tmp_path = on_one_device
    assert figures["steps"] == 2 and figures["examples"] == 3 and not figures["dropped"]
    _, losses = series(read_metrics(tmp_path, stage="train"), "loss")
    assert losses[0] == pytest.approx(np.log(2), abs=1e-6) and losses[1] < losses[0]
    changed = moved(params, trained)
    assert {"vision_tower/patch/kernel", "vision_tower/layers/attn/qkv/kernel"} <= changed


@pytest.mark.parametrize(
    "sizes",
    [
        dict(data=2, fsdp=2, tensor=2),
        pytest.param(dict(fsdp=8, data=1), marks=pytest.mark.slow),
        pytest.param(dict(data=2, tensor=2, seq=2), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_dpo_on_eight_devices(sizes, tiny, on_one_device, tmp_path):
    """Three pairs, patches and all, spread over eight devices: the numbers of one."""
    trained, _ = dpo(tiny, tmp_path, make_mesh(**sizes))
    expected, _, workdir = on_one_device
    for name in ("loss", "grad_norm"):
        one, many = (
            series(read_metrics(folder, stage="train"), name)[1] for folder in (workdir, tmp_path)
        )
        np.testing.assert_allclose(many, one, rtol=1e-5)
    # Adam's first steps are as long for a tiny gradient as for a large one, so that where it is
    # rounding only its sign may differ; elsewhere the steps are the same.
    before, one, many = (flatten(tree) for tree in (tiny[3], expected, trained))
    for path, x in one.items():
        a, b, start = np.asarray(x), np.asarray(many[path]), np.asarray(before[path])
        assert np.abs(a - start).max() <= 3 * OPTIM["lr"] and a.shape == b.shape
        assert np.mean(np.abs(a - b) > 1e-5) < 0.02, path
