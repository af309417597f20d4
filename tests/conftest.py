"""Strict numerics for every test: eight CPU devices, no silent broadcasting, checked shapes."""

import os

os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from jaxtyping import install_import_hook

# Shapes in the signatures are enforced here and nowhere else: users pay nothing for them.
install_import_hook("aa_jax", "beartype.beartype")

import jax

jax.config.update("jax_numpy_rank_promotion", "raise")
