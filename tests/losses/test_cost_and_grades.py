"""Cost models and graded labels: worked numbers and closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
from scipy.special import expit
from scipy.stats import logistic

from aa_jax import losses
from aa_jax.losses.ordinal import ordered_thresholds, ordinal_logps


def f32(*arrays):
    return [jnp.asarray(x, jnp.float32) for x in arrays]


def test_cost_model_worked_example():
    """c_w = 1 (unsafe), c_l = -0.5 (safe): 0.313262 + 0.474077 + 0.201413."""
    one = f32([1.0], [-0.5], [1.0], [-1.0], [1.0])
    loss, metrics = losses.cost_loss(*one)
    np.testing.assert_allclose(loss, 0.988752, atol=1e-6)
    assert metrics["sign_accuracy"].mean == 1 and metrics["accuracy"].mean == 1
    np.testing.assert_allclose(losses.cost_loss(*one, sign_coef=0.0)[0], 0.201413, atol=1e-6)
    more = losses.cost_loss(*one, regularization=0.1)[0]
    np.testing.assert_allclose(more, 0.988752 + 0.1 * (1 + 0.25) / 2, atol=1e-6)


def test_graded_signs_weigh_severity_and_padding_is_ignored():
    worse, better, high, low = np.random.default_rng(0).normal(size=(4, 5)) * 2
    mask = np.array([1.0, 1.0, 0.0, 1.0, 1.0])
    terms = np.log1p(np.exp(-(worse - better)))
    terms += np.log1p(np.exp(-high * worse)) + np.log1p(np.exp(-low * better))
    dirty = np.where(mask > 0, worse, np.nan)
    inputs = f32(dirty, better, high, low, mask)
    run = jax.jit(jax.value_and_grad(lambda x: losses.cost_loss(x, *inputs[1:])[0]))
    loss, grad = run(inputs[0])
    np.testing.assert_allclose(loss, terms[mask > 0].mean(), rtol=1e-6)
    assert np.isfinite(grad).all() and grad[2] == 0
    _, extreme = run(1e4 * inputs[1])
    assert np.isfinite(extreme).all()


def test_grades_are_a_logistic_variable_cut_at_thresholds():
    thresholds = np.array([-1.5, 0.2, 1.0])
    scores = np.array([-3.0, 0.0, 0.4, 5.0])
    edges = np.concatenate([[-np.inf], thresholds, [np.inf]])
    want = np.diff(logistic.cdf(edges[None] - scores[:, None]), axis=1)
    got = ordinal_logps(*f32(scores, thresholds))
    np.testing.assert_allclose(np.exp(got), want, rtol=1e-5)
    np.testing.assert_allclose(np.exp(got).sum(1), 1, rtol=1e-6)


def test_ordinal_loss_by_hand():
    raw = np.array([[-1.0, 0.0, 0.5], [0.0, -2.0, 1.0]])
    steps = np.log1p(np.exp(raw[:, 1:]))
    thresholds = np.cumsum(np.concatenate([raw[:, :1], steps], 1), 1)
    np.testing.assert_allclose(
        ordered_thresholds(jnp.asarray(raw, jnp.float32)), thresholds, rtol=1e-6
    )
    rng = np.random.default_rng(0)
    scores, grades = rng.normal(size=(6, 2)) * 2, rng.integers(0, 4, (6, 2))
    mask = (rng.random((6, 2)) < 0.7).astype(np.float32)
    total = 0.0
    for n, d in zip(*np.nonzero(mask), strict=True):
        edges = np.concatenate([[-np.inf], thresholds[d], [np.inf]])
        k = grades[n, d]
        total -= np.log(expit(edges[k + 1] - scores[n, d]) - expit(edges[k] - scores[n, d]))
    dirty = jnp.asarray(np.where(mask > 0, scores, np.nan), jnp.float32)
    grades = jnp.asarray(np.where(mask > 0, grades, -7), jnp.int32)
    cuts = jnp.asarray(thresholds, jnp.float32)

    @jax.jit
    def run(scores, cuts):
        return losses.ordinal_loss(scores, grades, cuts, jnp.asarray(mask))

    loss, metrics = run(dirty, cuts)
    np.testing.assert_allclose(loss, total / mask.sum(), rtol=1e-5)
    assert metrics["loss"].count == mask.sum()
    grad = jax.jit(jax.grad(lambda s: run(s, cuts)[0]))
    assert np.isfinite(grad(dirty)).all() and np.isfinite(grad(1e4 * jnp.ones((6, 2)))).all()


def test_higher_grades_pull_the_score_up():
    cuts = jnp.array([[-1.0, 0.0, 1.0]])

    def slope(grade):
        loss = lambda s: losses.ordinal_loss(s, grade, cuts, jnp.ones((1, 1)))[0]  # noqa: E731
        return jax.grad(loss)(jnp.zeros((1, 1)))[0, 0]

    slopes = [float(slope(jnp.array([[grade]]))) for grade in range(4)]
    assert slopes == sorted(slopes, reverse=True) and slopes[0] > 0 > slopes[3]
