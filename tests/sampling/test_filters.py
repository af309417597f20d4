import jax.numpy as jnp
import numpy as np
import pytest
from transformers import TopKLogitsWarper, TopPLogitsWarper

from aa_jax.errors import ConfigError
from aa_jax.sampling.filters import check_sampling, filter_logits


@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.9, 0.999])
def test_nucleus_keeps_the_tokens_transformers_keeps(top_p):
    import torch

    logits = np.random.default_rng(0).normal(0, 2, (16, 50)).astype(np.float32)
    ours = np.isfinite(np.asarray(filter_logits(jnp.asarray(logits), top_p=top_p)))
    theirs = np.isfinite(TopPLogitsWarper(top_p)(None, torch.tensor(logits)).numpy())
    np.testing.assert_array_equal(ours, theirs)


def test_top_k_keeps_the_tokens_transformers_keeps():
    import torch

    logits = np.random.default_rng(1).normal(0, 2, (8, 30)).astype(np.float32)
    ours = np.isfinite(np.asarray(filter_logits(jnp.asarray(logits), top_k=7)))
    theirs = np.isfinite(TopKLogitsWarper(7)(None, torch.tensor(logits)).numpy())
    np.testing.assert_array_equal(ours, theirs)


def test_the_token_that_crosses_the_threshold_is_kept():
    logits = jnp.log(jnp.array([[0.5, 0.3, 0.15, 0.05]]))
    kept = jnp.isfinite(filter_logits(logits, top_p=0.6))
    np.testing.assert_array_equal(kept, [[True, True, False, False]])


@pytest.mark.parametrize(
    "settings, words",
    [((-1.0, 1.0, 0), "temperature"), ((1.0, 0.0, 0), "top_p"), ((1.0, 1.0, -2), "top_k")],
)
def test_settings_outside_their_range_are_refused(settings, words):
    with pytest.raises(ConfigError, match=words):
        check_sampling(*settings)
