"""The draw against the distribution itself."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aa_jax.sampling.draw import draw


def keys(count, seed=0):
    return jax.random.split(jax.random.key(seed), count)


@pytest.mark.parametrize("vocab", [2, 37, 128, 129, 1000])
def test_frequencies(vocab):
    """Chi-square against softmax, tokens of every block and both sides of a block's edge."""
    rng = np.random.default_rng(vocab)
    logits = (2 * rng.normal(size=vocab)).astype(np.float32)
    n = 40_000
    tokens = np.asarray(jax.jit(draw)(keys(n, vocab), jnp.tile(logits, (n, 1))))
    expected = n * np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
    counts = np.bincount(tokens, minlength=vocab)
    big = expected > 5
    rest = counts[~big].sum() - expected[~big].sum()
    chi2 = ((counts - expected)[big] ** 2 / expected[big]).sum()
    # Above the 99.99 % quantile for these degrees of freedom.
    assert chi2 < big.sum() + 5.5 * np.sqrt(2 * big.sum()) + 10
    assert abs(rest) < 6 * np.sqrt(expected[~big].sum() + 1)


def test_a_token_without_mass_is_never_drawn():
    rng = np.random.default_rng(0)
    logits = np.full((4000, 700), -np.inf, np.float32)
    allowed = [np.sort(rng.choice(700, rng.integers(1, 5), replace=False)) for _ in logits]
    for row, some in enumerate(allowed):
        logits[row, some] = rng.normal(size=len(some)) * 20
    tokens = np.asarray(draw(keys(len(logits)), jnp.asarray(logits)))
    assert all(token in some for token, some in zip(tokens, allowed, strict=True))


def test_the_ends_of_the_unit_interval(monkeypatch):
    """The smallest and the largest uniform number give the first and the last token with mass."""
    logits = jnp.asarray(np.random.default_rng(1).normal(size=(1, 32_001)).astype(np.float32))
    logits = logits.at[:, :3].set(-jnp.inf).at[:, -5:].set(-jnp.inf)
    for value, token in ((0.0, 3), (1 - 2**-24, 32_001 - 6), (1.0, 32_001 - 6)):
        monkeypatch.setattr(jax.random, "uniform", lambda key, v=value: jnp.float32(v))
        assert int(draw(keys(1), logits)[0]) == token


@pytest.mark.parametrize("scale", [0.0, 1e4])
def test_flat_and_certain_distributions(scale):
    logits = scale * jnp.asarray(np.random.default_rng(2).normal(size=(200, 300)), jnp.float32)
    tokens = np.asarray(draw(keys(200), logits))
    if scale:
        np.testing.assert_array_equal(tokens, np.argmax(logits, axis=-1))
    else:
        assert len(np.unique(tokens)) > 130 and tokens.min() >= 0 and tokens.max() < 300


def test_a_row_does_not_depend_on_its_neighbours():
    logits = jnp.asarray(np.random.default_rng(3).normal(size=(9, 500)), jnp.float32)
    alone = [int(draw(keys(9)[i : i + 1], logits[i : i + 1])[0]) for i in range(9)]
    np.testing.assert_array_equal(draw(keys(9), logits), alone)
