"""Positions with three axes against transformers' get_rope_index."""

import types

import numpy as np
import pytest
import torch
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLModel
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLModel

from aa_jax.data.mrope import Grid, mrope_positions
from aa_jax.errors import MediaError

ROWS = {
    "text": [6],
    "image": [3, ("image", 1, 4, 8), 5],
    "starts and ends with media": [("image", 1, 2, 6), 1, ("image", 1, 6, 2)],
    "long video": [2, ("video", 9, 4, 4), 3],
    "seconds": [1, ("video", 5, 4, 6, 2.6), 4, ("image", 1, 8, 4), 2, ("video", 2, 2, 2, 1.0), 1],
}


def transformers_positions(cls, row, per_second):
    kinds, grids, steps = [], {"image": [], "video": []}, []
    for piece in row:
        if isinstance(piece, int):
            kinds += [0] * piece
            continue
        kind, *rest = piece
        grid = Grid(*rest)
        kinds += [1 if kind == "image" else 2] * grid.features(2)
        grids[kind].append([grid.frames, grid.rows, grid.columns])
        steps += [grid.step / per_second] if kind == "video" else []
    vision = types.SimpleNamespace(spatial_merge_size=2, tokens_per_second=per_second)
    model = types.SimpleNamespace(config=types.SimpleNamespace(vision_config=vision))
    model.get_vision_position_ids = types.MethodType(cls.get_vision_position_ids, model)
    kwargs = {"second_per_grid_ts": torch.tensor(steps)} if cls is Qwen2_5_VLModel else {}
    positions, delta = cls.get_rope_index(
        model,
        torch.zeros((1, len(kinds)), dtype=torch.long),
        torch.tensor([kinds]),
        torch.tensor(grids["image"]) if grids["image"] else None,
        torch.tensor(grids["video"]) if grids["video"] else None,
        **kwargs,
    )
    return positions[:, 0].T.numpy(), int(delta)


def ours(row):
    index, grids = [], [Grid(*p[1:]) for p in row if not isinstance(p, int)]
    left = iter(grids)
    for piece in row:
        count = piece if isinstance(piece, int) else next(left).features(2)
        start = sum(i >= 0 for i in index)
        index += [-1] * count if isinstance(piece, int) else range(start, start + count)
    return mrope_positions(np.array(index), grids, 2)


@pytest.mark.parametrize("name", ROWS)
def test_positions_equal_transformers(name):
    row = ROWS[name]
    models = [(Qwen2_5_VLModel, 2)] if name == "seconds" else [(Qwen2_5_VLModel, 1)]
    models += [] if name == "seconds" else [(Qwen2VLModel, 1)]
    got, after = ours(row)
    for cls, per_second in models:
        expected, delta = transformers_positions(cls, row, per_second)
        np.testing.assert_array_equal(got, expected)
        # The next token's position, where text ends the row: transformers' delta + length.
        if isinstance(row[-1], int) and name != "long video":
            assert after == delta + len(got)


def test_text_goes_on_behind_the_larger_edge():
    """Also behind a video of more frames than that: the figure of the text itself, 2 + 4 // 2 + 3,
    not of the video's last frame."""
    got, after = ours(ROWS["long video"])
    assert got[-3:].tolist() == [[4] * 3, [5] * 3, [6] * 3] and after == 7
    assert got[:, 0].max() == 10


def test_tokens_and_grids_must_agree():
    with pytest.raises(MediaError, match=r"t:3: 2 placeholder tokens .* of 4 features \(\[4\]\)"):
        mrope_positions(np.array([-1, 0, 1]), [Grid(1, 4, 4)], 2, "t:3")
    with pytest.raises(MediaError, match="text stands between the 2 placeholder tokens"):
        mrope_positions(np.array([0, -1, 1]), [Grid(1, 2, 4)], 2)
