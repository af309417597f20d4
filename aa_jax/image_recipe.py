"""A recipe that trains a small image tokenizer on the digits world, so that image output is real.

Three stages. A continuous autoencoder learns what to keep of an image; k-means over its latents
gives a codebook that is used from its first step on (Lancucki et al., "Robust Training of Vector
Quantized Bottleneck Models", 2020, section III); then all of it trains together with
straight-through gradients (van den Oord et al., 2017, section 3.2).
"""

import json
import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from aa_jax import hosts
from aa_jax.data.digits.strips import StripBatches, cells, sample_strips
from aa_jax.losses.base import Loss
from aa_jax.losses.vq import vq_loss
from aa_jax.models.chameleon.tokenizer import ImageTokenizer, build_tokenizer, save_tokenizer
from aa_jax.sharding import make_mesh, shardings
from aa_jax.training.loop import fit
from aa_jax.training.optim import make_optimizer
from aa_jax.training.state import init_state
from aa_jax.training.step import make_step

log = logging.getLogger(__name__)


def digits_config(
    max_digits: int = 3, *, codes: int = 256, embed_dim: int = 8, patch: int = 4
) -> dict[str, Any]:
    """A `ChameleonVQVAE` config for strips of digits.

    Args:
      max_digits: edge of the canvas in digits of 8 pixels.
      codes: size of the codebook.
      embed_dim: size of its vectors.
      patch: pixels per token along an edge, a power of two.
    """
    return {
        "architectures": ["ChameleonVQVAE"],
        "model_type": "chameleon_vqgan",
        "resolution": 8 * max_digits,
        "in_channels": 3,
        "out_channels": 3,
        "base_channels": 32,
        "channel_multiplier": [1] * patch.bit_length(),
        "num_res_blocks": 1,
        "latent_channels": 32,
        "embed_dim": embed_dim,
        "num_embeddings": codes,
        "attn_resolutions": None,
        "attn_type": "vanilla",
        "double_latent": False,
        "dropout": 0.0,
    }


def reconstruct(
    tokenizer: ImageTokenizer, *, quantise: bool = True, beta: float = 0.25
) -> Callable[..., Loss]:
    """``objective(params, batch)`` on batches of "pixels" and "row_mask"; see `vq_loss`.

    Args:
      tokenizer: with a decoder.
      quantise: False trains encoder and decoder without the codebook.
      beta: weight of the commitment.
    """

    def objective(params: Any, batch: Mapping[str, Any]) -> Loss:
        pixels, mask = jnp.asarray(batch["pixels"]), jnp.asarray(batch["row_mask"])
        latents = tokenizer.latents(params, pixels)
        if not quantise:
            return vq_loss(pixels, tokenizer.render(params, latents), mask)
        vectors = params["codebook"][tokenizer.nearest(params, latents)]
        through = latents + jax.lax.stop_gradient(vectors - latents)
        again = tokenizer.render(params, through)
        return vq_loss(pixels, again, mask, latents=latents, vectors=vectors, beta=beta)

    return objective


def codebook_of(
    latents: Float[np.ndarray, "N E"], codes: int, seed: int
) -> Float[np.ndarray, "K E"]:
    """Centres of k-means over different latents: one of thousands of blank patches counts once."""
    from sklearn.cluster import KMeans

    different = np.unique(np.round(latents, 4), axis=0)
    fitted = KMeans(min(codes, len(different)), n_init=1, random_state=seed).fit(different)
    centres = fitted.cluster_centers_.astype(np.float32)
    # Fewer different latents than codes: the rest lies out of the way until it is needed.
    spare = np.full((codes - len(centres), latents.shape[1]), 10 * np.abs(latents).max())
    return np.concatenate([centres, spare.astype(np.float32)])


def train_tokenizer(
    *,
    workdir: str | Path,
    mesh: jax.sharding.Mesh | None = None,
    sizes: Mapping[str, int] | None = None,
    max_digits: int = 3,
    seed: int = 0,
    batch_rows: int = 16,
    continuous_steps: int = 400,
    steps: int = 600,
    lr: float = 3e-3,
    beta: float = 0.25,
    log_every: int = 10,
    test_strips: int = 128,
) -> tuple[ImageTokenizer, dict[str, Any], dict[str, float]]:
    """Trains a tokenizer on strips of training digits; called again it continues.

    Args:
      workdir: run directory; stages "vq_continuous" and "vq", then the checkpoint folder
        "tokenizer" (for `load_tokenizer`) and its figures in "tokenizer.json".
      mesh: device mesh; default all devices.
      sizes: keyword arguments of `digits_config`.
      max_digits: edge of the canvas in digits.
      seed: of weights, strips and codebook.
      batch_rows: strips per step.
      continuous_steps: steps without codebook.
      steps: steps with it.
      lr: peak learning rate of both stages (AdamW, cosine).
      beta: weight of the commitment.
      log_every: steps per line of metrics.
      test_strips: strips of test digits the result is measured on.

    Returns:
      Tokenizer, parameters, and the figures of `measure` with "seconds".
    """
    hosts.only_one("training an image tokenizer")
    started = time.perf_counter()
    mesh = make_mesh() if mesh is None else mesh
    tokenizer = build_tokenizer(digits_config(max_digits, **(sizes or {})))
    params = tokenizer.init(jax.random.key(seed))

    def run(stage: str, params: Any, quantise: bool, total: int, frozen: tuple[str, ...]) -> Any:
        tx, schedule = make_optimizer(lr, total)
        places = shardings(tokenizer.axes(), jax.eval_shape(lambda: params), mesh)
        objective = reconstruct(tokenizer, quantise=quantise, beta=beta)
        state = fit(
            step=make_step(objective, tx, mesh=mesh, schedule=schedule, frozen=frozen),
            state=init_state(params, tx, mesh=mesh, shardings=places, frozen=frozen, seed=seed),
            batches=StripBatches(batch_rows, seed + int(quantise), max_digits),
            total_steps=total,
            workdir=workdir,
            stage=stage,
            log_every=log_every,
        )
        return state["params"]

    params = run("vq_continuous", params, False, continuous_steps, ("codebook",))
    pixels, _ = sample_strips("train", 256, seed, max_digits)
    latents = np.asarray(jax.jit(tokenizer.latents)(params, pixels))
    table = codebook_of(latents.reshape(-1, latents.shape[-1]), len(params["codebook"]), seed)
    params = run("vq", {**params, "codebook": jnp.asarray(table)}, True, steps, ())
    figures = measure(tokenizer, params, test_strips, seed, max_digits)
    figures["seconds"] = time.perf_counter() - started
    log.info("image tokenizer: %s", figures)
    save_tokenizer(Path(workdir) / "tokenizer", tokenizer, params, overwrite=True)
    (Path(workdir) / "tokenizer.json").write_text(json.dumps(figures, indent=2) + "\n")
    return tokenizer, params, figures


def measure(
    tokenizer: ImageTokenizer, params: Any, count: int, seed: int, max_digits: int = 3
) -> dict[str, float]:
    """What images lose on the way through tokens, on strips of test digits.

    Returns:
      psnr: peak signal-to-noise ratio of the reconstruction, dB.
      mse: mean squared error per pixel, of colours in [0, 1].
      mse_of_mean: the same of the mean training strip, what a blind guess loses.
      codes_used: codebook vectors that occur.
      perplexity: of the codes' frequencies, exp of their entropy.
      read_before: share of digits an independent classifier reads correctly in the originals.
      read_after: in the reconstructions.
    """
    from sklearn.svm import SVC

    train, train_labels = sample_strips("train", 4 * count, seed + 1, max_digits)
    test, labels = sample_strips("test", count, seed + 2, max_digits)
    codes = np.asarray(jax.jit(tokenizer.encode)(params, test))
    again = np.clip(np.asarray(jax.jit(tokenizer.decode)(params, codes)), -1.0, 1.0)
    mse = float(np.mean((again - test) ** 2) / 4)
    share = np.bincount(codes.reshape(-1)) / codes.size
    share = share[share > 0]
    reader = SVC(C=10.0).fit(*cells(train, train_labels, max_digits))
    return {
        "psnr": float(-10 * np.log10(mse)),
        "mse": mse,
        "mse_of_mean": float(np.mean((train.mean(axis=0)[None] - test) ** 2) / 4),
        "codes_used": float(len(share)),
        "perplexity": float(np.exp(-(share * np.log(share)).sum())),
        "read_before": float(reader.score(*cells(test, labels, max_digits))),
        "read_after": float(reader.score(*cells(again, labels, max_digits))),
    }
