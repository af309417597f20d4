"""PPO with a cost that is kept below its limit: complete answers, of which few state a falsehood.

The small Qwen2-Audio of `configs/ta2t/digits_rl.py`. What is paid is to answer everything, in the
form asked for and clearly; whether it is true is the cost (1 for a response that states anything
false, -1 for one that does not). Plain PPO is paid the same and has no limit.

Command:  python launch/rl.py --config configs/ta2t/digits_lagrangian.py --workdir runs/rl_limit
Hardware: one CPU core, no download.
Time and result: docs/results/digits_rl_families.md.
"""

import importlib.util
from pathlib import Path

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    path = Path(__file__).with_name("digits_rl.py")
    spec = importlib.util.spec_from_file_location("digits_rl", path)
    base = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(base)
    config = base.get_config()
    common = {
        "reward": {"kind": "oracle", "dimensions": ("prompt_following", "clarity")},
        "rollout": {"prompts": 128, "samples": 1, "minibatches": 2, "epochs": 2},
        "kl": {"coef": 0.05},
        "critic_lr_scale": 3.0,
    }
    config.algorithms = {
        "ppo_lagrangian": {
            **common,
            "limit": {"threshold": -0.4, "initial": 2.0, "lr": 0.1, "maximum": 3.0},
        },
        "ppo": common,
    }
    config.rollout.iterations = 60
    config.cost = {"kind": "falsehood"}
    return config
