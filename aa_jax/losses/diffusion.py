"""Diffusion models: regression of noise or velocity, and preferences over pairs of samples.

A diffusion model meets the preference losses with minus its error where a language model has a
log-probability; nothing else differs.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from aa_jax.errors import ConfigError
from aa_jax.losses.base import Loss, counted, ratio, total_loss
from aa_jax.losses.preference import pair_up, preference_loss

PREDICTIONS = ("epsilon", "v")


class Noised(NamedTuple):
    """Samples on their way to noise.

    Attributes:
      noisy: x_t = √ᾱ_t x_0 + √(1 − ᾱ_t) ε.
      target: what the model is to predict from it.
    """

    noisy: Float[Array, "N *sample"]
    target: Float[Array, "N *sample"]


def add_noise(
    samples: Float[Array, "N *sample"],
    noise: Float[Array, "N *sample"],
    timesteps: Int[Array, "N"],
    alphas_cumprod: Float[Array, "T"],
    *,
    prediction: str = "epsilon",
) -> Noised:
    r"""The forward process of DDPM (Ho et al. 2020, arXiv:2006.11239, eq. 4) and its target.

    .. math:: x_t = \sqrt{\bar\alpha_t}\,x_0 + \sqrt{1-\bar\alpha_t}\,\epsilon, \qquad
      v_t = \sqrt{\bar\alpha_t}\,\epsilon - \sqrt{1-\bar\alpha_t}\,x_0

    Args:
      samples: x_0, e.g. latents.
      noise: ε, standard normal.
      timesteps: t.
      alphas_cumprod: ᾱ of the noise schedule.
      prediction: "epsilon", or "v" (Salimans & Ho 2022, arXiv:2202.00512, appendix D).

    Raises:
      ConfigError: unknown prediction.
    """
    if prediction not in PREDICTIONS:
        raise ConfigError(f"There is no prediction {prediction!r}; choose one of {[*PREDICTIONS]}.")
    shape = (-1,) + (1,) * (samples.ndim - 1)
    alpha = alphas_cumprod.astype(jnp.float32)[timesteps].reshape(shape)
    signal, spread = jnp.sqrt(alpha), jnp.sqrt(1 - alpha)
    samples, noise = samples.astype(jnp.float32), noise.astype(jnp.float32)
    noisy = signal * samples + spread * noise
    return Noised(noisy, noise if prediction == "epsilon" else signal * noise - spread * samples)


def pair_noise(
    key: Key[Array, ""], pairs: int, sample_shape: tuple[int, ...], steps: int
) -> tuple[Float[Array, "N *sample"], Int[Array, "N"]]:
    """Noise and timesteps for samples in the order chosen, rejected, chosen, ...

    Both of a pair share them (Wallace et al. 2023, arXiv:2311.12908, §4): the errors then differ
    by what the samples are, not by the draw.

    Args:
      key: PRNG key.
      pairs: number of pairs; N is twice that.
      sample_shape: of one sample.
      steps: T, number of timesteps; drawn uniformly.
    """
    for_noise, for_steps = jax.random.split(key)
    noise = jax.random.normal(for_noise, (pairs, *sample_shape), jnp.float32)
    timesteps = jax.random.randint(for_steps, (pairs,), 0, steps)
    return jnp.repeat(noise, 2, axis=0), jnp.repeat(timesteps, 2, axis=0)


def sample_errors(
    predictions: Float[Array, "N *sample"], targets: Float[Array, "N *sample"]
) -> Float[Array, "N"]:
    """Mean squared error of each sample over all its other dimensions, float32."""
    square = (predictions.astype(jnp.float32) - targets.astype(jnp.float32)) ** 2
    return square.reshape(square.shape[0], -1).mean(-1)


def diffusion_sft_loss(
    predictions: Float[Array, "N *sample"],
    targets: Float[Array, "N *sample"],
    mask: Float[Array, "N"],
    *,
    snr: Float[Array, "N"] | None = None,
    snr_gamma: float | None = None,
    prediction: str = "epsilon",
) -> Loss:
    r"""Mean squared error of the predicted noise or velocity (Ho et al. 2020, eq. 14).

    .. math:: L = E\left[w_t\,\|f_\theta(x_t, t) - y\|^2 / D\right]

    with w = 1, or min-SNR-γ weights (Hang et al. 2023, arXiv:2303.09556): min(SNR, γ) over SNR for
    ε, over SNR + 1 for v.

    Args:
      predictions: of the model.
      targets: `add_noise(...).target`.
      mask: 0 on samples that only fill the batch.
      snr: ᾱ/(1 − ᾱ) at each timestep, needed with `snr_gamma`.
      snr_gamma: γ, 5 in the paper; None weighs all timesteps alike.
      prediction: as in `add_noise`; only the weights depend on it.

    Returns:
      The loss, and per-sample metrics ``loss`` and ``error`` (unweighted).

    Raises:
      ConfigError: weights without `snr`, or an unknown prediction.
    """
    if prediction not in PREDICTIONS:
        raise ConfigError(f"There is no prediction {prediction!r}; choose one of {[*PREDICTIONS]}.")
    shape = (-1,) + (1,) * (predictions.ndim - 1)
    there = jnp.broadcast_to(mask.reshape(shape), predictions.shape)
    errors = sample_errors(counted(predictions, there), counted(targets, there))
    weighted = errors
    if snr_gamma is not None:
        if snr is None:
            raise ConfigError(
                "snr_gamma weighs timesteps by their signal-to-noise ratio: give snr."
            )
        snr = jnp.where(mask != 0, snr, 1)
        weighted = errors * jnp.minimum(snr, snr_gamma) / (snr + (prediction == "v"))
    metrics = {
        "loss": ratio(weighted, mask),
        "error": ratio(jax.lax.stop_gradient(errors), mask),
    }
    return total_loss(metrics["loss"]), metrics


def diffusion_preference_loss(
    errors: Float[Array, "N"],
    ref_errors: Float[Array, "N"],
    mask: Float[Array, "N"],
    *,
    variant: str = "sigmoid",
    beta: float = 2500.0,
    **options: float,
) -> Loss:
    r"""Diffusion-DPO (Wallace et al. 2023, arXiv:2311.12908, eq. 14), or any preference loss.

    .. math:: -\log\sigma\left(\beta\left[(e^{ref}_w - e^{ref}_l) - (e_w - e_l)\right]\right)

    with e the error of a sample at the timestep and noise its pair shares: −e stands for the
    log-probability. β is the paper's βTω/2 with the authors' 5000, as in align-anything
    (``beta_coeff``), on mean rather than summed squares. align-anything's hinge is
    ``variant="hinge"``.

    Args:
      errors: `sample_errors` of the policy, in the order chosen, rejected, chosen, ...
      ref_errors: of the reference, on the same noisy samples.
      mask: 0 on samples that only fill the batch.
      variant: key of `PREFERENCE_LOSSES`; losses per token have one token here.
      beta: β.
      **options: of the variant.

    Returns:
      See `preference_loss`; ``chosen_logps`` and ``rejected_logps`` are minus the errors.
    """
    column = (-1, 1)
    pairs = pair_up(
        -errors.reshape(column),
        -ref_errors.reshape(column),
        jnp.ones_like(errors).reshape(column),
        mask.reshape(column),
    )
    return preference_loss(pairs, variant=variant, beta=beta, **options)
