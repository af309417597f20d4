"""The oracle: all logits at once in float32, differentiated by JAX itself."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from aa_jax.kernels.linear_logprob.spec import LogProbs, Spec


def linear_logprob(
    hidden: Float[Array, "N D"],
    head: Float[Array, "V D"],
    targets: Int[Array, "N"],
    mask: Bool[Array, "N"] | None,
    bias: Float[Array, "V"] | None,
    spec: Spec,
) -> LogProbs:
    """See `aa_jax.kernels.linear_logprob.api.linear_logprob`; ``spec.chunk`` has no meaning."""
    if mask is None:
        mask = jnp.ones(targets.shape, bool)
    # Removed before the matmul: behind it, the gradient of the head would read 0 * NaN.
    hidden = jnp.where(mask[:, None], hidden, 0)
    z = jnp.einsum(
        "nd,vd->nv",
        hidden,
        head.astype(hidden.dtype),
        preferred_element_type=jnp.float32,
        precision=jax.lax.Precision.HIGHEST,
    )
    if bias is not None:
        z = z + bias.astype(jnp.float32)[None]
    if spec.softcap is not None:
        z = spec.softcap * jnp.tanh(z / spec.softcap)
    z = z / spec.temperature
    known = (targets >= 0) & (targets < head.shape[0])
    target = jnp.where(known, targets, 0)[:, None]
    lse = jax.nn.logsumexp(z, axis=-1)
    log_p = jax.nn.log_softmax(z)  # not z - lse, which loses digits when the logits are large
    logps = jnp.where(known, jnp.take_along_axis(log_p, target, axis=1)[:, 0], jnp.nan)
    entropy = None
    if spec.need_entropy:
        p = jnp.exp(log_p)
        entropy = -(p * jnp.where(p > 0, log_p, 0)).sum(-1)
        entropy = jnp.where(mask, entropy, 0)
    return LogProbs(jnp.where(mask, logps, 0), entropy, jnp.where(mask, lse, 0))
