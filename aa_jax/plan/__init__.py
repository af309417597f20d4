"""Plan before paying: the real train step compiled for devices that are not there.

Import `aa_jax.plan.targets` and call ``prepare`` first: a compiler reads its settings when JAX
starts.
"""
