"""Strict numerics for every test: eight CPU devices, no silent broadcasting, checked shapes."""

import os

# Compiling takes most of the time of these tests; what is compiled runs for milliseconds.
FLAGS = (
    "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0 "
    "--xla_llvm_disable_expensive_passes=true"
)
os.environ.setdefault("XLA_FLAGS", FLAGS)
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # torch; the other worker has the other core

from jaxtyping import install_import_hook

# Shapes in the signatures are enforced here and nowhere else: users pay nothing for them.
install_import_hook("aa_jax", "beartype.beartype")

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(autouse=True, scope="module")
def programs_of_one_module():
    """Compiled programs are seldom shared between modules, and would fill several GiB."""
    yield
    jax.clear_caches()
