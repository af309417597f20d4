"""Pixels equal the PIL classes of transformers, bit for bit."""

import numpy as np
import pytest
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from aa_jax.data.images import ImageProcessor
from aa_jax.errors import CheckpointError

CASES = {
    "clip": (CLIPImageProcessorPil, dict(size={"shortest_edge": 28}, crop_size=28)),
    "clip small crop": (CLIPImageProcessorPil, dict(size={"shortest_edge": 20}, crop_size=33)),
    "clip odd crop": (CLIPImageProcessorPil, dict(size={"shortest_edge": 30}, crop_size=27)),
    "clip raw": (CLIPImageProcessorPil, dict(do_resize=False, do_normalize=False, crop_size=24)),
    "clip unscaled": (CLIPImageProcessorPil, dict(do_rescale=False, do_center_crop=False)),
    "llava": (LlavaImageProcessorPil, dict(size={"shortest_edge": 24}, crop_size=24)),
    "llava padded": (
        LlavaImageProcessorPil,
        dict(do_pad=True, size={"shortest_edge": 24}, crop_size=24),
    ),
    "siglip": (SiglipImageProcessorPil, dict(size={"height": 24, "width": 32})),
    "vit": (ViTImageProcessorPil, dict(size={"height": 24, "width": 24})),
}


@pytest.mark.parametrize("shape", [(40, 60), (60, 41), (24, 24), (9, 100)])
@pytest.mark.parametrize("name", CASES)
def test_pixels_equal_transformers(kit, name, shape):
    make, settings = CASES[name]
    theirs = make(**settings)
    ours = ImageProcessor.from_dict(theirs.to_dict())
    image = kit.random_image(1, *shape)
    expected = theirs(image, return_tensors="np")["pixel_values"][0]
    got = ours(image)
    assert got.dtype == np.float32
    np.testing.assert_array_equal(got, expected.astype(np.float32))
    assert ours.output_size(*shape) == expected.shape[1:]


def test_old_file_format():
    old = ImageProcessor.from_dict(
        {"feature_extractor_type": "CLIPFeatureExtractor", "size": 336, "crop_size": 336}
    )
    assert old.fixed_size == (336, 336) and old.size == {"shortest_edge": 336}


def test_fixed_size_is_known_only_with_a_crop_or_fixed_edges():
    clip = ImageProcessor.from_dict({"image_processor_type": "CLIPImageProcessor"})
    loose = ImageProcessor.from_dict(
        {"image_processor_type": "CLIPImageProcessorFast", "do_center_crop": False}
    )
    assert clip.fixed_size == (224, 224) and loose.fixed_size is None
    assert loose.output_size(100, 50) == (448, 224)


def test_round_trip_of_settings():
    ours = ImageProcessor.from_dict({"image_processor_type": "SiglipImageProcessor"})
    assert ImageProcessor.from_dict(ours.to_dict()) == ours


def test_foreign_image_processor_is_refused():
    with pytest.raises(CheckpointError, match="Qwen2VLImageProcessor.*CLIPImageProcessor"):
        ImageProcessor.from_dict({"image_processor_type": "Qwen2VLImageProcessor"}, "x.json")
