"""Log-probabilities straight from hidden states: see `aa_jax.kernels.linear_logprob.api`."""

from aa_jax.kernels.linear_logprob.api import linear_logprob
from aa_jax.kernels.linear_logprob.spec import LogProbs

__all__ = ["LogProbs", "linear_logprob"]
