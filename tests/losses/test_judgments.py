"""CUT and D2O against their equations written again in numpy float64."""

import jax
import jax.numpy as jnp
import numpy as np

from aa_jax import losses
from aa_jax.losses.judgments import inappropriate_tokens

RNG = np.random.default_rng(0)
MASK = np.array([[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0]], np.float32)
JUDGED = np.log(RNG.uniform(0.05, 0.9, (3, 4)))
PLAIN = np.log(RNG.uniform(0.05, 0.9, (3, 4)))
NEGATIVE = np.array([1.0, 0.0, 1.0], np.float32)


def f32(*arrays):
    return [jnp.asarray(x, jnp.float32) for x in arrays]


def cut(judged, plain, wrong, alpha=0.1, gamma=0.0):
    likelihood = -judged[MASK > 0].mean()
    terms = []
    for row, column in zip(*np.nonzero(MASK * NEGATIVE[:, None]), strict=True):
        p = np.exp(plain[row, column])
        terms.append(-alpha * p**gamma * np.log(1 - p) if wrong[row, column] else -np.log(p))
    return likelihood + np.mean(terms)


def test_cut_by_hand():
    wrong = np.exp(JUDGED) > 1.1 * np.exp(PLAIN)
    assert wrong.any() and not wrong.all()
    inputs = f32(JUDGED, PLAIN, MASK, NEGATIVE)
    loss, metrics = losses.cut_loss(*inputs)
    np.testing.assert_allclose(loss, cut(JUDGED, PLAIN, wrong), rtol=1e-5)
    faulty = MASK * NEGATIVE[:, None]
    share = (wrong * faulty).sum() / faulty.sum()
    np.testing.assert_allclose(metrics["inappropriate"].mean, share, rtol=1e-6)
    loss = losses.cut_loss(*inputs, unlikelihood_weight=0.5, focus=2.0)[0]
    np.testing.assert_allclose(loss, cut(JUDGED, PLAIN, wrong, 0.5, 2.0), rtol=1e-5)
    marked = np.zeros((3, 4))
    marked[0, 1] = marked[2, 0] = 1
    loss = losses.cut_loss(*inputs, spans=jnp.asarray(marked, jnp.float32))[0]
    np.testing.assert_allclose(loss, cut(JUDGED, PLAIN, marked), rtol=1e-5)


def test_cut_without_faults_is_likelihood_and_pushes_wrong_tokens_down():
    judged, plain, mask, negative = f32(JUDGED, PLAIN, MASK, NEGATIVE)
    loss, metrics = losses.cut_loss(judged, plain, mask, 0 * negative)
    np.testing.assert_allclose(loss, -JUDGED[MASK > 0].mean(), rtol=1e-6)
    assert metrics["contrast"].count == 0
    wrong = np.asarray(inappropriate_tokens(judged, plain, mask * negative[:, None]))

    @jax.jit
    @jax.grad
    def slope(plain):
        return losses.cut_loss(judged, plain, mask, negative)[0]

    grad = np.asarray(slope(jnp.where(mask > 0, plain, jnp.nan)))
    assert (grad[wrong > 0] > 0).all()  # descent lowers their log-probs
    rest = (MASK * NEGATIVE[:, None] > 0) & (wrong == 0)
    assert (grad[rest] < 0).all() and (grad[MASK * NEGATIVE[:, None] == 0] == 0).all()
    certain = jnp.zeros_like(plain)  # a wrong token of probability one
    marked = losses.cut_loss(judged, certain, mask, negative, spans=jnp.ones_like(mask))[0]
    assert np.isfinite(marked)


def test_d2o_by_hand_and_its_limit():
    own, own_ref = RNG.normal(-9, 2, (2, 3, 4))
    bad, bad_ref = RNG.normal(-9, 2, (2, 3))
    own_mask = np.array([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]])
    mean = ((own - own_ref) * own_mask).sum(1) / own_mask.sum(1)
    want = np.log1p(np.exp(-(0.3 * mean - 0.2 * (bad - bad_ref))))
    inputs = f32(own, own_ref, own_mask, bad, bad_ref, np.array([1, 1, 0]))
    loss, metrics = losses.d2o_loss(*inputs, beta=0.3, alpha=0.2)
    np.testing.assert_allclose(loss, want[:2].mean(), rtol=1e-6)
    np.testing.assert_allclose(metrics["chosen_rewards"].mean, 0.3 * mean[:2].mean(), rtol=1e-5)
    # One own response, one reference, α = β: DPO with the own response chosen.
    single = f32(own[:, :1], own_ref[:, :1], np.ones((3, 1)), bad, bad_ref, np.ones(3))
    both = (jnp.stack([a[:, 0], b], 1) for a, b in ((single[0], single[3]), (single[1], single[4])))
    pairs = losses.pair_up(*both, jnp.ones((3, 2)), jnp.ones((3, 2)))
    np.testing.assert_allclose(
        losses.d2o_loss(*single)[0], losses.preference_loss(pairs)[0], rtol=1e-6
    )
    extreme = jax.grad(lambda x: losses.d2o_loss(1e4 * x, *inputs[1:])[0])(inputs[0])
    assert np.isfinite(extreme).all()
