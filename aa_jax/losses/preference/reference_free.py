"""Preference losses of the policy alone: no reference model, in memory or cached."""

import jax
from jaxtyping import Array, Float

from aa_jax.losses.preference.pairs import Pairs, mean_logps
from aa_jax.losses.stable import log1mexp, smoothed_logistic


def simpo(
    pairs: Pairs, *, beta: float = 2.0, gamma: float = 1.0, label_smoothing: float = 0.0
) -> Float[Array, "P"]:
    r"""SimPO (Meng et al. 2024, arXiv:2405.14734, eq. 6).

    .. math:: -\log\sigma\left(\beta\,(\log\pi(y_w)/|y_w| - \log\pi(y_l)/|y_l|) - \gamma\right)

    The same as TRL's ``simpo`` (its ``simpo_gamma``, there 0.5, is γ). align-anything (β = 2.5,
    γ = 1.4) divides by the length of prompt, response and padding together.

    Args:
      pairs: the pairs; the reference is not read.
      beta: scale of the reward, 2.0 to 2.5 in the paper.
      gamma: target margin, 0.3 to 1.6 in the paper.
      label_smoothing: as in `sigmoid`.
    """
    chosen, rejected = mean_logps(pairs)
    return smoothed_logistic(beta * (chosen - rejected) - gamma, label_smoothing)


def cpo(pairs: Pairs, *, beta: float = 0.1, label_smoothing: float = 0.0) -> Float[Array, "P"]:
    r"""Contrastive preference optimisation (Xu et al. 2024, arXiv:2401.08417, eq. 3).

    .. math:: -\log\sigma\left(\beta\,(\log\pi(y_w) - \log\pi(y_l))\right)

    The paper adds the likelihood of the chosen, weight 1: `preference_loss` does so unless
    told otherwise (``sft_coef``), per token as the authors' code and TRL.
    """
    return smoothed_logistic(beta * (pairs.chosen - pairs.rejected), label_smoothing)


def orpo(pairs: Pairs, *, beta: float = 0.1) -> Float[Array, "P"]:
    r"""The odds-ratio part of ORPO (Hong et al. 2024, arXiv:2403.07691, eq. 7).

    .. math:: -\beta\log\sigma\left(\log\frac{\mathrm{odds}(y_w)}{\mathrm{odds}(y_l)}\right),
      \quad \mathrm{odds}(y) = \frac{p}{1-p},\; \log p = \log\pi(y)/|y|

    ORPO is this plus the likelihood of the chosen (eq. 6), which `preference_loss` adds with weight
    1 unless told otherwise (``sft_coef``). β is the paper's λ. TRL takes the likelihood term over
    prompt and response, here it is the response's; align-anything divides by the length of prompt
    and response together, and takes log(1 − e^0).
    """
    chosen, rejected = mean_logps(pairs)
    odds = (chosen - rejected) - (log1mexp(chosen) - log1mexp(rejected))
    return -beta * jax.nn.log_sigmoid(odds)
