"""What must hold for every family: heads that do not see padding, rows that may be shared."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aa_jax import models
from aa_jax.models import heads
from aa_jax.sampling import generate, make_sampler

FAMILIES = ("llama", "qwen2", "qwen3", "llava", "qwen2_vl", "qwen2_5_vl")


@pytest.fixture(scope="module")
def vl():
    import importlib.util
    from pathlib import Path

    path = Path(__file__).with_name("vl_world.py")
    spec = importlib.util.spec_from_file_location("vl_world", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def make(family, world, vl):
    """A model, parameters large enough to matter, and two rows of unequal length."""
    if "vl" in family:
        config = vl.config(world, family)
        rows = [[2, ("image", 1, 4, 6), 3], [1, ("video", 2, 2, 4), 2, ("image", 1, 2, 2), 1]]
        batch = vl.batch(config, rows, 14)
    elif family == "llava":
        config = world.llava_config()
        batch = world.image_batch(config, [13, 8], 14, [2, 1])
    else:
        config = getattr(world, family + "_config")()
        batch = world.text_batch([13, 8], 14)
    model = models.build(config)
    params = jax.tree.map(lambda x: 5 * x, jax.jit(model.init)(jax.random.key(0)))
    head = heads.init_score_head(model, jax.random.key(1))
    batch["target_positions"] = np.array([[[3, 7, 12]], [[2, 5, 7]]], np.int32)
    return model, {"model": params, "score_head": head}, batch


def padded(batch, left, right):
    """The same rows with padding tokens before and behind them."""
    out = dict(batch)
    for key, fill in (("tokens", 9), ("positions", 0), ("intervals", 0), ("feature_index", -1)):
        if key in batch:
            pad = [(0, 0), (left, right)] + [(0, 0)] * (batch[key].ndim - 2)
            out[key] = np.pad(batch[key], pad, constant_values=fill)
    seen = out["intervals"][..., 3:] > 0
    out["intervals"] = np.where(seen, out["intervals"] + np.array([0, 0, left, left]), 0)
    out["intervals"] = out["intervals"].astype(np.int32)
    for key in ("last_positions", "target_positions"):
        out[key] = batch[key] + left
    return out


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_and_values_do_not_see_padding(family, world, vl):
    """Five more tokens behind the rows, or three before and two behind: the same to 1e-5."""
    model, params, batch = make(family, world, vl)

    @jax.jit
    def read(params, batch):
        return heads.score(model, params, batch), heads.values(model, params, batch)

    expected = read(params, batch)
    assert float(jnp.std(expected[1])) > 0.1  # the head tells positions apart
    for left, right in ((0, 5), (3, 2)):
        got = read(params, padded(batch, left, right))
        for ours, theirs in zip(got, expected, strict=True):
            np.testing.assert_allclose(ours, theirs, atol=1e-5)


@pytest.mark.parametrize("family", ["qwen3", "qwen2_5_vl"])
def test_rows_do_not_see_each_other(family, world, vl):
    """A row alone gives what it gives beside another one."""
    model, params, batch = make(family, world, vl)
    score = jax.jit(lambda p, b: heads.score(model, p, b))
    both = score(params, batch)
    for row in range(2):
        alone = jax.tree.map(lambda x, row=row: x[row : row + 1], batch)
        np.testing.assert_allclose(score(params, alone)[0], both[row], atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_text_needs_no_cache(family, world, vl):
    """64 tokens decoded with a cache are the most likely ones of one pass over prompt and text."""
    model, params, batch = make(family, world, vl)
    params, last = params["model"], batch["last_positions"][:, 0]
    sampler = make_sampler(model, max_new_tokens=64, eos_ids=[10**6], temperature=0.0)
    inputs = {k: x for k, x in batch.items() if k != "target_positions"}
    written = generate(sampler, params, inputs, np.zeros(2, np.uint32)).tokens
    whole = padded(batch, 0, 64)
    for row, start in enumerate(last + 1):
        where = slice(start, start + 64)
        after = int(batch["positions"][row].max()) + 1 + np.arange(64)
        whole["tokens"][row, where] = written[row]
        whole["positions"][row, where] = after if whole["positions"].ndim == 2 else after[:, None]
        whole["intervals"][row, where, 3] = np.arange(start, start + 64) + 1
    logits = np.asarray(world.logits(model, params, whole))
    for row, start in enumerate(last):
        np.testing.assert_array_equal(logits[row, start : start + 64].argmax(-1), written[row])
