"""Many sequences in one row: packing and shared prefixes change nothing about any of them."""

import jax
import numpy as np
import pytest


@pytest.fixture(scope="module")
def llama(world, tmp_path_factory):
    _, model, params = world.pair(world.llama_config(), tmp_path_factory.mktemp("llama"))
    return jax.jit(model.hidden_states), params


def test_packed_rows_equal_separate_rows(llama, world):
    """Three sequences end to end in one row, each causal within itself, positions restarting."""
    hidden_states, params = llama
    lengths = [5, 3, 6]
    separate = world.text_batch(lengths, 16)
    tokens = np.zeros((3, 16), np.int32)
    positions = np.zeros((3, 16), np.int32)
    intervals = np.zeros((3, 16, 4), np.int32)
    starts = np.cumsum([1, *lengths[:-1]])  # one padding token in front
    for row, (start, n) in enumerate(zip(starts, lengths, strict=True)):
        where = slice(start, start + n)
        tokens[0, where] = separate["tokens"][row, :n]
        positions[0, where] = np.arange(n)
        intervals[0, where, 2] = start
        intervals[0, where, 3] = np.arange(start, start + n) + 1
    packed = {"tokens": tokens, "positions": positions, "intervals": intervals}
    got = np.asarray(hidden_states(params, packed))[0]
    expected = np.asarray(
        hidden_states(params, {k: separate[k] for k in ("tokens", "positions", "intervals")})
    )
    for row, (start, n) in enumerate(zip(starts, lengths, strict=True)):
        np.testing.assert_allclose(got[start : start + n], expected[row, :n], atol=1e-5)


def shared_prefix(tokens, prompt, ends):
    """Intervals and positions of a row ``prompt | response | response ...``."""
    width = tokens.shape[1]
    positions = np.zeros((1, width), np.int32)
    intervals = np.zeros((1, width, 4), np.int32)
    positions[0, :prompt] = np.arange(prompt)
    intervals[0, :prompt, 3] = np.arange(prompt) + 1
    start = prompt
    for end in ends:
        n = end - start
        positions[0, start:end] = prompt + np.arange(n)
        intervals[0, start:end, 1] = prompt
        intervals[0, start:end, 2] = start
        intervals[0, start:end, 3] = np.arange(start, end) + 1
        start = end
    return {"tokens": tokens, "positions": positions, "intervals": intervals}


def test_shared_prefix_equals_separate_rows(llama, world):
    """One row prompt | chosen | rejected against the rows prompt+chosen and prompt+rejected."""
    hidden_states, params = llama
    prompt, chosen, rejected = 5, 4, 3
    rng = np.random.default_rng(3)
    row = rng.integers(6, 40, (1, 14)).astype(np.int32)
    shared = shared_prefix(row, prompt, [prompt + chosen, prompt + chosen + rejected])
    separate = world.text_batch([prompt + chosen, prompt + rejected], 14)
    separate["tokens"][0, : prompt + chosen] = row[0, : prompt + chosen]
    separate["tokens"][1, :prompt] = row[0, :prompt]
    separate["tokens"][1, prompt : prompt + rejected] = row[0, prompt + chosen : 12]
    del separate["last_positions"]
    got = np.asarray(hidden_states(params, shared))[0]
    expected = np.asarray(hidden_states(params, separate))
    np.testing.assert_allclose(got[:9], expected[0, :9], atol=1e-5)
    np.testing.assert_allclose(got[9:12], expected[1, prompt : prompt + rejected], atol=1e-5)


def test_shared_prefix_with_images(world, tmp_path):
    """The prompt's image is encoded once and seen by both responses."""
    config = world.llava_config()
    _, model, params = world.pair(config, tmp_path)
    separate = world.image_batch(config, [12, 12], 17, [1, 1])
    prompt = 8
    separate["tokens"][1, :prompt] = separate["tokens"][0, :prompt]
    hidden_states = jax.jit(model.hidden_states)
    separate["media"]["pixel_values"][1] = separate["media"]["pixel_values"][0]
    row = np.zeros((1, 17), np.int32)
    row[0, :12] = separate["tokens"][0, :12]
    row[0, 12:16] = separate["tokens"][1, 8:12]
    shared = {
        **shared_prefix(row, prompt, [12, 16]),
        "feature_index": separate["feature_index"][:1],
        "media": {"pixel_values": separate["media"]["pixel_values"][:1]},
    }
    got = np.asarray(hidden_states(params, shared))[0]
    expected = np.asarray(hidden_states(params, separate))
    np.testing.assert_allclose(got[:12], expected[0, :12], atol=1e-5)
    np.testing.assert_allclose(got[12:16], expected[1, 8:12], atol=1e-5)


@pytest.mark.parametrize("extra", [0, 6])
def test_amount_of_padding_does_not_matter(llama, world, extra):
    hidden_states, params = llama
    narrow = world.text_batch([9, 4], 10)
    wide = world.text_batch([9, 4], 10 + extra)
    wide["tokens"][:, :10] = narrow["tokens"]
    got = np.asarray(hidden_states(params, wide))[:, :10]
    expected = np.asarray(hidden_states(params, narrow))
    real = world.real_mask(narrow)
    np.testing.assert_allclose(got[real], expected[real], atol=1e-5)
