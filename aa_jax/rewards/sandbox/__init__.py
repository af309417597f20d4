"""A place where a program can do no harm; see `aa_jax.rewards.sandbox.run` for what holds it."""

from aa_jax.rewards.sandbox.run import (
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
