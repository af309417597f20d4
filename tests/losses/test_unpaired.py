"""KTO and its relatives: worked numbers, the KL estimate, padding, and BCO's running shift."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aa_jax import losses
from aa_jax.errors import ConfigError
from aa_jax.losses.unpaired import RunningMean, needs_kl


def batch(delta, label, mask=None, base=-20.0):
    delta = jnp.asarray(delta, jnp.float32)
    ref = jnp.full_like(delta, base)
    mask = jnp.ones_like(delta) if mask is None else jnp.asarray(mask, jnp.float32)
    return losses.Unpaired(ref + delta, ref, jnp.asarray(label, jnp.float32), mask)


def sig(x):
    return 1 / (1 + np.exp(-np.float64(x)))


def test_kto_worked_example():
    """Δ_w = 2, Δ_l = -1, z = 0.5: a desirable and an undesirable response lose the same."""
    loss, metrics = losses.unpaired_loss(batch([2.0, -1.0], [1, 0]), kl=0.5)
    np.testing.assert_allclose(metrics["loss"].total, 0.925140, atol=2e-6)
    np.testing.assert_allclose(loss, 0.462570, atol=1e-6)
    assert metrics["loss"].count == 2 and metrics["accuracy"].mean == 1
    np.testing.assert_allclose(metrics["chosen_rewards"].mean, 0.2, atol=1e-6)
    np.testing.assert_allclose(metrics["rejected_rewards"].mean, -0.1, atol=1e-6)
    # A better undesirable response must cost more, not less.
    raised = losses.unpaired_loss(batch([2.0, 0.0], [1, 0]), kl=0.5)[1]
    np.testing.assert_allclose(raised["loss"].total, 0.950073, atol=2e-6)


def test_weights_and_padding():
    delta, label = np.array([2.0, -1.0, 0.5, 7.0]), np.array([1, 0, 0, 1])
    want = np.array([1.5 * sig(-0.3 * 1.8), 0.5 * sig(-0.3 * 1.2), 0.5 * sig(0.3 * 0.3)])
    options = {"beta": 0.3, "kl": 0.2, "desirable_weight": 1.5, "undesirable_weight": 0.5}
    dirty = batch(delta, label, [1, 1, 1, 0])
    dirty = dirty._replace(logps=dirty.logps.at[3].set(jnp.nan), label=dirty.label.at[3].set(9.0))

    @jax.jit
    @jax.value_and_grad
    def run(logps):
        return losses.unpaired_loss(dirty._replace(logps=logps), **options)[0]

    loss, grad = run(dirty.logps)
    np.testing.assert_allclose(loss, want.mean(), rtol=1e-6)
    assert np.isfinite(grad).all() and grad[3] == 0


def test_reference_kl_is_a_clamped_mean_without_gradient():
    policy, reference = jnp.array([-3.0, -4.0, jnp.nan]), jnp.array([-3.5, -4.2, 0.0])
    mask = jnp.array([1.0, 1.0, 0.0])
    value, grad = jax.value_and_grad(losses.reference_kl)(policy, reference, mask)
    np.testing.assert_allclose(value, 0.35, rtol=1e-5)
    assert (grad == 0).all()
    assert losses.reference_kl(reference - 1, reference, mask) == 0
    assert losses.reference_kl(policy, reference, 0 * mask) == 0


def test_kto_without_kl_is_apo_zero_and_only_kto_asks_for_it():
    x = batch([2.0, -1.0, 0.3], [1, 0, 1])
    a = losses.unpaired_loss(x, variant="kto")[0]
    b = losses.unpaired_loss(x, variant="apo_zero_unpaired")[0]
    np.testing.assert_array_equal(a, b)
    assert [name for name in losses.UNPAIRED_LOSSES if needs_kl(name)] == ["kto"]


def test_bco_shift_of_the_batch_and_a_running_one():
    delta, label = np.array([2.0, -1.0, 0.5]), np.array([1.0, 0.0, 0.0])
    shift = 0.5 * (0.2 + 0.1 * np.mean([-1.0, 0.5]))
    signs = np.where(label > 0, 1, -1)
    want = np.log1p(np.exp(-signs * (0.1 * delta - shift))).mean()
    x = batch(delta, label)
    np.testing.assert_allclose(losses.unpaired_loss(x, variant="bco")[0], want, rtol=1e-6)
    only = batch([2.0, 4.0], [1, 1])  # one kind alone: its own mean
    np.testing.assert_allclose(
        losses.unpaired_loss(only, variant="bco", beta=1.0)[0],
        np.log1p(np.exp([1.0, -1.0])).mean(), rtol=1e-6,
    )  # fmt: skip
    state, rng = RunningMean(), np.random.default_rng(0)
    seen = []
    for size in (3, 1, 5):
        values = rng.normal(size=size).astype(np.float32)
        weights = np.ones(size, np.float32)
        weights[0] = size > 1
        seen += list(values[weights > 0])
        state = state.update(jnp.asarray(values), jnp.asarray(weights))
        np.testing.assert_allclose(state.mean, np.mean(seen), rtol=1e-5)
    assert state.count == len(seen)


@pytest.mark.parametrize("variant", losses.UNPAIRED_LOSSES)
def test_extremes_stay_finite_and_nothing_is_zero(variant):
    x = batch([1e4, -1e4, 1e4, -1e4], [1, 0, 0, 1])

    @jax.jit
    @jax.value_and_grad
    def run(logps):
        return losses.unpaired_loss(x._replace(logps=logps), variant=variant)[0]

    loss, grad = run(x.logps)
    assert np.isfinite(loss) and np.isfinite(grad).all()
    empty = losses.unpaired_loss(x._replace(mask=jnp.zeros(4)), variant=variant)
    assert empty[0] == 0 and all(metric.count == 0 for metric in empty[1].values())


def test_errors_list_the_choices():
    x = batch([1.0], [1])
    with pytest.raises(ConfigError, match="no loss of unpaired responses 'dpo'.*'bco', 'kto'"):
        losses.unpaired_loss(x, variant="dpo")
    with pytest.raises(ConfigError, match="'bco' takes no kl, only"):
        losses.unpaired_loss(x, variant="bco", kl=0.1)
    with pytest.raises(ConfigError, match="desirable_weight must be positive, got -1"):
        losses.unpaired_loss(x, desirable_weight=-1)
