"""Batches by the contract, against a slow second opinion; padding and packing change nothing."""

import dataclasses

import numpy as np
import pytest

from aa_jax.data.collate import Shapes, collate, plan_shapes
from aa_jax.data.loader import pack
from aa_jax.data.tokens import Encoded
from aa_jax.errors import DataError


def item(prompt, responses, image=False, trained=(), **meta):
    """ids 10.. for the prompt; responses as given; an image over prompt tokens 1 and 2."""
    ids = np.arange(10, 10 + prompt, dtype=np.int32)
    features = np.full(prompt, -1, np.int32)
    media = {}
    if image:
        features[1:3] = (0, 1)
        media = {"pixel_values": np.full((1, 3, 2, 2), float(prompt), np.float32)}
    mask = np.zeros(prompt, bool)
    mask[list(trained)] = True
    arrays = tuple(np.asarray(r, np.int32) for r in responses)
    ended = tuple(True for _ in arrays)
    size = (2, 2) if image else None
    return Encoded(ids, arrays, ended, features, mask, int(image), media, f"t:{prompt}", meta, size)


def sees(batch, b):
    """[T, T] bool from the intervals."""
    key = np.arange(batch["tokens"].shape[1])
    a0, a1, b0, b1 = np.moveaxis(batch["intervals"][b][:, None, :], -1, 0)
    return ((key >= a0) & (key < a1)) | ((key >= b0) & (key < b1))


def test_supervised():
    batch = collate([item(3, [[5, 6, 2]])], Shapes(8, 4), "supervised", batch_rows=2, pad_id=9)
    np.testing.assert_array_equal(batch["tokens"], [[10, 11, 12, 5, 6, 2, 9, 9], [9] * 8])
    np.testing.assert_array_equal(batch["positions"][0], [0, 1, 2, 3, 4, 5, 0, 0])
    np.testing.assert_array_equal(batch["target_positions"][0, 0], [2, 3, 4, 0])
    np.testing.assert_array_equal(batch["targets"][0, 0], [5, 6, 2, 0])
    np.testing.assert_array_equal(batch["loss_mask"], [[[1, 1, 1, 0]], [[0] * 4]])
    np.testing.assert_array_equal(batch["last_positions"], [[5], [0]])
    np.testing.assert_array_equal(batch["sequence_mask"], [[1], [0]])
    expected = np.zeros((8, 8), bool)
    expected[:6, :6] = np.tril(np.ones((6, 6), bool))
    np.testing.assert_array_equal(sees(batch, 0), expected)
    assert not sees(batch, 1).any()
    np.testing.assert_array_equal(batch["intervals"][0, :3], [[0, 0, 0, i] for i in (1, 2, 3)])
    assert "feature_index" not in batch and "media" not in batch
    kinds = {k: v.dtype for k, v in batch.items()}
    floats = {"loss_mask", "sequence_mask"}
    assert all(kinds[k] == (np.float32 if k in floats else np.int32) for k in kinds)


def test_preference_shares_the_prompt():
    batch = collate([item(3, [[5, 6, 2], [7, 2]])], Shapes(9, 3), "preference")
    np.testing.assert_array_equal(batch["tokens"][0], [10, 11, 12, 5, 6, 2, 7, 2, 0])
    np.testing.assert_array_equal(batch["positions"][0], [0, 1, 2, 3, 4, 5, 3, 4, 0])
    np.testing.assert_array_equal(batch["target_positions"][0], [[2, 3, 4], [2, 6, 0]])
    np.testing.assert_array_equal(batch["targets"][0], [[5, 6, 2], [7, 2, 0]])
    np.testing.assert_array_equal(batch["loss_mask"][0], [[1, 1, 1], [1, 1, 0]])
    np.testing.assert_array_equal(batch["last_positions"], [[5, 7]])
    np.testing.assert_array_equal(batch["sequence_mask"], [[1, 1]])
    expected = np.zeros((9, 9), bool)
    expected[:6, :6] = np.tril(np.ones((6, 6), bool))
    expected[6, [0, 1, 2, 6]] = True
    expected[7, [0, 1, 2, 6, 7]] = True
    np.testing.assert_array_equal(sees(batch, 0), expected)
    np.testing.assert_array_equal(batch["intervals"][0, 3], [0, 3, 3, 4])
    np.testing.assert_array_equal(batch["intervals"][0, 7], [0, 3, 6, 8])


def history(batch, b, s):
    """For each trained token: the (token, position) pairs its predictor sees, in order."""
    found = []
    for r in np.flatnonzero(batch["loss_mask"][b, s]):
        at = batch["target_positions"][b, s, r]
        keys = np.flatnonzero(sees(batch, b)[at])
        past = [(int(batch["tokens"][b, k]), int(batch["positions"][b, k])) for k in keys]
        found.append((int(batch["targets"][b, s, r]), past))
    return found


def test_both_preference_layouts_say_the_same():
    items = [item(3, [[5, 6, 2], [7, 2]], True), item(4, [[8, 2], [9, 9, 9, 2]])]
    shared = collate(items, plan_shapes(items, "preference"), "preference")
    rows = collate(items, plan_shapes(items, "preference_rows"), "preference_rows")
    assert rows["tokens"].shape[0] == 4 and shared["tokens"].shape[0] == 2
    for b in range(2):
        for s in range(2):
            assert history(shared, b, s) == history(rows, 2 * b + s, 0)
    np.testing.assert_array_equal(shared["sequence_mask"].reshape(-1), rows["sequence_mask"][:, 0])
    pixels = shared["media"]["pixel_values"]
    np.testing.assert_array_equal(rows["media"]["pixel_values"][:2], np.repeat(pixels[:1], 2, 0))


def test_preference_rows_pad_in_pairs():
    batch = collate([item(3, [[5], [6]])], Shapes(6, 1), "preference_rows", batch_rows=2)
    np.testing.assert_array_equal(batch["sequence_mask"][:, 0], [1, 1, 0, 0])


def test_prompts_for_sampling():
    items = [item(3, []), item(5, [[5, 2]])]
    batch = collate(items, Shapes(6, 0), "prompt", batch_rows=3)
    np.testing.assert_array_equal(batch["last_positions"], [[2], [4], [0]])
    np.testing.assert_array_equal(batch["tokens"][1], [10, 11, 12, 13, 14, 0])
    assert "targets" not in batch and "loss_mask" not in batch


def test_a_group_shares_its_prompt_and_may_be_smaller_than_the_largest():
    """Every sequence sees and predicts what it would in a row of its own."""
    three = item(3, [[5, 6, 2], [7, 2], [8, 2]], image=True)
    two = item(4, [[6, 2], [5, 5, 5]], image=True)
    shapes = plan_shapes([three, two], "group", multiple_of=1)
    assert (shapes.sequences, shapes.length, shapes.response_length) == (3, 10, 3)
    batch = collate([three, two], shapes, "group", batch_rows=3)
    np.testing.assert_array_equal(batch["sequence_mask"], [[1, 1, 1], [1, 1, 0], [0, 0, 0]])
    for b, whole in enumerate((three, two)):
        for s, response in enumerate(whole.responses):
            alone = dataclasses.replace(whole, responses=(response,), ended=(True,))
            row = collate([alone], plan_shapes([alone], "supervised"), "supervised")
            assert history(batch, b, s) == history(row, 0, 0)
            n = len(response)
            np.testing.assert_array_equal(batch["targets"][b, s, :n], response)
            assert batch["loss_mask"][b, s].sum() == n
    with pytest.raises(DataError, match="needs 3"):
        collate([item(3, [[5]] * 4)], dataclasses.replace(shapes, length=99), "group")


def test_images():
    items = [item(4, [[5, 2]], True), item(3, [[6]])]
    batch = collate(items, Shapes(6, 2, 2, (2, 2)), "supervised")
    np.testing.assert_array_equal(batch["feature_index"][0], [-1, 0, 1, -1, -1, -1])
    assert (batch["feature_index"][1] == -1).all()
    pixels = batch["media"]["pixel_values"]
    assert pixels.shape == (2, 2, 3, 2, 2) and pixels.dtype == np.float32
    assert (pixels[0, 0] == 4).all() and not pixels[0, 1].any() and not pixels[1].any()


def test_packing_equals_separate_rows():
    items = [
        item(3, [[5, 6, 2]], True),
        item(5, [[7, 2]], trained=(2, 3)),
        item(4, [[8]], True),
        item(3, [[9, 2]]),
    ]
    shapes = Shapes(16, 12, 2, (2, 2))
    groups = pack([i.sizes for i in items], shapes)
    assert sorted(i for group in groups for i in group) == [0, 1, 2, 3]
    assert len(groups) < 4
    rows = [[items[i] for i in group] for group in groups]
    packed = collate(rows, shapes, "supervised")
    alone = collate(items, shapes, "supervised")
    for b, group in enumerate(groups):
        assert history(packed, b, 0) == [h for i in group for h in history(alone, i, 0)]
        pixels = [items[i].media["pixel_values"] for i in group if items[i].images]
        if pixels:
            got = packed["media"]["pixel_values"][b, : len(pixels)]
            np.testing.assert_array_equal(got, np.concatenate(pixels))
            seen = packed["feature_index"][b]
            np.testing.assert_array_equal(seen[seen >= 0], np.arange(2 * len(pixels)))


def test_earlier_turns_are_targets_too():
    batch = collate([item(6, [[5, 2]], trained=(0, 2, 3))], Shapes(8, 4), "supervised")
    # Token 0 has nothing before it that could predict it.
    np.testing.assert_array_equal(batch["target_positions"][0, 0], [1, 2, 5, 6])
    np.testing.assert_array_equal(batch["targets"][0, 0], [12, 13, 5, 2])
    pair = collate([item(6, [[5, 2], [6]], trained=(2,))], Shapes(16, 2), "preference")
    np.testing.assert_array_equal(pair["loss_mask"][0], [[1, 1], [1, 0]])


def test_targets_are_the_tokens_behind_their_predictors(kit):
    """For every layout: the target stands in the row where its predictor's next token is."""
    items = [item(3, [[5, 6, 2], [7, 2]]), item(4, [[8], [9, 2]])]
    batch = collate(items, plan_shapes(items, "preference"), "preference")
    for b, s, r in np.argwhere(batch["loss_mask"] > 0):
        at = batch["target_positions"][b, s, r]
        nxt = at + 1 if r else np.flatnonzero(batch["tokens"][b] == batch["targets"][b, s, 0])[0]
        assert batch["tokens"][b, nxt] == batch["targets"][b, s, r]
        assert batch["positions"][b, nxt] == batch["positions"][b, at] + 1


def test_plan_shapes():
    items = [item(3, [[5, 6, 2], [7, 2]], True), item(9, [[8], [9, 2]], trained=(1, 2))]
    assert plan_shapes(items, "preference", multiple_of=1) == Shapes(12, 3, 1, (2, 2))
    assert plan_shapes(items, "preference_rows", multiple_of=1) == Shapes(11, 3, 1, (2, 2))
    assert plan_shapes(items, "prompt") == Shapes(16, 3, 1, (2, 2))
    sizes = [i.sizes for i in items]
    assert plan_shapes(sizes, "preference") == Shapes(16, 3, 1, (2, 2))
    one = [item(9, [[8]], trained=(1, 2))]
    assert plan_shapes(one, "supervised", multiple_of=1) == Shapes(10, 3)
    other = dataclasses.replace(sizes[0], image_size=(3, 2))
    with pytest.raises(DataError, match=r"different sizes.*\(2, 2\), \(3, 2\)"):
        plan_shapes([*sizes, other], "supervised")
    with pytest.raises(DataError, match="no examples"):
        plan_shapes([], "supervised")


def test_extras():
    items = [
        item(3, [[5], [6]], margin=0.5, ref=(1.0, 2.0)),
        item(3, [[5], [6]], margin=1, ref=(3, 4)),
    ]
    batch = collate(items, Shapes(8, 1), "preference", batch_rows=3, extras=("margin", "ref"))
    np.testing.assert_array_equal(batch["margin"], np.float32([0.5, 1, 0]))
    np.testing.assert_array_equal(batch["ref"], np.float32([[1, 2], [3, 4], [0, 0]]))
    with pytest.raises(DataError, match="t:3: no 'weight' in the meta data.*margin, ref"):
        collate(items, Shapes(8, 1), "preference", extras=("weight",))


@pytest.mark.parametrize(
    "rows, shapes, layout, words",
    [
        ([item(3, [[5, 2]])], Shapes(4, 2), "supervised", "t:3 needs 5 tokens.*4 fit"),
        ([item(3, [[5, 2]])], Shapes(8, 1), "supervised", "needs 2 response slots, 1 fit"),
        ([item(3, [[5]], True)], Shapes(8, 1), "supervised", "holds 1 images, 0 fit"),
        ([item(3, [[5]], True)], Shapes(8, 1, 1, (4, 2)), "supervised", "do not fit shapes with"),
        ([item(3, [[5]])], Shapes(8, 1), "preference", "has 1 responses.*needs 2"),
        ([item(3, [[5]])], Shapes(8, 1), "preference_rows", "a preference has two"),
        ([item(3, [])], Shapes(8, 1), "supervised", "has 0 responses.*matching task"),
        ([item(3, [[5]])], Shapes(8, 1), "dpo", "Unknown batch layout 'dpo'"),
        ([item(3, [[5]])], Shapes(8, 1, 1), "supervised", "need image_size"),
        ([item(3, [[5]])] * 3, Shapes(8, 1), "supervised", "3 rows do not fit a batch of 2"),
        ([[item(3, [])] * 2], Shapes(8, 1), "prompt", "Packing.*'supervised', not 'prompt'"),
    ],
)
def test_errors(rows, shapes, layout, words):
    with pytest.raises(DataError, match=words):
        collate(rows, shapes, layout, batch_rows=2)


def test_pack_refuses_what_fits_nowhere():
    sizes = [item(3, [[5, 2]]).sizes, item(9, [[5, 2]]).sizes]
    with pytest.raises(DataError, match="Example 1 needs 11 tokens"):
        pack(sizes, Shapes(8, 4))
    assert len(pack(sizes, Shapes(16, 4))) == 1
    assert len(pack(sizes, Shapes(16, 3))) == 2
