"""Advantages: published worked numbers, and loops over single tokens in numpy float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aa_jax import losses
from aa_jax.errors import ConfigError
from aa_jax.losses.advantages import last_tokens
from aa_jax.losses.groups import reinforce_plus_plus_baseline

RNG = np.random.default_rng(0)


def f32(*arrays):
    return [jnp.asarray(x, jnp.float32) for x in arrays]


def row(*values):
    return jnp.array([values], jnp.float32)


ONES = row(1, 1, 1)


def test_kl_shaped_rewards_and_gae_worked_example():
    """Log-ratios (0.1, -0.2, 0.3), c = 0.02, score 2; V = (0.5, 0.4, 0.3), γ = 1, λ = 0.95."""
    logps, ref = row(-1.0, -1.0, -1.0), row(-1.1, -0.8, -1.3)
    rewards = losses.shaped_rewards(logps, ref, jnp.array([2.0]), ONES, kl_coef=0.02)
    np.testing.assert_allclose(rewards[0], [-0.002, 0.004, 1.994], atol=1e-6)
    clipped = losses.shaped_rewards(
        logps, ref, jnp.array([100.0]), ONES, kl_coef=0.02, reward_clip=50.0
    )
    assert clipped[0, 2] == 50
    advantages, returns = losses.gae(rewards, row(0.5, 0.4, 0.3), ONES)
    np.testing.assert_allclose(advantages[0], [1.335635, 1.5133, 1.694], atol=1e-6)
    np.testing.assert_allclose(returns[0], [1.835635, 1.9133, 1.994], atol=1e-6)


def test_estimators_worked_example():
    """log π = -1, log π_ref = -1.5."""
    one = jnp.array([-1.0]), jnp.array([-1.5])
    found = {name: float(losses.kl_estimate(*one, name)[0]) for name in ("k1", "k2", "k3", "abs")}
    assert found == pytest.approx({"k1": 0.5, "k2": 0.125, "k3": 0.10653, "abs": 0.5}, abs=1e-5)
    np.testing.assert_allclose(
        losses.kl_estimate(jnp.array([0.0]), jnp.array([0.1]), "k3"), 0.005171, atol=1e-6
    )
    far = jnp.array([1e4, -1e4, 0.0])
    for name in ("k1", "k2", "k3", "abs"):
        value = jax.grad(lambda x, name=name: losses.kl_estimate(x, 0 * x, name).sum())(far)
        assert np.isfinite(value).all(), name
    assert (losses.kl_estimate(far, 0 * far, "k3") >= 0).all()
    with pytest.raises(ConfigError, match="no KL estimator 'k4'"):
        losses.kl_estimate(far, far, "k4")


def test_scores_stand_at_the_end_token_whatever_the_padding_holds():
    mask = jnp.array([[1.0, 1.0, 0.0, 0.0], [0.0, 1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 0.0]])
    np.testing.assert_array_equal(last_tokens(mask), [[0, 1, 0, 0], [0, 0, 0, 1], [0, 0, 0, 0]])
    dirty = jnp.where(mask > 0, -1.0, jnp.nan)
    scores = jnp.array([3.0, 9.0, jnp.nan])
    rewards = losses.shaped_rewards(dirty, dirty - 0.5, scores, mask, kl_coef=0.1, score_clip=5.0)
    want = [[-0.05, 2.95, 0, 0], [0, -0.05, -0.05, 4.95], [0, 0, 0, 0]]
    np.testing.assert_allclose(rewards, want, atol=1e-6)


def slow_gae(rewards, values, mask, gamma, lam, bootstrap=0.0):
    out = np.zeros_like(rewards)
    for b in range(len(rewards)):
        after_value, after = bootstrap, 0.0
        for t in reversed(np.flatnonzero(mask[b])):
            delta = rewards[b, t] + gamma * after_value - values[b, t]
            after = delta + gamma * lam * after
            after_value = values[b, t]
            out[b, t] = after
    return out


def test_gae_skips_tokens_that_are_not_the_policys():
    rewards, values = RNG.normal(size=(2, 4, 9))
    mask = (RNG.random((4, 9)) < 0.6).astype(np.float64)
    dirty = [np.where(mask > 0, x, np.nan) for x in (rewards, values)]
    run = jax.jit(losses.gae, static_argnames=("gamma", "lam"))
    advantages, returns = run(*f32(*dirty, mask), gamma=0.9, lam=0.8)
    want = slow_gae(rewards, values, mask, 0.9, 0.8)
    np.testing.assert_allclose(advantages, want, atol=1e-5)
    np.testing.assert_allclose(returns, (want + values) * mask, atol=1e-5)
    # The same tokens without gaps.
    for b in range(4):
        at = np.flatnonzero(mask[b])
        alone = run(*f32(*(x[b : b + 1, at] for x in (rewards, values, mask))), gamma=0.9, lam=0.8)
        np.testing.assert_allclose(alone[0][0], advantages[b, at], atol=1e-6)
    ends = losses.gae(*f32(rewards, values, mask), gamma=0.9, bootstrap=jnp.full(4, 2.0))[0]
    np.testing.assert_allclose(ends, slow_gae(rewards, values, mask, 0.9, 0.95, 2.0), atol=1e-5)


def test_gae_without_discount_returns_the_total_reward():
    """RAGEN: r = (0,0,0,0,0,1), V = (.2,.3,0,0,.5,.6), two environment tokens in between."""
    mask, values = row(1, 1, 0, 0, 1, 1), row(0.2, 0.3, 7, 7, 0.5, 0.6)
    advantages, returns = losses.gae(row(0, 0, 0, 0, 0, 1), values, mask, lam=1.0)
    np.testing.assert_allclose(advantages[0], [0.8, 0.7, 0, 0, 0.5, 0.4], atol=1e-6)
    np.testing.assert_allclose(returns[0], [1, 1, 0, 0, 1, 1], atol=1e-6)


def test_bilevel_gae_golden_vector():
    """RAGEN: reward 1 at 4 and 9, V = 0.1..1.0, γ = λ = 1, turn discount 0.95."""
    rewards, values = row(0, 0, 0, 0, 1, 0, 0, 0, 0, 1), row(*np.arange(1, 11) / 10)
    ones = jnp.ones_like(rewards)
    advantages, returns = losses.bilevel_gae(rewards, values, ones, rewards)
    want = [1.85, 1.75, 1.65, 1.55, 1.45, 0.4, 0.3, 0.2, 0.1, 0.0]
    np.testing.assert_allclose(advantages[0], want, atol=1e-5)
    np.testing.assert_allclose(returns[0], [1.95] * 5 + [1.0] * 5, atol=1e-5)
    white = [1.188, 1.0596, 0.9311, 0.8027, 0.6743]
    white += [-x for x in reversed(white)]
    np.testing.assert_allclose(losses.whiten(advantages, ones)[0], white, atol=2e-4)
    # Rewards anywhere in a turn count at its end, and a turn without reward is still a turn.
    early = losses.bilevel_gae(row(0, 1, 0, 0, 0, 0, 1, 0, 0, 0), values, ones, rewards)
    np.testing.assert_allclose(early[0], advantages, atol=1e-5)


def test_one_turn_is_plain_gae_with_gaps():
    values, mask = f32(RNG.normal(size=(3, 7)), RNG.random((3, 7)) < 0.7)
    mask = mask.at[:, 2].set(1.0)
    end = last_tokens(mask).astype(jnp.float32)
    rewards = 3.0 * end
    got = losses.bilevel_gae(rewards, values, mask, end, gamma=0.9, lam=0.8)
    want = losses.gae(rewards, values, mask, gamma=0.9, lam=0.8)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_whitening():
    got = losses.whiten(row(1, 2, 3), row(1, 1, 0))
    np.testing.assert_allclose(got[0], [-0.7071, 0.7071, 2.1213], atol=1e-4)
    x = RNG.normal(2, 3, (4, 5))
    mask = (RNG.random((4, 5)) < 0.6).astype(np.float32)
    white = np.asarray(losses.whiten(*f32(x, mask)))[mask > 0]
    assert white.mean() == pytest.approx(0, abs=1e-6)
    assert white.std(ddof=1) == pytest.approx(1, rel=1e-5)
    kept = np.asarray(losses.whiten(*f32(x, mask), shift_mean=False))[mask > 0]
    assert kept.mean() == pytest.approx(x[mask > 0].mean(), rel=1e-5)
    for few in (row(0, 0, 0), row(0, 1, 0)):
        assert np.isfinite(losses.whiten(row(1, 2, 3), few)).all()


def test_group_advantages_worked_examples():
    found = losses.group_advantages(row(1, 2, 3, 4))
    np.testing.assert_allclose(found[0], [-1.161805, -0.387268, 0.387268, 1.161805], atol=1e-6)
    found = losses.group_advantages(row(1, 2, 3, 6), eps=1e-9)
    np.testing.assert_allclose(found[0], [-0.925820, -0.462910, 0, 1.388730], atol=1e-6)
    found = losses.group_advantages(row(1, 0, 0, 0), eps=1e-6)
    np.testing.assert_allclose(found[0], [1.5, -0.5, -0.5, -0.5], atol=1e-5)
    single = losses.group_advantages(row(1, *[0] * 15), eps=1e-6)
    np.testing.assert_allclose(single[0, 0], 3.75, atol=1e-4)
    bounded = losses.group_advantages(row(1, *[0] * 15), eps=1e-6, clip=(-1.0, 3.0))
    assert bounded[0, 0] == 3 and bounded[0, 1] == single[0, 1]
    for scale in ("group", "batch", "none"):
        assert (losses.group_advantages(row(0.1, 0.1, 0.1), scale=scale) == 0).all()
    np.testing.assert_allclose(
        losses.leave_one_out(row(1, 2, 3, 6))[0], [-2.666667, -1.333333, 0, 4], atol=1e-6
    )


def test_groups_ignore_what_is_masked():
    rewards = RNG.normal(size=(3, 5))
    mask = np.ones((3, 5))
    mask[0, 3:] = mask[1, 1:] = 0  # three, one and five responses
    dirty, there = f32(np.where(mask > 0, rewards, np.nan), mask)
    group, free, rest = (
        np.asarray(x)
        for x in (
            losses.group_advantages(dirty, there),
            losses.group_advantages(dirty, there, scale="none"),
            losses.leave_one_out(dirty, there),
        )
    )
    three = rewards[0, :3]
    centred = three - three.mean()
    np.testing.assert_allclose(group[0, :3], centred / (three.std(ddof=1) + 1e-4), rtol=1e-4)
    np.testing.assert_allclose(free[0, :3], centred, atol=1e-6)
    # A leave-one-out baseline stretches the deviation from the mean by G / (G - 1).
    np.testing.assert_allclose(rest[0, :3], centred * 3 / 2, atol=1e-6)
    for x in (group, free, rest):
        assert (x[mask == 0] == 0).all() and x[1, 0] == 0
    whole = rewards[mask > 0]
    batch = losses.group_advantages(dirty, there, scale="batch")
    np.testing.assert_allclose(batch[0, :3], centred / (whole.std(ddof=1) + 1e-4), rtol=1e-4)
    with pytest.raises(ConfigError, match="no scale 'std'"):
        losses.group_advantages(dirty, scale="std")


def test_reinforce_plus_plus():
    rewards = RNG.normal(size=(3, 6))
    mask = (RNG.random((3, 6)) < 0.7).astype(np.float64)
    returns = np.zeros((3, 6))
    for b in range(3):
        total = 0.0
        for t in reversed(np.flatnonzero(mask[b])):
            total = rewards[b, t] + 0.9 * total
            returns[b, t] = total
    seen = returns[mask > 0]
    want = (returns - seen.mean()) / seen.std(ddof=1) * mask
    dirty, there = f32(np.where(mask > 0, rewards, np.nan), mask)
    got = losses.reinforce_plus_plus(dirty, there, gamma=0.9)
    np.testing.assert_allclose(got, want, atol=1e-5)
    scores = RNG.normal(size=(2, 4))
    centred = scores - scores.mean(1, keepdims=True)
    got = reinforce_plus_plus_baseline(*f32(scores))
    np.testing.assert_allclose(got, centred / centred.std(ddof=1), rtol=1e-4)
