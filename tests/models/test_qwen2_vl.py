"""Qwen2-VL and Qwen2.5-VL against transformers: images and videos of any size, M-RoPE."""

import numpy as np
import pytest
import torch

CASES = {
    "two images of different shapes": (
        "qwen2_vl",
        {},
        [[3, ("image", 1, 4, 6), 2, ("image", 1, 2, 2), 3], [1, ("image", 1, 6, 2), 4]],
    ),
    "video and image, tied, plain activation, biased": (
        "qwen2_vl",
        dict(
            text=dict(tie_word_embeddings=True, num_key_value_heads=4),
            vision=dict(hidden_act="gelu", depth=2),
        ),
        [[2, ("video", 3, 2, 4), 2, ("image", 1, 2, 2), 2], [("video", 2, 4, 2), 3]],
    ),
    "windows of several sizes": (
        "qwen2_5_vl",
        {},
        [[2, ("image", 1, 6, 10), 2], [3, ("image", 1, 2, 2), 1, ("image", 1, 4, 4), 2]],
    ),
    "video in seconds, no full layer": (
        "qwen2_5_vl",
        dict(vision=dict(fullatt_block_indexes=[7], window_size=4)),
        [[2, ("video", 3, 4, 2, 1.5), 2, ("image", 1, 2, 6), 3], [4, ("video", 2, 2, 2, 3), 1]],
    ),
}
WIDTH = 32


@pytest.fixture(scope="module")
def vl(world):
    import importlib.util
    from pathlib import Path

    path = Path(__file__).with_name("vl_world.py")
    spec = importlib.util.spec_from_file_location("vl_world", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def check(world, vl, generation, changes, rows, folder, width=WIDTH):
    config = vl.config(world, generation, **changes)
    batch = vl.batch(config, rows, width)
    reference, model, params = world.pair(config, folder)
    real = world.real_mask(batch)
    labels = np.random.default_rng(9).integers(0, 40, real.shape).astype(np.int32)
    out, grads = world.evaluate(model)(params, batch, labels)
    expected = vl.torch_logits(reference, batch, rows)
    np.testing.assert_allclose(np.asarray(out)[real], expected.detach().numpy(), atol=1e-4, rtol=0)
    world.torch_cross_entropy(expected, labels[real].astype(np.int64)).backward()
    world.assert_same_gradients(model, grads, reference)
    with torch.no_grad():
        left = vl.torch_logits(reference, batch, rows, pad_left=3)
    np.testing.assert_allclose(np.asarray(out)[real], left.numpy(), atol=1e-4, rtol=0)


@pytest.mark.parametrize("case", CASES)
def test_logits_and_gradients(case, world, vl, tmp_path):
    generation, changes, rows = CASES[case]
    check(world, vl, generation, changes, rows, tmp_path)
