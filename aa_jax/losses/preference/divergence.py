"""f-DPO: other divergences from the reference than the reverse KL."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from aa_jax.losses.preference.pairs import Pairs, log_ratios
from aa_jax.losses.stable import bounded_exp

DIVERGENCES = ("reverse_kl", "forward_kl", "js", "alpha")


def with_divergence(pairs: Pairs, divergence: str, alpha: float = 0.5) -> Pairs:
    r"""Pairs whose log-ratios are f'(π/π_ref), for the losses of `margin`.

    Wang et al. 2023 (arXiv:2309.16240, table 1): under an f-divergence the implicit reward is
    β f'(u), u = π/π_ref, up to a constant.

    ============ ===================== =====================
    divergence   f'(u)
    ============ ===================== =====================
    reverse_kl   log u                 DPO
    forward_kl   1 − 1/u
    js           log 2u/(1+u)
    alpha        (1 − u^−α)/α          α → 0: reverse_kl, α = 1: forward_kl
    ============ ===================== =====================

    TRL's ``f_alpha_divergence_coef`` is 1 − α of the paper.

    Args:
      pairs: the pairs.
      divergence: one of `DIVERGENCES`.
      alpha: α in (0, 1].
    """
    if divergence == "reverse_kl":
        return pairs

    def slope(ratio: Float[Array, "P"]) -> Float[Array, "P"]:
        if divergence == "forward_kl":
            return 1 - bounded_exp(-ratio)
        if divergence == "js":
            return jnp.log(2.0) + jax.nn.log_sigmoid(ratio)
        return (1 - bounded_exp(-alpha * ratio)) / alpha

    chosen, rejected = (slope(ratio) for ratio in log_ratios(pairs))
    zero = jnp.zeros_like(chosen)
    return pairs._replace(chosen=chosen, rejected=rejected, ref_chosen=zero, ref_rejected=zero)
