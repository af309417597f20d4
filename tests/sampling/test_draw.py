"""The draw against the distribution itself."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats

from aa_jax.sampling.draw import draw, uniforms


def numbers(count, seed=0):
    return jax.random.uniform(jax.random.key(seed), count)


@pytest.mark.parametrize("vocab", [2, 37, 128, 129, 1000])
def test_frequencies(vocab):
    """Chi-square against softmax, tokens of every block and both sides of a block's edge."""
    rng = np.random.default_rng(vocab)
    logits = (2 * rng.normal(size=vocab)).astype(np.float32)
    n = 40_000
    tokens = np.asarray(jax.jit(draw)(numbers(n, vocab), jnp.tile(logits, (n, 1)))[0])
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
    tokens = np.asarray(draw(numbers(len(logits)), jnp.asarray(logits))[0])
    assert all(token in some for token, some in zip(tokens, allowed, strict=True))


def test_the_ends_of_the_unit_interval():
    """The smallest and the largest uniform number give the first and the last token with mass."""
    logits = jnp.asarray(np.random.default_rng(1).normal(size=(1, 32_001)).astype(np.float32))
    logits = logits.at[:, :3].set(-jnp.inf).at[:, -5:].set(-jnp.inf)
    for value, token in ((0.0, 3), (1 - 2**-24, 32_001 - 6), (1.0, 32_001 - 6)):
        assert int(draw(jnp.array([value], jnp.float32), logits)[0][0]) == token


@pytest.mark.parametrize("scale", [0.0, 1e4])
def test_flat_and_certain_distributions(scale):
    logits = scale * jnp.asarray(np.random.default_rng(2).normal(size=(200, 300)), jnp.float32)
    tokens = np.asarray(draw(numbers(200), logits)[0])
    if scale:
        np.testing.assert_array_equal(tokens, np.argmax(logits, axis=-1))
    else:
        assert len(np.unique(tokens)) > 130 and tokens.min() >= 0 and tokens.max() < 300


def test_a_row_does_not_depend_on_its_neighbours():
    logits = jnp.asarray(np.random.default_rng(3).normal(size=(9, 500)), jnp.float32)
    alone = [int(draw(numbers(9)[i : i + 1], logits[i : i + 1])[0][0]) for i in range(9)]
    np.testing.assert_array_equal(draw(numbers(9), logits)[0], alone)


@pytest.mark.parametrize("vocab", [37, 128, 50_000])
def test_the_sum_is_scipys(vocab):
    logits = (5 * np.random.default_rng(4).normal(size=(6, vocab))).astype(np.float32)
    logits[2, 1:] = -np.inf
    expected = scipy.special.logsumexp(logits.astype(np.float64), axis=-1)
    np.testing.assert_allclose(draw(numbers(6), jnp.asarray(logits))[1], expected, rtol=2e-6)


def test_a_seed_has_its_own_numbers():
    """A longer or differently shaped request changes none of them; they fill the unit interval."""
    seeds = jnp.asarray([[3, 2**32 - 1], [7, 3]], jnp.uint32)
    found = uniforms(seeds, 500)
    assert found.shape == (2, 2, 500)
    np.testing.assert_array_equal(found[1, 1], found[0, 0])
    np.testing.assert_array_equal(uniforms(seeds[1], 20), found[1, :, :20])
    drawn = np.concatenate([found[0, 0], found[0, 1], found[1, 0]])
    assert scipy.stats.kstest(drawn, "uniform").pvalue > 1e-3
    assert len(np.unique(drawn)) > 1490
