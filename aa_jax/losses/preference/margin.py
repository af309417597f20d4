"""Losses of the margin Δ = Δ_w − Δ_l between the log-ratios of a pair: DPO and its relatives."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from aa_jax.losses.preference.pairs import Pairs, log_ratios, mean_log_ratios
from aa_jax.losses.stable import bounded_exp, smoothed_logistic


def sigmoid(pairs: Pairs, *, beta: float = 0.1, label_smoothing: float = 0.0) -> Float[Array, "P"]:
    r"""DPO (Rafailov et al. 2023, eq. 7), with cDPO's label noise (Mitchell 2023).

    .. math:: -(1-\varepsilon)\log\sigma(\beta\Delta) - \varepsilon\log\sigma(-\beta\Delta)

    TRL's ``sigmoid`` takes no smoothing since 1.x; align-anything leaves out the first response
    token and shifts the span by the template's suffix.

    Args:
      pairs: the pairs.
      beta: strength of the pull to the reference.
      label_smoothing: ε, probability that a label is wrong, in [0, 0.5). cDPO minimises the
        expected loss under such labels, and so stops at the margin log((1−ε)/ε)/β; `robust`
        undoes them, and does not stop.
    """
    chosen, rejected = log_ratios(pairs)
    return smoothed_logistic(beta * (chosen - rejected), label_smoothing)


def sigmoid_norm(
    pairs: Pairs, *, beta: float = 0.1, label_smoothing: float = 0.0
) -> Float[Array, "P"]:
    r"""Length-normalised DPO: log-ratios per token (Tülu 3, arXiv:2411.15124, §5).

    .. math:: -\log\sigma\left(\beta\,(\Delta_w / |y_w| - \Delta_l / |y_l|)\right)

    The same as TRL's ``sigmoid_norm``.
    """
    chosen, rejected = mean_log_ratios(pairs)
    return smoothed_logistic(beta * (chosen - rejected), label_smoothing)


def robust(pairs: Pairs, *, beta: float = 0.1, label_smoothing: float = 0.0) -> Float[Array, "P"]:
    r"""Robust DPO (arXiv:2403.00409): unbiased when labels are flipped at rate ε.

    .. math:: \frac{-(1-\varepsilon)\log\sigma(\beta\Delta) + \varepsilon\log\sigma(-\beta\Delta)}
      {1 - 2\varepsilon}

    The same as TRL's ``robust``.
    """
    chosen, rejected = log_ratios(pairs)
    logits = beta * (chosen - rejected)
    clean, flipped = -jax.nn.log_sigmoid(logits), -jax.nn.log_sigmoid(-logits)
    return ((1 - label_smoothing) * clean - label_smoothing * flipped) / (1 - 2 * label_smoothing)


def ipo(pairs: Pairs, *, beta: float = 0.1) -> Float[Array, "P"]:
    r"""IPO (Azar et al. 2023, arXiv:2310.12036, eq. 17), on log-ratios per token.

    .. math:: \left(\Delta_w / |y_w| - \Delta_l / |y_l| - \frac{1}{2\beta}\right)^2

    β is the paper's τ. The division by lengths is TRL's, confirmed there by the authors; OpenRLHF
    uses sums.
    """
    chosen, rejected = mean_log_ratios(pairs)
    return (chosen - rejected - 1 / (2 * beta)) ** 2


def hinge(pairs: Pairs, *, beta: float = 0.1) -> Float[Array, "P"]:
    r"""Hinge (SLiC, arXiv:2305.10425; on log-ratios in RSO, arXiv:2309.06657).

    .. math:: \max(0,\; 1 - \beta\Delta)

    The same as TRL's ``hinge``.
    """
    chosen, rejected = log_ratios(pairs)
    return jax.nn.relu(1 - beta * (chosen - rejected))


def exo(pairs: Pairs, *, beta: float = 0.1, label_smoothing: float = 1e-3) -> Float[Array, "P"]:
    r"""EXO-pref (Ji et al. 2024, arXiv:2402.00856, eq. 16, two responses): the reverse KL from the
    policy's preference to the smoothed label, where DPO minimises the forward KL.

    .. math:: q \log\frac{q}{1-\varepsilon} + (1-q) \log\frac{1-q}{\varepsilon},
      \quad q = \sigma(\beta\Delta)

    The same as TRL's ``exo_pair``.

    Args:
      pairs: the pairs.
      beta: the paper's β_π.
      label_smoothing: ε in (0, 0.5); the KL is infinite at 0.
    """
    chosen, rejected = log_ratios(pairs)
    logits = beta * (chosen - rejected)
    right = jax.nn.log_sigmoid(logits) - jnp.log1p(-label_smoothing)
    wrong = jax.nn.log_sigmoid(-logits) - jnp.log(label_smoothing)
    return jax.nn.sigmoid(logits) * right + jax.nn.sigmoid(-logits) * wrong


def dpop(pairs: Pairs, *, beta: float = 0.1, penalty: float = 50.0) -> Float[Array, "P"]:
    r"""DPO-Positive (Smaug, arXiv:2402.13228): the chosen must not become less likely.

    .. math:: -\log\sigma\left(\beta\,(\Delta - \lambda \max(0, -\Delta_w))\right)

    Not in TRL. λ = 0 is DPO.

    Args:
      pairs: the pairs.
      beta: strength of the pull to the reference.
      penalty: λ; 50 in the paper.
    """
    chosen, rejected = log_ratios(pairs)
    return -jax.nn.log_sigmoid(beta * (chosen - rejected - penalty * jax.nn.relu(-chosen)))


def discopop(pairs: Pairs, *, beta: float = 0.1, tau: float = 0.05) -> Float[Array, "P"]:
    r"""DiscoPOP, the discovered log-ratio modulated loss (arXiv:2406.08414, eq. 5).

    .. math:: (1 - m)\,(-\log\sigma(x)) + m\,e^{-x}, \quad x = \beta\Delta,\; m = \sigma(x/\tau)

    The same as TRL's ``discopop``. Around x = 0 its slope is positive (the paper notes that the
    loss is not convex): it needs examples that the policy already tells apart.

    Args:
      pairs: the pairs.
      beta: strength of the pull to the reference.
      tau: τ, temperature of the modulation.
    """
    chosen, rejected = log_ratios(pairs)
    logits = beta * (chosen - rejected)
    logistic = -jax.nn.log_sigmoid(logits) * jax.nn.sigmoid(-logits / tau)
    # In one exponent: far below zero exp(-x) overflows while its weight vanishes.
    return logistic + bounded_exp(jax.nn.log_sigmoid(logits / tau) - logits)
