"""Patches equal those of transformers' PIL image processor; videos are checked against images."""

import dataclasses

import numpy as np
import pytest
import torch
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import (
    Qwen2VLImageProcessorPil,
    smart_resize,
)

from aa_jax.data import patches
from aa_jax.data.example import InvalidRow
from aa_jax.data.mrope import Grid
from aa_jax.data.patches import PatchProcessor, VideoSettings, sample_frames
from aa_jax.errors import CheckpointError

SETTINGS = {
    "as released": {},
    "small patches": dict(patch_size=4, min_pixels=64, max_pixels=1024),
    "merge 3, one frame, bilinear": dict(
        patch_size=5, merge_size=3, temporal_patch_size=1, resample=2, min_pixels=900
    ),
    "unscaled, enlarged": dict(
        patch_size=4, do_rescale=False, size={"shortest_edge": 4096, "longest_edge": 8192}
    ),
    "own mean, not resized": dict(
        patch_size=4, do_resize=False, image_mean=[0.1, 0.2, 0.3], image_std=[0.5, 0.6, 0.7]
    ),
}


@pytest.mark.parametrize("shape", [(40, 64), (64, 24), (16, 16), (8, 200)])
@pytest.mark.parametrize("name", SETTINGS)
def test_pixels_and_grid_equal_transformers(kit, name, shape):
    theirs = Qwen2VLImageProcessorPil(**SETTINGS[name])
    ours = PatchProcessor.from_dict(theirs.to_dict())
    image = kit.random_image(1, *shape)
    expected = theirs(image, return_tensors="np")
    grid = ours.grid(*shape)
    got = ours(image, grid)
    assert [grid.frames, grid.rows, grid.columns] == expected["image_grid_thw"][0].tolist()
    assert got.dtype == np.float32 and got.shape[1] == ours.patch_numbers
    np.testing.assert_array_equal(got, expected["pixel_values"].astype(np.float32))


def test_sizes_equal_transformers():
    """Half to even rounding, both bounds, and factors of both generations, on random sizes."""
    rng = np.random.default_rng(0)
    for height, width in [*rng.integers(10, 3000, (300, 2)).tolist(), [14, 42], [70, 98]]:
        if max(height, width) > 200 * min(height, width):
            continue
        for factor, bounds in ((28, (3136, 1003520)), (32, (65536, 131072))):
            expected = smart_resize(height, width, factor, *bounds)
            assert patches.smart_resize(height, width, factor=factor, pixels=bounds) == expected


def test_impossible_sizes_are_dropped_by_name():
    with pytest.raises(InvalidRow, match="t:7: 3 x 900 pixels; one edge is 300 times") as error:
        PatchProcessor().grid(3, 900, "t:7")
    assert error.value.reason == "image too elongated"
    with pytest.raises(InvalidRow, match="30 x 56 pixels are no multiple of 28"):
        PatchProcessor(do_resize=False).grid(30, 56)


@pytest.mark.parametrize(
    "spelling",
    [
        {"min_pixels": 100, "max_pixels": 900},
        {"size": {"shortest_edge": 100, "longest_edge": 900}},
        {"size": {"min_pixels": 100, "max_pixels": 900}},
        {"size": {"shortest_edge": 1, "longest_edge": 2}, "min_pixels": 100, "max_pixels": 900},
    ],
)
def test_every_spelling_of_the_bounds(spelling):
    assert PatchProcessor.from_dict(spelling).pixels == (100, 900)
    assert PatchProcessor.from_dict({}).pixels == (56 * 56, 28 * 28 * 1280)
    assert PatchProcessor.from_dict({}).video.pixels == (128 * 28 * 28, 28 * 28 * 768)
    with pytest.raises(CheckpointError, match="gives size as 7"):
        PatchProcessor.from_dict({"size": 7}, where="x")


def test_settings_survive_the_file(kit):
    made = PatchProcessor(patch_size=4, pixels=(64, 512), video=VideoSettings((16, 32), 3.0, 2, 8))
    assert PatchProcessor.from_dict(made.to_dict(), made.video_dict()) == made
    every = dataclasses.replace(made, video=VideoSettings((16, 32), fps=None))
    assert PatchProcessor.from_dict(every.to_dict(), every.video_dict()) == every
    with pytest.raises(CheckpointError, match="x sets num_frames to 8; .* Give fps"):
        PatchProcessor.from_dict({}, {"num_frames": 8}, where="x")
    theirs = Qwen2VLImageProcessorPil(**{k: v for k, v in made.to_dict().items()})
    image = kit.random_image(3)
    expected = theirs(image, return_tensors="np")["pixel_values"]
    np.testing.assert_array_equal(made(image, made.grid(40, 60)), expected.astype(np.float32))


def small(**changes):
    settings = VideoSettings(pixels=(64, 1024))
    return PatchProcessor(patch_size=4, pixels=(64, 1024), video=settings, **changes)


def test_a_video_of_one_repeated_frame_is_the_image(kit):
    """Every temporal patch of a still video holds the image's own patches."""
    make, image = small(), kit.random_image(2)
    expected = make(image, make.grid(40, 60))
    grid = make.video_grid(6, 0.5, (40, 60), "")
    assert grid == Grid(3, *(getattr(make.grid(40, 60), name) for name in ("rows", "columns")))
    got = make.patches([image] * 6, grid)
    np.testing.assert_array_equal(got, np.tile(expected, (3, 1)))


def test_frames_stand_where_the_grid_says(kit):
    """An odd number of frames: the last is repeated; halves of a patch are consecutive frames."""
    make = small()
    frames = [kit.random_image(seed) for seed in range(5)]
    grid = make.video_grid(5, 1.0, (40, 60), "")
    assert grid.frames == 3
    got = make.patches(frames, grid).reshape(3, -1, 3, 2, 4, 4)
    for time, (first, second) in enumerate([(0, 1), (2, 3), (4, 4)]):
        for half, number in enumerate((first, second)):
            alone = make(frames[number], make.grid(40, 60)).reshape(-1, 3, 2, 4, 4)
            np.testing.assert_array_equal(got[time, :, :, half], alone[:, :, 0])


@pytest.mark.parametrize("total", [1, 3, 4, 5, 37, 250, 1001])
@pytest.mark.parametrize("rate", [1.0, 23.976, 30.0])
def test_sampling_is_the_documented_formula(total, rate):
    """frames = duration x fps within [min, max], rounded down to whole patches, evenly spaced:
    transformers' arithmetic, in torch."""
    settings = VideoSettings(fps=2.0, min_frames=4, max_frames=20)
    got = sample_frames(total, rate, settings, 2)
    most = min(20, total) // 2 * 2
    number = int(min(max(total / rate * 2.0, 4), most, total) // 2 * 2)
    if number == 0:
        assert got.tolist() == [0]
        return
    expected = torch.arange(0, total, total / number).int().numpy()[:number]
    np.testing.assert_array_equal(got, expected)
    assert got[-1] < total
    assert sample_frames(total, rate, VideoSettings(fps=None), 2).tolist() == list(range(total))
