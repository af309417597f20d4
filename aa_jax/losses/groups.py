"""Advantages without a critic: responses to one prompt are compared with each other.

Rewards are [P, G]: P prompts, G responses each, with a mask for responses that only fill the
batch. Nothing here is differentiated.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from aa_jax.errors import ConfigError
from aa_jax.losses.advantages import whiten
from aa_jax.losses.base import counted

SCALES = ("group", "batch", "none")


def group_advantages(
    rewards: Float[Array, "P G"],
    mask: Float[Array, "P G"] | None = None,
    *,
    scale: str = "group",
    eps: float = 1e-4,
    clip: tuple[float, float] | None = None,
) -> Float[Array, "P G"]:
    r"""Group-relative advantages of GRPO (Shao et al. 2024, arXiv:2402.03300, §4.1.2) and DAPO.

    .. math:: A_i = \frac{r_i - \mathrm{mean}(r)}{\mathrm{std}(r) + \epsilon}

    with n − 1 in the standard deviation, as TRL and align-anything (both ε = 1e-4; RAGEN 1e-6; the
    paper writes none). Dr. GRPO (arXiv:2503.20783) is ``scale="none"``: it leaves out the standard
    deviation, which favours questions that are nearly solved or nearly hopeless. Equal rewards
    give exactly 0.

    Args:
      rewards: one per response.
      mask: 0 on responses that do not count.
      scale: "group", "batch" (one standard deviation for all, TRL's ``scale_rewards="batch"``) or
        "none".
      eps: ε.
      clip: bounds of the advantages; RAGEN's ``asym_clip`` is (-1, 3).

    Raises:
      ConfigError: unknown scale.
    """
    if scale not in SCALES:
        raise ConfigError(f"There is no scale {scale!r}; choose one of {[*SCALES]}.")
    mask = jnp.ones_like(rewards, jnp.float32) if mask is None else mask.astype(jnp.float32)
    seen = counted(rewards, mask)
    centred = (seen - _mean(seen, mask, 1)) * mask
    # Equal rewards: the rounding of their mean must not be blown up by a deviation of zero.
    centred = jnp.where(_spread(seen, mask) > 0, centred, 0)
    if scale == "group":
        centred = centred / (_deviation(centred, mask, 1) + eps)
    elif scale == "batch":
        whole = (seen - _mean(seen, mask, None)) * mask
        centred = centred / (_deviation(whole, mask, None) + eps)
    if clip is not None:
        centred = jnp.clip(centred, *clip)
    return jax.lax.stop_gradient(centred)


def leave_one_out(
    rewards: Float[Array, "P G"], mask: Float[Array, "P G"] | None = None
) -> Float[Array, "P G"]:
    r"""RLOO (Ahmadian et al. 2024, arXiv:2402.14740, §4): the baseline is the mean of the others.

    .. math:: A_i = r_i - \frac{1}{G-1} \sum_{j \ne i} r_j

    TRL's RLOO trainer is the same (``normalize_advantages=False``); align-anything's ``rloo``
    groups consecutive tokens. A response without others gets 0.
    """
    mask = jnp.ones_like(rewards, jnp.float32) if mask is None else mask.astype(jnp.float32)
    seen = counted(rewards, mask)
    others = jnp.sum(mask, 1, keepdims=True) - 1
    rest = (jnp.sum(seen * mask, 1, keepdims=True) - seen) / jnp.maximum(others, 1)
    return jax.lax.stop_gradient(jnp.where((mask != 0) & (others > 0), seen - rest, 0))


def reinforce_plus_plus(
    rewards: Float[Array, "B T"], mask: Float[Array, "B T"], *, gamma: float = 1.0
) -> Float[Array, "B T"]:
    r"""REINFORCE++ (Hu 2025, arXiv:2501.03262): returns to go, whitened over the batch.

    .. math:: A_t = \sum_{i \ge t} \gamma^{i-t} r_i, \qquad
      \hat A_t = \frac{A_t - \mathrm{mean}_{batch}}{\mathrm{std}_{batch}}

    Args:
      rewards: token rewards with the KL in them, see `aa_jax.losses.advantages.shaped_rewards`.
      mask: 0 on tokens to skip.
      gamma: γ.
    """
    mask = mask.astype(jnp.float32)
    seen = counted(rewards, mask)

    def back(after: Array, token: tuple) -> tuple:
        reward, there = token
        total = jnp.where(there != 0, reward + gamma * after, after)
        return total, total

    start = jnp.zeros(mask.shape[0], jnp.float32)
    _, returns = jax.lax.scan(back, start, (seen.T, mask.T), reverse=True)
    return jnp.where(mask != 0, whiten(returns.T, mask), 0)


def reinforce_plus_plus_baseline(
    rewards: Float[Array, "P G"], mask: Float[Array, "P G"] | None = None
) -> Float[Array, "P G"]:
    """REINFORCE++-baseline (arXiv:2501.03262): minus the group's mean, whitened over the
    batch; one number per response."""
    mask = jnp.ones_like(rewards, jnp.float32) if mask is None else mask.astype(jnp.float32)
    return jnp.where(mask != 0, whiten(group_advantages(rewards, mask, scale="none"), mask), 0)


def _mean(x: Array, mask: Array, axis: int | None) -> Array:
    total = jnp.sum(x * mask, axis, keepdims=True)
    return total / jnp.maximum(jnp.sum(mask, axis, keepdims=True), 1)


def _deviation(centred: Array, mask: Array, axis: int | None) -> Array:
    squares = jnp.sum(centred**2 * mask, axis, keepdims=True)
    return jnp.sqrt(squares / jnp.maximum(jnp.sum(mask, axis, keepdims=True) - 1, 1))


def _spread(x: Array, mask: Array) -> Array:
    highest = jnp.max(jnp.where(mask != 0, x, -jnp.inf), 1, keepdims=True)
    return highest - jnp.min(jnp.where(mask != 0, x, jnp.inf), 1, keepdims=True)
