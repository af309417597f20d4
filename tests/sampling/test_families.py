"""Slots against the trainer's own pass, in every family of text and of images as tokens.

Qwen2-VL and Qwen2-Audio, which need a processor, are in tests/rl/test_media.py; LLaVA in
test_generate.py and test_slots.py.
"""

import jax
import numpy as np
import pytest

from aa_jax import models, objectives
from aa_jax.sampling import Choice, SlotSampler
from aa_jax.sharding import make_mesh

VOCAB, WIDTH, NEW, EACH, CODES = 60, 9, 8, 3, 20
BASE = {
    "vocab_size": VOCAB, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip


def letters(code):
    return "IMGIMG" + str(code).translate(str.maketrans("0123456789", "ABCDEFGHIJ")) + "Z"


CONFIGS = {
    "llama": {"architectures": ["LlamaForCausalLM"], "model_type": "llama"},
    "qwen2": {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"},
    "qwen3": {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "head_dim": 6},
    "chameleon": {
        "architectures": ["ChameleonForConditionalGeneration"], "model_type": "chameleon",
        "vocabulary_map": {"<image>": 5, "<racm3:break>": 3, "<eoss>": 4,
                           **{letters(code): 40 + code for code in range(CODES)}},
        "vq_config": {"embed_dim": 6, "num_embeddings": CODES, "latent_channels": 8,
                      "resolution": 8, "base_channels": 32, "channel_multiplier": [1, 1],
                      "num_res_blocks": 1},
    },
}  # fmt: skip


@pytest.mark.parametrize("family", CONFIGS)
def test_log_probs_are_the_trainers(family):
    model = models.build(BASE | CONFIGS[family])
    params = jax.tree.map(lambda x: 4 * x, model.init(jax.random.key(0)))
    rng = np.random.default_rng(0)
    lengths = np.array([9, 5, 7, 6, 3])
    rows = len(lengths)
    tokens = rng.integers(6, VOCAB, (rows, WIDTH)).astype(np.int32)
    steps = np.arange(WIDTH, dtype=np.int32)
    real = steps < lengths[:, None]
    intervals = np.zeros((rows, WIDTH, 4), np.int32)
    intervals[..., 3] = np.where(real, steps + 1, 0)
    batch = {
        "tokens": np.where(real, tokens, 0), "positions": np.where(real, steps, 0),
        "intervals": intervals, "last_positions": lengths[:, None].astype(np.int32) - 1,
    }  # fmt: skip
    sampler = SlotSampler(
        model, make_mesh(devices=jax.devices()[:1]), slots=2, lanes=2, samples=EACH,
        max_new_tokens=NEW, eos_ids=[2, 50, 51], choice=Choice(0.8, top_p=0.95),
    )  # fmt: skip

    def some(indices, count):
        where = np.concatenate([indices, np.zeros(count - len(indices), int)])
        return jax.tree.map(lambda x: x[where], batch)

    seeds = np.arange(rows * EACH, dtype=np.uint32).reshape(rows, EACH)
    found = sampler.run(params, rows, some, seeds)
    assert len({len(sample.tokens) for group in found for sample in group}) > 2
    # One row `prompt | response` each, without a cache.
    flat = [(row, sample) for row, group in enumerate(found) for sample in group]
    size = WIDTH + NEW
    whole = {
        "tokens": np.zeros((len(flat), size), np.int32),
        "positions": np.tile(np.arange(size, dtype=np.int32), (len(flat), 1)),
        "intervals": np.zeros((len(flat), size, 4), np.int32),
        "target_positions": np.zeros((len(flat), 1, NEW), np.int32),
        "targets": np.zeros((len(flat), 1, NEW), np.int32),
        "loss_mask": np.zeros((len(flat), 1, NEW), np.float32),
    }
    for i, (row, sample) in enumerate(flat):
        start, count = lengths[row], len(sample.tokens)
        whole["tokens"][i, :start] = tokens[row, :start]
        whole["tokens"][i, start : start + count] = sample.tokens
        whole["intervals"][i, : start + count, 3] = np.arange(start + count) + 1
        whole["target_positions"][i, 0, :count] = start - 1 + np.arange(count)
        whole["targets"][i, 0, :count] = sample.tokens
        whole["loss_mask"][i, 0, :count] = 1
    scored = objectives.token_logps(model, params, whole, temperature=0.8).logps
    for i, (_, sample) in enumerate(flat):
        np.testing.assert_allclose(scored[i, 0, : len(sample.logps)], sample.logps, atol=1e-4)
