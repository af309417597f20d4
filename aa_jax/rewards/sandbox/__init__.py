"""A place where a program can do no harm; see `aa_jax.rewards.sandbox.runner` for what holds it."""

from aa_jax.rewards.sandbox.runner import (
    LEVELS,
    Jail,
    Limits,
    Outcome,
    choose,
    problem,
    pump,
    python_command,
    run,
)

__all__ = [
    "LEVELS",
    "Jail",
    "Limits",
    "Outcome",
    "choose",
    "problem",
    "pump",
    "python_command",
    "run",
]
