"""Losses of each side's own log-ratio: they say where each response goes, not only the gap."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from aa_jax.losses.preference.pairs import Pairs, log_ratios
from aa_jax.losses.stable import masked_mean


def nca(pairs: Pairs, *, beta: float = 0.1) -> Float[Array, "P"]:
    r"""Noise-contrastive alignment for pairs (Chen et al. 2024, arXiv:2402.05369).

    .. math:: -\log\sigma(r_w) - \tfrac12 \log\sigma(-r_w) - \tfrac12 \log\sigma(-r_l),
      \quad r = \beta\Delta

    The same as TRL's ``nca_pair``.
    """
    chosen, rejected = (beta * x for x in log_ratios(pairs))
    negative = jax.nn.log_sigmoid(-chosen) + jax.nn.log_sigmoid(-rejected)
    return -jax.nn.log_sigmoid(chosen) - 0.5 * negative


def bco(
    pairs: Pairs, *, beta: float = 0.1, delta: float | Float[Array, ""] | None = None
) -> Float[Array, "P"]:
    r"""Binary classifier optimisation (Jung et al. 2024, arXiv:2404.04656).

    .. math:: -\log\sigma(r_w - \delta) - \log\sigma(-(r_l - \delta)), \quad r = \beta\Delta,
      \quad \delta = \tfrac12\left(E[r_w] + E[r_l]\right)

    TRL's ``bco_pair`` (DPO trainer, 1.16) is δ = 0; TRL's BCO trainer (1.13) keeps δ as a running
    mean over all steps, and averages over both sides where the paper adds them. Its weights for
    prompts that stand on one side only are left to the data.

    Args:
      pairs: the pairs.
      beta: strength of the pull to the reference.
      delta: the reward shift. None: the mean over this batch (per micro-batch under accumulation),
        without gradient and without state. For a running one keep a `RunningMean` and give its
        mean.
    """
    chosen, rejected = (beta * x for x in log_ratios(pairs))
    if delta is None:
        delta = masked_mean(jax.lax.stop_gradient(0.5 * (chosen + rejected)), pairs.mask)
    return -jax.nn.log_sigmoid(chosen - delta) - jax.nn.log_sigmoid(delta - rejected)


def bco_pair(pairs: Pairs, *, beta: float = 0.1) -> Float[Array, "P"]:
    r"""`bco` without a reward shift, δ = 0: TRL's ``bco_pair``."""
    return bco(pairs, beta=beta, delta=0.0)


def sppo(
    pairs: Pairs, *, beta: float = 0.1, win_rates: Float[Array, "P 2"] | None = None
) -> Float[Array, "P"]:
    r"""Self-play preference optimisation (Wu et al. 2024, arXiv:2405.00675, eq. 4.7).

    .. math:: \left(\Delta_w - \eta\,(P_w - \tfrac12)\right)^2
      + \left(\Delta_l - \eta\,(P_l - \tfrac12)\right)^2, \quad \eta = 1/\beta

    The reference is the previous iterate. TRL's ``sppo_hard`` knows only P_w = 1 and P_l = 0, the
    default here.

    Args:
      pairs: the pairs.
      beta: 1/η; the paper's η is 1000.
      win_rates: (P_w, P_l), estimated probability that each response beats one of the previous
        iterate, in [0, 1].
    """
    chosen, rejected = log_ratios(pairs)
    if win_rates is None:
        win_rates = jnp.broadcast_to(jnp.array([1.0, 0.0]), (chosen.shape[0], 2))
    target = (jnp.where(pairs.mask[:, None] != 0, win_rates, 0.5) - 0.5) / beta
    return (chosen - target[:, 0]) ** 2 + (rejected - target[:, 1]) ** 2


def apo_zero(pairs: Pairs, *, beta: float = 0.1) -> Float[Array, "P"]:
    r"""APO-zero (D'Oosterlinck et al. 2024, arXiv:2408.06266, eq. 7): chosen up, rejected down.

    .. math:: 1 - \sigma(\beta\Delta_w) + \sigma(\beta\Delta_l)

    For chosen responses better than the model's own. As TRL's ``apo_zero``; the paper leaves out
    the constant 1, which keeps the loss above zero.
    """
    chosen, rejected = log_ratios(pairs)
    return jax.nn.sigmoid(-beta * chosen) + jax.nn.sigmoid(beta * rejected)


def apo_down(pairs: Pairs, *, beta: float = 0.1) -> Float[Array, "P"]:
    r"""APO-down (D'Oosterlinck et al. 2024, arXiv:2408.06266, eq. 8): both down, rejected more.

    .. math:: \sigma(\beta\Delta_w) + 1 - \sigma(\beta\Delta)

    For chosen responses worse than the model's own. As TRL's ``apo_down``, with the same constant.
    """
    chosen, rejected = log_ratios(pairs)
    return jax.nn.sigmoid(beta * chosen) + jax.nn.sigmoid(-beta * (chosen - rejected))
