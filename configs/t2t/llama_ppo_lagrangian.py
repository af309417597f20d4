"""PPO-Lagrangian of Llama-3.1-8B-Instruct: the mean cost of its answers stays below a limit.

Command:  python launch/rl.py --config configs/t2t/llama_ppo_lagrangian.py \\
              --config.model.path=/ckpt/llama-3.1-8b-instruct \\
              --config.reward.path=runs/llama_reward/model \\
              --config.cost.path=runs/llama_cost/model \\
              --config.prompts.path=PKU-Alignment/align-anything \\
              --workdir runs/llama_ppo_lagrangian
Hardware: eight accelerators with 80 GB each (fsdp=8); a small checkpoint runs on a CPU.
Time:     not measured on that hardware.
Expected: the mean cost falls below the threshold, and the reward rises as far as that allows.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder, required_placeholder


def get_config() -> ConfigDict:
    return ConfigDict({
        "pipeline": "dataset",
        "algorithm": "ppo_lagrangian",
        "seed": 0,
        "mesh": {"data": 1, "fsdp": -1},
        "model": {
            "path": required_placeholder(str),
            "dtype": "bfloat16", "param_dtype": "bfloat16", "remat": "full",
        },
        "prompts": {
            "path": required_placeholder(str),
            "template": "AA_T2T", "subset": "text-to-text", "split": "train",
            "limits": {"max_prompt_length": 1536},
        },
        "reward": {"path": required_placeholder(str), "dtype": "bfloat16", "batch_rows": 32},
        "cost": {"path": required_placeholder(str), "dtype": "bfloat16", "batch_rows": 32},
        "limit": {"threshold": -0.5, "initial": 10.0, "lr": 0.1, "maximum": 20.0, "window": 128},
        "critic": {"path": placeholder(str), "lr_scale": 0.5},
        "rollout": {
            "prompts": 32, "samples": 1, "epochs": 1, "minibatches": 1, "iterations": 1000,
        },
        "sampling": {
            "max_new_tokens": 512, "batch_rows": 32, "temperature": 1.0, "top_p": 1.0,
        },
        "kl": {"coef": 0.02, "target": placeholder(float)},
        "estimator": {
            "gamma": 1.0, "lam": 0.95, "whiten": False, "reward_clip": 50.0,
        },
        "objective": {"clip_low": 0.2, "value_clip": 5.0},
        "optim": {
            "lr": 1e-5, "schedule": "cosine", "warmup_ratio": 0.03, "weight_decay": 0.01,
        },
        "frozen": (),
        "offload": False,
        "checkpoint_every": 100,
    })  # fmt: skip
