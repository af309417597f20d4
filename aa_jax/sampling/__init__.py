"""Cached decoding: greedy and sampled, unequal prompts with media, full-vocabulary log-probs."""

from aa_jax.sampling.constraints import Forbid, ImageSpans
from aa_jax.sampling.filters import filter_logits
from aa_jax.sampling.generate import Samples, generate, make_sampler

__all__ = ["Forbid", "ImageSpans", "Samples", "filter_logits", "generate", "make_sampler"]
