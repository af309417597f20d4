"""LLaVA-NeXT's images against transformers: tiles, order of features, folders, batches."""

import dataclasses
import json

import numpy as np
import pytest
import torch
import transformers
from transformers.models.llava_next.image_processing_pil_llava_next import (
    LlavaNextImageProcessorPil,
)
from transformers.models.llava_next.modeling_llava_next import (
    LlavaNextModel,
    image_size_to_num_patches,
)

from aa_jax.data.anyres import AnyresProcessor
from aa_jax.data.collate import collate, plan_shapes
from aa_jax.data.example import Example, Part, message
from aa_jax.data.processor import Processor
from aa_jax.data.tokens import encode_example
from aa_jax.errors import CheckpointError

EDGE, PATCH = 28, 7
POINTS = [[28, 56], [56, 28], [56, 56], [84, 28], [28, 84]]
# height x width: square, wide, tall, narrow, exactly a canvas, and smaller than a tile
SHAPES = [(40, 60), (61, 40), (24, 24), (9, 100), (100, 9), (56, 28), (57, 56), (1, 30), (83, 31)]


def hf_images():
    edges = {"height": EDGE, "width": EDGE}
    size = {"shortest_edge": EDGE}
    return LlavaNextImageProcessorPil(size=size, crop_size=edges, image_grid_pinpoints=POINTS)


@pytest.fixture(scope="module")
def ours():
    return AnyresProcessor.from_dict(hf_images().to_dict())


@pytest.mark.parametrize("shape", SHAPES)
def test_tiles_equal_transformers(kit, ours, shape):
    image = kit.random_image(1, *shape)
    expected = hf_images()(image, return_tensors="np")
    got = ours(image)
    assert got.dtype == np.float32 and len(got) == ours.tiles(*shape)
    np.testing.assert_array_equal(got, expected["pixel_values"][0].astype(np.float32))
    assert tuple(expected["image_sizes"][0]) == shape


def numbered(shape, side, edge, points):
    """transformers' packing of features that are their own numbers."""
    config = transformers.LlavaNextConfig(
        vision_config={"model_type": "clip_vision_model", "image_size": edge,
                       "patch_size": edge // side, "hidden_size": 8, "num_hidden_layers": 1,
                       "num_attention_heads": 1, "intermediate_size": 8},
        image_grid_pinpoints=points,
    )  # fmt: skip
    each, tiles = side * side + 1, transformers_tiles(shape, points, edge)
    ids = torch.arange(tiles * each).reshape(tiles, each)[:, :-1, None]
    fake = type("Fake", (), {"config": config})()
    packed, _ = LlavaNextModel.pack_image_features(
        fake, [ids], torch.tensor([shape]), "default", image_newline=torch.tensor([-1])
    )
    return packed[0][:, 0].numpy()


def transformers_tiles(shape, points, edge):
    return image_size_to_num_patches(list(shape), points, edge)


def same_order(ours, shape, side, edge, points):
    expected = numbered(shape, side, edge, points)
    got = ours.features(*shape, side)
    ends = got % (side * side + 1) == side * side
    np.testing.assert_array_equal(np.where(ends, -1, got), expected)


@pytest.mark.parametrize("shape", SHAPES)
def test_features_stand_where_transformers_puts_them(ours, shape):
    same_order(ours, shape, EDGE // PATCH, EDGE, POINTS)


def test_features_of_released_settings():
    """LLaVA 1.6's own pinpoints, 24 x 24 patches, over 200 random sizes."""
    released = AnyresProcessor.from_dict(
        {"image_processor_type": "LlavaNextImageProcessor", "size": {"shortest_edge": 336},
         "crop_size": {"height": 336, "width": 336}}
    )  # fmt: skip
    points = [list(point) for point in released.pinpoints]
    rng = np.random.default_rng(0)
    for shape in rng.integers(16, 1500, (200, 2)).tolist():
        same_order(released, tuple(shape), 24, 336, points)


@pytest.fixture(scope="module")
def folder(kit, tmp_path_factory):
    """(checkpoint folder as transformers writes it, its processor)."""
    folder = tmp_path_factory.mktemp("llava_next")
    processor = transformers.LlavaNextProcessor(
        hf_images(), kit.spm_tokenizer(), patch_size=PATCH,
        vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=kit.LLAVA_TEMPLATE,
    )  # fmt: skip
    processor.save_pretrained(folder)
    config = {
        "model_type": "llava_next",
        "image_grid_pinpoints": POINTS,
        "vision_config": {"model_type": "clip_vision_model", "patch_size": PATCH},
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder, processor


def example(kit, shapes, text="what digits?", responses=()):
    pictures = tuple(kit.random_image(i, *shape) for i, shape in enumerate(shapes))
    parts = [Part("image", index=i) for i in range(len(shapes))]
    return Example((message("user", text, parts),), responses, pictures)


@pytest.mark.parametrize(
    "shapes", [[(40, 60)], [(9, 100), (61, 40)], [(24, 24), (83, 31), (1, 30)]]
)
def test_ids_and_pixels_equal_transformers(kit, folder, shapes):
    path, theirs = folder
    ours = Processor.from_pretrained(path)
    asked = example(kit, shapes)
    got = encode_example(asked, ours)
    content = [*({"type": "image"} for _ in shapes), {"type": "text", "text": "what digits?"}]
    rendered = theirs.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
    )
    expected = theirs(text=rendered, images=list(asked.media), return_tensors="np")
    np.testing.assert_array_equal(got.prompt, expected["input_ids"][0])
    tiles = [ours.image_processor.tiles(*shape) for shape in shapes]
    pixels = np.concatenate([p[:n] for p, n in zip(expected["pixel_values"], tiles, strict=True)])
    np.testing.assert_array_equal(got.media["pixel_values"], pixels.astype(np.float32))
    each, at = (EDGE // PATCH) ** 2 + 1, 0
    order = []
    for shape, count in zip(shapes, tiles, strict=True):
        order.append(at + ours.image_processor.features(*shape, EDGE // PATCH))
        at += count * each
    places = got.prompt == ours.image_token_id
    np.testing.assert_array_equal(got.feature_index[places], np.concatenate(order))
    assert got.images == sum(tiles) and got.features == at
    assert encode_example(asked, ours, pixels=False).sizes == got.sizes
    assert ours.feature_count(*shapes[0]) == len(order[0])


def test_batches_and_packed_rows(kit, folder):
    """Rows of different tiles; a packed row's second example points behind the first one's."""
    ours = Processor.from_pretrained(folder[0])
    items = [
        encode_example(example(kit, shapes, responses=("three",)), ours)
        for shapes in ([(40, 60)], [(9, 100), (24, 24)])
    ]
    batch = collate(items, plan_shapes(items, "supervised"), "supervised", batch_rows=2)
    assert batch["media"]["pixel_values"].shape == (2, items[1].images, 3, EDGE, EDGE)
    for row, item in enumerate(items):
        n = len(item.prompt)
        np.testing.assert_array_equal(batch["feature_index"][row, :n], item.feature_index)
        np.testing.assert_array_equal(
            batch["media"]["pixel_values"][row, : item.images], item.media["pixel_values"]
        )
    shapes = plan_shapes(items, "supervised")
    wide = dataclasses.replace(shapes, length=2 * shapes.length, images=items[0].images
                               + items[1].images, response_length=32)  # fmt: skip
    packed = collate([items], wide, "supervised")
    n = len(items[0].prompt) + len(items[0].responses[0])
    second = packed["feature_index"][0, n : n + len(items[1].prompt)]
    seen = items[1].feature_index >= 0
    np.testing.assert_array_equal(second[seen], items[1].feature_index[seen] + items[0].features)


def test_round_trip_of_a_folder(kit, folder, tmp_path):
    Processor.from_pretrained(folder[0]).save_pretrained(tmp_path)
    again = Processor.from_pretrained(tmp_path)
    assert again.image_processor == Processor.from_pretrained(folder[0]).image_processor
    theirs = LlavaNextImageProcessorPil.from_pretrained(tmp_path)
    image = kit.random_image(3, 50, 31)
    np.testing.assert_array_equal(
        again.image_processor(image),
        theirs(image, return_tensors="np")["pixel_values"][0].astype(np.float32),
    )


def test_settings_that_do_not_fit_are_refused(folder, tmp_path):
    settings = hf_images().to_dict()
    with pytest.raises(CheckpointError, match=r"\[30, 56\].*whole\s+tiles"):
        AnyresProcessor.from_dict({**settings, "image_grid_pinpoints": [[30, 56]]})
    with pytest.raises(CheckpointError, match="crop_size"):
        AnyresProcessor.from_dict({**settings, "do_center_crop": False})
    for name in folder[0].iterdir():
        (tmp_path / name.name).write_bytes(name.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    config["image_grid_pinpoints"] = [[28, 56]]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="image_grid_pinpoints"):
        Processor.from_pretrained(tmp_path)
