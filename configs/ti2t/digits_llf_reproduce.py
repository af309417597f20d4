"""LLF on the digits world over three training seeds: wider grid, shares of the feedback (Figure 5).

Command:  python launch/reproduce.py --config configs/ti2t/digits_llf_reproduce.py \\
              --workdir runs/reproduce
Hardware: two CPU cores.
Time and result: docs/results/digits_llf.md.
"""

import importlib.util
from pathlib import Path

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    path = Path(__file__).with_name("digits_llf.py")
    spec = importlib.util.spec_from_file_location("digits_llf", path)
    base = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(base)
    config = base.get_config()
    del config.pipeline, config.seed
    with config.unlocked():
        config.seeds = (0, 1, 2)
        config.shares = (0.25, 0.5)
        config.variants = ("verified", "likeliest")
        config.feedback_prompts = 5000  # so that every arm finds 2,000 pairs
        config.dpo.lrs = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3)
    return config
