"""Score and value heads: what they read, and their way to disk and back."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from aa_jax import models
from aa_jax.errors import CheckpointError
from aa_jax.models import heads
from aa_jax.models.names import flatten


@pytest.fixture(scope="module")
def scored(world, tmp_path_factory):
    reference, model, backbone = world.pair(world.llama_config(), tmp_path_factory.mktemp("llama"))
    head = heads.init_score_head(model, jax.random.key(1))
    return reference, model, {"model": backbone, "score_head": head}


def test_score_is_transformers_sequence_classifier(scored, world):
    """LlamaForSequenceClassification with one label reads the last real token too."""
    reference, model, params = scored
    config = transformers.LlamaConfig(**{**reference.config.to_dict(), "pad_token_id": world.PAD})
    config.num_labels = 1
    classifier = transformers.LlamaForSequenceClassification(config).eval()
    classifier.model.load_state_dict(reference.model.state_dict())
    with torch.no_grad():
        kernel = np.array(params["score_head"]["kernel"])
        classifier.score.weight.copy_(torch.tensor(kernel.T))
        batch = world.text_batch([9, 6, 1], 10)
        inputs, _ = world.torch_inputs(batch)
        expected = classifier(**inputs).logits.numpy()
    got = jax.jit(lambda p, b: heads.score(model, p, b))(params, batch)
    assert got.shape == (3, 1) and got.dtype == jnp.float32
    np.testing.assert_allclose(got, expected, atol=1e-5)


def test_score_does_not_depend_on_padding_or_layout(scored, world):
    """More padding, and prompt | chosen | rejected in one row, give the same scores."""
    _, model, params = scored
    score = jax.jit(lambda p, b: heads.score(model, p, b))
    separate = world.text_batch([8, 7], 8)
    separate["tokens"][1, :5] = separate["tokens"][0, :5]
    expected = score(params, separate)
    wide = world.text_batch([8, 7], 13)
    wide["tokens"][:, :8] = separate["tokens"]
    np.testing.assert_allclose(score(params, wide), expected, atol=1e-5)
    row = np.zeros((1, 13), np.int32)
    row[0, :8], row[0, 8:10] = separate["tokens"][0], separate["tokens"][1, 5:7]
    shared = {
        "tokens": row,
        "positions": np.array([[*range(8), 5, 6, 0, 0, 0]], np.int32),
        "intervals": np.zeros((1, 13, 4), np.int32),
        "last_positions": np.array([[7, 9]], np.int32),
    }
    shared["intervals"][0, :8, 3] = np.arange(8) + 1
    shared["intervals"][0, 8:10] = [[0, 5, 8, 9], [0, 5, 8, 10]]
    np.testing.assert_allclose(score(params, shared), expected.T, atol=1e-5)


def test_values_are_read_where_tokens_are_predicted(scored, world):
    """The value of a slot is the head on the hidden state that predicts its token."""
    reference, model, params = scored
    batch = world.text_batch([9, 6], 10)
    batch["target_positions"] = np.array([[[3, 4, 5]], [[1, 2, 3]]], np.int32)
    got = heads.values(model, params, batch)
    inputs, _ = world.torch_inputs(batch)
    with torch.no_grad():
        hidden = reference.model(**inputs).last_hidden_state.numpy()
    kernel = np.asarray(params["score_head"]["kernel"])[:, 0]
    expected = np.stack([hidden[0, 3:6] @ kernel, hidden[1, 1:4] @ kernel])[:, None]
    np.testing.assert_allclose(got, expected, atol=1e-5)


def test_fresh_heads_give_scores_of_order_one(world):
    """Kernel variance 1 / (D + 1), Stiennon et al. (2020): D = 1024 draws, 4 sigma."""
    model = models.build(world.llama_config(hidden_size=1024))
    kernel = np.asarray(heads.init_score_head(model, jax.random.key(0))["kernel"])
    assert kernel.shape == (1024, 1)
    assert abs(kernel.var() * 1025 - 1) < 4 * np.sqrt(2 / 1024)


def test_axes_cover_the_parameters(scored):
    _, model, params = scored
    axes = flatten(heads.axes(model))
    assert axes.keys() == flatten(params).keys()
    assert axes["score_head/kernel"] == ("embed", None)


def test_save_and_load(scored, tmp_path):
    _, model, params = scored
    heads.save(tmp_path / "reward", model, params)
    _, loaded = heads.load(tmp_path / "reward")
    left, right = flatten(params), flatten(loaded)
    assert left.keys() == right.keys()
    for path in left:
        np.testing.assert_array_equal(left[path], right[path], err_msg=path)
    _, info = transformers.LlamaForCausalLM.from_pretrained(
        tmp_path / "reward", output_loading_info=True
    )
    assert not any(info.values()), info


def test_errors(scored, world, tmp_path):
    _, model, params = scored
    with pytest.raises(CheckpointError, match="save a plain model with aa_jax.models.save"):
        heads.save(tmp_path / "x", model, params["model"])
    models.save(tmp_path / "plain", model, params["model"])
    with pytest.raises(CheckpointError, match="no score_head.safetensors.*init_score_head"):
        heads.load(tmp_path / "plain")
    heads.save(tmp_path / "reward", model, params)
    other = {**params, "score_head": {"kernel": np.zeros((8, 1), np.float32)}}
    heads.save(tmp_path / "narrow", model, other)
    with pytest.raises(CheckpointError, match=r"shape \[8, 1\], but the backbone .* \[16, 1\]"):
        heads.load(tmp_path / "narrow")
    (tmp_path / "reward" / "score_head.safetensors").write_bytes(b"x")
    with pytest.raises(CheckpointError, match="score_head.safetensors cannot be read: holds 1"):
        heads.load(tmp_path / "reward")
