"""Training an image tokenizer: reconstruction, codebook and commitment."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from aa_jax.losses.base import Loss, Ratio, counted, ratio, total_loss


def vq_loss(
    pixels: Float[Array, "B C H W"],
    reconstruction: Float[Array, "B C H W"],
    row_mask: Float[Array, "B"],
    *,
    latents: Float[Array, "B h w E"] | None = None,
    vectors: Float[Array, "B h w E"] | None = None,
    beta: float = 0.25,
) -> Loss:
    r"""van den Oord et al., "Neural Discrete Representation Learning" (2017), eq. 3.

    .. math::
      L = \overline{(x - \hat x)^2} + \overline{(\mathrm{sg}[z] - e)^2}
          + \beta\, \overline{(z - \mathrm{sg}[e])^2}

    Each bar is the mean over all elements of the real rows. Without latents it is the loss of the
    continuous autoencoder alone.

    Args:
      pixels: x, the images.
      reconstruction: of them.
      row_mask: 0 on rows that only fill the batch.
      latents: z, what the encoder says.
      vectors: e, the codebook's nearest to them.
      beta: weight of the commitment.

    Returns:
      The loss, and metrics ``loss``, ``mse`` (per pixel and channel) and, with latents,
      ``quantisation`` (squared distance to the codebook per dimension).
    """

    def distance(a: Float[Array, "B *rest"], b: Float[Array, "B *rest"]) -> Ratio:
        rows = row_mask.reshape(-1, *(1 for _ in a.shape[1:]))
        weights = jnp.broadcast_to(rows, a.shape)
        return ratio((counted(a, weights) - counted(b, weights)) ** 2, weights)

    error = distance(pixels, reconstruction)
    if latents is None:
        return total_loss(error), {"loss": error, "mse": error}
    stopped = jax.lax.stop_gradient
    codebook = distance(stopped(latents), vectors)
    commitment = distance(latents, stopped(vectors))
    drawn = Ratio(codebook.total + beta * commitment.total, codebook.count)
    terms = (error, drawn)
    return total_loss(terms), {"loss": terms, "mse": error, "quantisation": codebook}
