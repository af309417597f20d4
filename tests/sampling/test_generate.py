"""The sampler against full forward passes: same tokens, same log-probs, whatever the batch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aa_jax import models
from aa_jax.errors import ConfigError
from aa_jax.sampling import generate, make_sampler

VOCAB, EOS, IMAGE = 37, 2, 5
CONFIG = {
    "architectures": ["LlavaForConditionalGeneration"],
    "model_type": "llava",
    "image_token_index": IMAGE,
    "vision_feature_layer": -2,
    "vision_feature_select_strategy": "default",
    "projector_hidden_act": "gelu",
    "multimodal_projector_bias": True,
    "vision_config": {
        "model_type": "clip_vision_model", "hidden_size": 16, "intermediate_size": 32,
        "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 8, "patch_size": 4,
        "num_channels": 3, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5,
    },
    "text_config": {
        "model_type": "llama", "vocab_size": VOCAB, "hidden_size": 24, "intermediate_size": 40,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "max_position_embeddings": 128, "rms_norm_eps": 1e-5, "hidden_act": "silu",
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
}  # fmt: skip
PATCHES, LENGTH, NEW = 4, 12, 9


@pytest.fixture(scope="module")
def llava():
    model = models.build(CONFIG)
    params = model.init(jax.random.key(0))
    # Random weights predict almost uniformly; a wider head makes the choice of token matter.
    params["language_model"]["head"]["weight"] *= 30.0
    return model, params


def prompts(rows: int, seed: int = 0) -> dict:
    """Unequal prompts, each with one image of four patches."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(PATCHES + 2, LENGTH + 1, rows)
    tokens = np.zeros((rows, LENGTH), np.int32)
    feature = np.full((rows, LENGTH), -1, np.int32)
    for row, length in enumerate(lengths):
        tokens[row, :length] = rng.integers(6, VOCAB, length)
        tokens[row, 1 : 1 + PATCHES] = IMAGE
        feature[row, 1 : 1 + PATCHES] = np.arange(PATCHES)
    return {
        "tokens": tokens,
        "positions": np.tile(np.arange(LENGTH, dtype=np.int32), (rows, 1)),
        "intervals": intervals(lengths, LENGTH),
        "feature_index": feature,
        "media": {"pixel_values": rng.normal(size=(rows, 1, 3, 8, 8)).astype(np.float32)},
        "last_positions": lengths[:, None].astype(np.int32) - 1,
    }


def intervals(lengths, size):
    steps = np.arange(size)
    real = steps < np.asarray(lengths)[:, None]
    result = np.zeros((len(lengths), size, 4), np.int32)
    result[..., 3] = np.where(real, steps + 1, 0)
    return result


def full_logits(model, params, batch, samples):
    """Logits that predict every sampled token, by one forward pass without a cache."""
    rows = batch["tokens"].shape[0]
    lengths = batch["last_positions"][:, 0] + 1
    size = LENGTH + NEW
    tokens = np.zeros((rows, size), np.int32)
    feature = np.full((rows, size), -1, np.int32)
    counts = samples.mask.sum(1).astype(int)
    for row in range(rows):
        tokens[row, : lengths[row]] = batch["tokens"][row, : lengths[row]]
        tokens[row, lengths[row] : lengths[row] + NEW] = samples.tokens[row]
        feature[row, : lengths[row]] = batch["feature_index"][row, : lengths[row]]
    hidden = model.hidden_states(
        params,
        {
            "tokens": tokens,
            "positions": np.tile(np.arange(size, dtype=np.int32), (rows, 1)),
            "intervals": intervals(lengths + counts, size),
            "feature_index": feature,
            "media": batch["media"],
        },
    )
    logits = hidden @ model.head(params).T
    index = (lengths[:, None] - 1 + np.arange(NEW))[..., None]
    return np.asarray(jnp.take_along_axis(logits, index, axis=1))


def test_greedy_is_the_argmax_of_the_full_forward_pass(llava):
    model, params = llava
    batch = prompts(6)
    sampler = make_sampler(model, max_new_tokens=NEW, eos_ids=[EOS], temperature=0.0)
    samples = generate(sampler, params, batch, np.arange(6))
    logits = full_logits(model, params, batch, samples)
    real = samples.mask.astype(bool)
    np.testing.assert_array_equal(samples.tokens[real], logits.argmax(-1)[real])


@pytest.mark.parametrize("temperature, top_p, top_k", [(1.0, 1.0, 0), (0.7, 0.8, 5)])
def test_logps_are_those_of_the_whole_vocabulary(llava, temperature, top_p, top_k):
    model, params = llava
    batch = prompts(16, seed=1)
    sampler = make_sampler(
        model, max_new_tokens=NEW, eos_ids=[EOS], temperature=temperature, top_p=top_p, top_k=top_k
    )
    samples = generate(sampler, params, batch, np.arange(16))
    logits = full_logits(model, params, batch, samples) / temperature
    logps = np.asarray(jax.nn.log_softmax(logits, axis=-1))
    expected = np.take_along_axis(logps, samples.tokens[..., None], axis=-1)[..., 0]
    np.testing.assert_allclose(samples.logps, expected * samples.mask, atol=1e-4)


def test_a_response_ends_with_its_end_token_and_padding_follows(llava):
    model, params = llava
    batch = prompts(32, seed=2)
    ends = [EOS, 7, 11, 20]
    sampler = make_sampler(model, max_new_tokens=NEW, eos_ids=ends, pad_id=0)
    samples = generate(sampler, params, batch, np.arange(32))
    assert 0 < samples.finished.sum() < 32
    for tokens, mask, finished in zip(samples.tokens, samples.mask, samples.finished, strict=True):
        count = int(mask.sum())
        assert not np.isin(tokens[: count - 1], ends).any()
        assert bool(np.isin(tokens[count - 1], ends)) == bool(finished)
        assert (tokens[count:] == 0).all() and (mask[count:] == 0).all()
        assert finished or count == NEW


def test_a_request_gives_the_same_text_in_any_batch(llava):
    model, params = llava
    sampler = make_sampler(model, max_new_tokens=NEW, eos_ids=[EOS])
    batch, seeds = prompts(8, seed=3), np.arange(100, 108)
    whole = generate(sampler, params, batch, seeds)
    order = np.array([5, 1, 7, 0, 2, 6, 3, 4])
    shuffled = {k: v[order] for k, v in batch.items() if k != "media"}
    shuffled["media"] = {"pixel_values": batch["media"]["pixel_values"][order]}
    again = generate(sampler, params, shuffled, seeds[order])
    np.testing.assert_array_equal(again.tokens, whole.tokens[order])
    other = generate(sampler, params, batch, seeds + 1)
    assert (other.tokens != whole.tokens).any()


def test_sampled_frequencies_follow_the_distribution(llava):
    model, params = llava
    one = prompts(1, seed=4)
    rows = 512
    batch = {k: np.repeat(v, rows, axis=0) for k, v in one.items() if k != "media"}
    batch["media"] = {"pixel_values": np.repeat(one["media"]["pixel_values"], rows, axis=0)}
    sampler = make_sampler(model, max_new_tokens=1, eos_ids=[EOS], temperature=2.0)
    counts = np.zeros(VOCAB)
    for call in range(8):
        samples = generate(sampler, params, batch, np.arange(rows) + rows * call)
        counts += np.bincount(samples.tokens[:, 0], minlength=VOCAB)
    hidden = model.hidden_states(params, {k: v for k, v in one.items() if k != "last_positions"})
    logits = (hidden @ model.head(params).T)[0, int(one["last_positions"][0, 0])]
    expected = np.asarray(jax.nn.softmax(logits / 2.0)) * counts.sum()
    big = expected > 5
    chi2 = ((counts - expected)[big] ** 2 / expected[big]).sum()
    # 99.9 % quantile of chi-square is below 2 * df + 20 for these df.
    assert chi2 < 2 * big.sum() + 20


@pytest.mark.parametrize(
    "settings, words",
    [({"max_new_tokens": 0, "eos_ids": [2]}, "max_new_tokens"),
     ({"max_new_tokens": 4, "eos_ids": []}, "eos_ids")],
)  # fmt: skip
def test_impossible_settings_are_refused(llava, settings, words):
    with pytest.raises(ConfigError, match=words):
        make_sampler(llava[0], **settings)
