"""Training: the state, one exact step, the one loop, checkpoints, metrics and the report.

Import the module you need, e.g. ``from aa_jax.training.loop import fit``.
"""
