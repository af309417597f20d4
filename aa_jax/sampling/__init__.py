"""Cached decoding: greedy and sampled, unequal prompts with media, full-vocabulary log-probs.

`generate` writes a batch and ends with its longest response; `slots` keeps a fixed number of lanes
busy with any number of requests.
"""

from aa_jax.sampling.choose import Choice
from aa_jax.sampling.constraints import Forbid, ImageSpans
from aa_jax.sampling.filters import filter_logits
from aa_jax.sampling.generate import Samples, generate, make_sampler
from aa_jax.sampling.slots import Sample, SlotSampler
from aa_jax.sampling.stop import Stop

__all__ = [
    "Choice",
    "Forbid",
    "ImageSpans",
    "Sample",
    "Samples",
    "SlotSampler",
    "Stop",
    "filter_logits",
    "generate",
    "make_sampler",
]
