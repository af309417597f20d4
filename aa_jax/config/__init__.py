"""Configs: a Python file with ``get_config()``, locked, overridden from the command line.

There are no config classes. A section of a config is the keyword arguments of one real function
(:func:`bind` checks them against its signature), so defaults live in signatures and an unknown
key is an error. After the launcher nothing sees a ``ConfigDict``.

    cfg = config.load("configs/ti2t/llava_dpo.py", ["--config.optim.lr=1e-6"])
    tx = config.bind(optim.make, cfg.optim, path="config.optim")()
"""

from aa_jax.config.binding import bind
from aa_jax.config.files import load, missing, require
from aa_jax.config.launcher import define_flags, run_main
from aa_jax.config.runs import check_same_run, flatten, resolve, without, write_resolved

__all__ = [
    "bind",
    "check_same_run",
    "define_flags",
    "flatten",
    "load",
    "missing",
    "require",
    "resolve",
    "run_main",
    "without",
    "write_resolved",
]
