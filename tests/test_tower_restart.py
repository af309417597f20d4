"""A second start of a run with a frozen tower's features: files are read, not decoded."""

import importlib.util
import io
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from aa_jax import models, towers
from aa_jax.data import audio_features, digits, media
from aa_jax.data import processor as processors
from aa_jax.data.dataset import Dataset
from aa_jax.data.features import FeatureStore
from aa_jax.data.processor import Processor
from aa_jax.data.sources import rows_source
from aa_jax.llf.start import llava_config
from aa_jax.sharding import make_mesh

TESTS = Path(__file__).parent
TINY = dict(vision_dim=16, vision_layers=2, vision_heads=2, dim=32, layers=2, heads=2, kv_heads=1,
            mlp_dim=48)  # fmt: skip


def sibling(path):
    spec = importlib.util.spec_from_file_location(Path(path).stem, TESTS / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def preference(number, **medium):
    said = {"response_1": "three", "response_2": "seven one", "overall_response": 1 + number % 2}
    asked = {"question": "which digits?", "prompt": "which digits?"}
    return {**said, **asked, **medium}


def picture(seed, height, width):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return {"bytes": stream.getvalue(), "path": None}


def pictures(folder):
    """A LLaVA; the third picture is the first again."""
    processor = Processor.from_pretrained(digits.write_processor(folder, max_digits=3, patch=8))
    rows = [preference(i, image=picture(i % 2, 24, 24)) for i in range(3)]
    return models.build(llava_config(3, **TINY)), processor, "AA_TI2T", rows


def tiles(folder):
    """A LLaVA-NeXT; pictures of several shapes."""
    path = digits.write_processor(folder, max_digits=3, patch=8)
    points = [[24, 48], [48, 24], [48, 48]]
    changes = {
        "preprocessor_config.json": {
            "image_processor_type": "LlavaNextImageProcessor", "image_grid_pinpoints": points,
            "crop_size": {"height": 24, "width": 24}, "do_center_crop": True,
        },
        "processor_config.json": {"processor_class": "LlavaNextProcessor"},
    }  # fmt: skip
    for name, values in changes.items():
        file = path / name
        file.write_text(json.dumps(json.loads(file.read_text()) | values))
    config = llava_config(3, **TINY) | {
        "architectures": ["LlavaNextForConditionalGeneration"], "model_type": "llava_next",
        "image_grid_pinpoints": points,
    }  # fmt: skip
    shapes = [(24, 72), (50, 30), (24, 24)]
    rows = [preference(i, image=picture(i, *shape)) for i, shape in enumerate(shapes)]
    return models.build(config), Processor.from_pretrained(path), "AA_TI2T", rows


def films(folder):
    """A Qwen2-VL of the first generation; films of one and two patches of time."""
    model, _, processor, _ = sibling("rl/test_media.py").older_patches(folder)
    film = sibling("data/test_qwen_vl_data.py").film
    rows = [
        preference(i, video={"bytes": film(frames=frames), "path": None})
        for i, frames in enumerate((8, 3, 8))
    ]
    return model, processor, "AA_TV2T", rows


def clips(folder):
    """A Qwen2-Audio; clips of different lengths."""
    model, _, processor, _ = sibling("rl/test_media.py").clips(folder)
    rng = np.random.default_rng(0)
    rows = [
        preference(i, audio={"array": rng.normal(size=n).astype(np.float32) / 4,
                             "sampling_rate": 16000})
        for i, n in enumerate((4000, 9000, 2000))
    ]  # fmt: skip
    return model, processor, "AA_TA2T", rows


@pytest.fixture(
    scope="module",
    params=[pictures, *(pytest.param(f, marks=pytest.mark.slow) for f in (tiles, films, clips))],
    ids=["pictures", "tiles", "films", "clips"],
)
def world(request, tmp_path_factory):
    model, processor, template, rows = request.param(tmp_path_factory.mktemp("m") / "c")
    return model, jax.jit(model.init)(jax.random.key(0)), processor, template, rows


@pytest.fixture
def files(world):
    """How many different files there are: of two alike the second is known."""
    return 2 if world[0].family == "llava" else 3


@pytest.fixture
def decoded(monkeypatch):
    """Counts the media that are decoded."""
    seen = {"decoded": 0}

    def counted(module, name):
        call = getattr(module, name)

        def wrapper(*args, **kwargs):
            seen["decoded"] += 1
            return call(*args, **kwargs)

        monkeypatch.setattr(module, name, wrapper)

    counted(media, "decode_image")
    counted(processors, "read_frames")
    counted(audio_features, "decode_audio")
    return seen


def start(world, folder, rows=None, processor=None):
    model, params, own, template, first = world
    source = rows_source(first if rows is None else rows, "t")
    processor = processor or own
    data = Dataset(source, template, "preference", processor=processor)
    return towers.computed_ahead(
        model, params, data, processor=processor, frozen=(f"{model.tower}/*",), folder=folder,
        mesh=make_mesh(devices=jax.devices()[:1]), batch_rows=2, threads=2,
    )  # fmt: skip


def test_unchanged_files_are_not_decoded_again(world, files, decoded, tmp_path, monkeypatch):
    data = start(world, tmp_path)
    assert decoded["decoded"] == files and len(data) == 3
    first = [data[i] for i in range(3)]
    assert all(item.media["tower_features"].any() for item in first)
    decoded["decoded"] = 0
    puts = []
    monkeypatch.setattr(FeatureStore, "put", lambda *args: puts.append(args))
    again = start(world, tmp_path)
    assert decoded["decoded"] == 0 and not puts
    assert again.sizes == data.sizes
    for item, expected in zip((again[i] for i in range(3)), first, strict=True):
        assert item.media.keys() == expected.media.keys()
        for name, array in expected.media.items():
            np.testing.assert_array_equal(item.media[name], array)
        assert item.media_shapes == expected.media_shapes


def test_a_changed_file_or_setting_is_decoded(world, files, decoded, tmp_path):
    _, _, processor, _, rows = world
    start(world, tmp_path)
    decoded["decoded"] = 0
    changed = [rows[0], rows[2], {**rows[1], "question": "how many?", "prompt": "how many?"}]
    start(world, tmp_path, changed)
    assert decoded["decoded"] == 0  # another text, another order: the files are the same
    kind = next(name for name in ("image", "video", "audio") if name in rows[0])
    other = dict(rows[1][kind])
    if "array" in other:
        other["array"] = other["array"] * 0.5
    elif kind == "image":
        other = picture(7, 24, 24)
    else:
        other["bytes"] = sibling("data/test_qwen_vl_data.py").film(frames=5)
    start(world, tmp_path, [rows[0], {**rows[1], kind: other}])
    assert decoded["decoded"] == 1
    decoded["decoded"] = 0
    made = towers._maker(processor)
    part = processor.image_processor or processor.audio_processor
    name = "padding_value" if processor.audio_processor else "rescale_factor"
    owner = getattr(part, "tile", part)
    before = getattr(owner, name)
    try:
        object.__setattr__(owner, name, 0.25)
        assert towers._maker(processor) != made
        start(world, tmp_path)
    finally:
        object.__setattr__(owner, name, before)
    assert decoded["decoded"] == files


def test_lost_and_damaged_features_are_computed_again(world, files, decoded, tmp_path):
    whole = start(world, tmp_path)
    expected = [whole[i].media["tower_features"] for i in range(3)]
    stored = sorted(tmp_path.glob("*/*/*.features"))
    stored[0].write_bytes(stored[0].read_bytes()[:-3])
    stored[-1].unlink()
    decoded["decoded"] = 0
    again = start(world, tmp_path)
    assert 1 <= decoded["decoded"] <= files
    for i, features in enumerate(expected):
        np.testing.assert_allclose(again[i].media["tower_features"], features, atol=2e-6)
    # A damaged note costs a decoding, no more.
    for note in (tmp_path / "decoded").glob("*/*.json"):
        note.write_bytes(b"{")
    decoded["decoded"] = 0
    start(world, tmp_path)
    assert decoded["decoded"] == files
