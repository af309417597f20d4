"""Diffusion losses: worked numbers, the two predictions, and what a pair shares."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aa_jax import losses
from aa_jax.errors import ConfigError
from aa_jax.losses.diffusion import add_noise, pair_noise, sample_errors

ALPHAS = jnp.cumprod(1 - jnp.linspace(1e-4, 0.02, 50))


def test_diffusion_dpo_worked_example():
    """A difference of errors of 0.0004 and β = 2500: the argument is 1."""
    errors, ref = jnp.array([0.1, 0.1004]), jnp.array([0.1, 0.1])
    loss, metrics = losses.diffusion_preference_loss(errors, ref, jnp.ones(2))
    np.testing.assert_allclose(loss, 0.313262, atol=1e-4)  # float32 of 0.1004 - 0.1
    assert metrics["accuracy"].mean == 1
    exact = losses.diffusion_preference_loss(jnp.array([0.0, 0.0004]), 0 * ref, jnp.ones(2))[0]
    np.testing.assert_allclose(exact, 0.313262, atol=1e-6)
    same, metrics = losses.diffusion_preference_loss(ref, ref, jnp.ones(2))
    np.testing.assert_allclose(same, np.log(2), rtol=1e-6)
    assert metrics["accuracy"].mean == 0.5
    hinge = losses.diffusion_preference_loss(
        jnp.array([0.0, 0.0002]), 0 * ref, jnp.ones(2), variant="hinge"
    )[0]
    np.testing.assert_allclose(hinge, 0.5, atol=1e-5)


def test_a_pair_shares_noise_and_timestep():
    noise, steps = pair_noise(jax.random.key(0), 3, (2, 4), 50)
    assert noise.shape == (6, 2, 4) and steps.shape == (6,)
    np.testing.assert_array_equal(noise[0::2], noise[1::2])
    np.testing.assert_array_equal(steps[0::2], steps[1::2])
    assert not np.array_equal(noise[0], noise[2])
    assert (steps >= 0).all() and (steps < 50).all()


def test_both_predictions_recover_the_sample():
    rng = np.random.default_rng(0)
    x, noise = (jnp.asarray(rng.normal(size=(4, 3, 2)), jnp.float32) for _ in range(2))
    steps = jnp.array([0, 10, 30, 49])
    alpha = np.asarray(ALPHAS)[np.asarray(steps)][:, None, None]
    out = {name: add_noise(x, noise, steps, ALPHAS, prediction=name) for name in ("epsilon", "v")}
    np.testing.assert_allclose(
        out["v"].noisy, np.sqrt(alpha) * x + np.sqrt(1 - alpha) * noise, atol=1e-6
    )
    np.testing.assert_array_equal(out["epsilon"].target, noise)
    # x_0 = √ᾱ x_t − √(1−ᾱ) v and ε = √(1−ᾱ) x_t + √ᾱ v
    noisy, v = out["v"]
    np.testing.assert_allclose(np.sqrt(alpha) * noisy - np.sqrt(1 - alpha) * v, x, atol=1e-5)
    np.testing.assert_allclose(np.sqrt(1 - alpha) * noisy + np.sqrt(alpha) * v, noise, atol=1e-5)
    with pytest.raises(ConfigError, match="no prediction 'x'"):
        add_noise(x, noise, steps, ALPHAS, prediction="x")


def test_sft_is_a_mean_square_over_real_samples():
    rng = np.random.default_rng(0)
    predicted, target = rng.normal(size=(2, 4, 3, 2))
    mask = np.array([1.0, 1.0, 0.0, 1.0])
    errors = ((predicted - target) ** 2).reshape(4, -1).mean(1)
    dirty = np.where(mask[:, None, None] > 0, predicted, np.nan)
    inputs = [jnp.asarray(x, jnp.float32) for x in (dirty, target, mask)]
    run = jax.value_and_grad(lambda p: losses.diffusion_sft_loss(p, *inputs[1:])[0])
    loss, grad = run(inputs[0])
    np.testing.assert_allclose(loss, errors[mask > 0].mean(), rtol=1e-6)
    assert np.isfinite(grad).all()
    snr = np.array([0.5, 5.0, np.nan, 50.0])
    for prediction, plus in (("epsilon", 0.0), ("v", 1.0)):
        weights = np.minimum(snr, 5) / (snr + plus)
        loss, _ = losses.diffusion_sft_loss(
            *inputs, snr=jnp.asarray(snr, jnp.float32), snr_gamma=5.0, prediction=prediction
        )
        np.testing.assert_allclose(loss, (weights * errors)[mask > 0].mean(), rtol=1e-6)
    with pytest.raises(ConfigError, match="give snr"):
        losses.diffusion_sft_loss(*inputs, snr_gamma=5.0)
    np.testing.assert_allclose(sample_errors(inputs[1], 0 * inputs[1]),
                               (target**2).reshape(4, -1).mean(1), rtol=1e-6)  # fmt: skip


def test_preference_gradient_reaches_the_policy_only():
    def loss(errors, ref):
        return losses.diffusion_preference_loss(errors, ref, jnp.ones(4))[0]

    errors = jnp.array([0.1, 0.2, 0.3, 0.1])
    own, reference = jax.grad(loss, (0, 1))(errors, errors)
    assert (own[0::2] > 0).all() and (own[1::2] < 0).all()  # descent: chosen better, rejected worse
    assert (reference == 0).all()
    assert np.isfinite(jax.grad(loss)(1e4 * errors, errors)).all()
