"""Reinforcement learning on the digits world: PPO and GRPO against a learned reward model.

The stages of learning from language feedback that make the initial model and its answers run first,
unless they stand finished in the run directory.

Command:  python launch/rl.py --config configs/ti2t/digits_rl.py --workdir runs/rl
Hardware: two CPU cores, no download.
Time and result: docs/results/digits_rl.md.
"""

import importlib.util
from pathlib import Path

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    path = Path(__file__).with_name("digits_llf.py")
    spec = importlib.util.spec_from_file_location("digits_llf", path)
    base = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(base)
    start = base.get_config()
    for later in ("pipeline", "seed", "max_digits", "feedback_prompts", "feedback", "dpo",
                  "validation_prompts", "test_prompts"):  # fmt: skip
        del start[later]
    start.preference_prompts = 10_000  # two answers each for the reward model's pairs
    groups = {"prompts": 64, "samples": 4, "minibatches": 2}
    singles = {"prompts": 256, "samples": 1, "minibatches": 2, "epochs": 2}
    return ConfigDict({
        "pipeline": "digits",
        "seed": 0,
        "max_digits": 3,
        "start": start,
        "labels": "oracle",
        "reward": {"batch_rows": 32, "epochs": 3, "optim": {"lr": 3e-4, "weight_decay": 0.01}},
        "algorithms": {
            "grpo": {"rollout": groups, "objective": {"kl_coef": 0.04}},
            "grpo_kl": {"algorithm": "grpo", "rollout": groups, "objective": {"kl_coef": 0.3}},
            "ppo": {"rollout": singles, "kl": {"coef": 0.05}, "critic_lr_scale": 3.0},
            "ppo_kl": {
                "algorithm": "ppo", "rollout": singles, "kl": {"coef": 0.2},
                "critic_lr_scale": 3.0,
            },
            "grpo_truth": {
                "algorithm": "grpo", "reward": "oracle", "rollout": groups,
                "objective": {"kl_coef": 0.04},
            },
        },
        "lrs": (1e-4,),
        "rollout": {"iterations": 40},
        "sampling": {"batch_rows": 256, "temperature": 1.0},
        "optim": {"schedule": "constant", "warmup_steps": 0},
        "frozen": ("vision_tower/*",),
        "prompts": 3000,
        "validation_prompts": 256,
        "test_prompts": 1024,
    })  # fmt: skip
