"""PPO of LLaVA-1.5-7B against a reward model (text + image -> text), the paper's settings.

Command:  python launch/rl.py --config configs/ti2t/llava_ppo.py \\
              --config.model.path=/ckpt/llava-1.5-7b-hf \\
              --config.reward.path=runs/llava_reward/model \\
              --config.prompts.path=PKU-Alignment/align-anything \\
              --workdir runs/llava_ppo
Hardware: eight accelerators with 80 GB each (fsdp=8); a small checkpoint runs on a CPU.
Time:     not measured on that hardware.
Expected: the mean reward of the samples rises while the KL to the reference stays bounded.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder, required_placeholder


def get_config() -> ConfigDict:
    return ConfigDict({
        "pipeline": "dataset",
        "algorithm": "ppo",
        "seed": 0,
        "mesh": {"data": 1, "fsdp": -1, "tensor": 1, "seq": 1},
        "model": {
            "path": required_placeholder(str),
            "dtype": "bfloat16", "param_dtype": "bfloat16", "remat": "full",
        },
        "prompts": {
            "path": required_placeholder(str),
            "template": "AA_TI2T", "subset": "text-image-to-text", "split": "train",
            "limits": {"max_prompt_length": 1536},
        },
        "reward": {"path": required_placeholder(str), "dtype": "bfloat16", "batch_rows": 32},
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
            "moment_dtype": placeholder(str),  # "bfloat16": two bytes per weight less
        },
        "frozen": ("vision_tower/*",),
        "offload": False,
        "checkpoint_every": 100,
    })  # fmt: skip
