"""Where the code runs: dtype policy, kernel preference, start-up, and what to say about it.

platforms.start(compilation_cache="~/.cache/aa_jax")     # before the first JAX operation
platform = platforms.current()
model = models.build(hf_config, dtype=platform.compute_dtype)
"""

from aa_jax.platforms.base import Platform
from aa_jax.platforms.startup import (
    PLATFORMS,
    current,
    decisions,
    describe,
    environment,
    select,
    start,
)

__all__ = [
    "PLATFORMS",
    "Platform",
    "current",
    "decisions",
    "describe",
    "environment",
    "select",
    "start",
]
