"""PPO of Qwen2-VL-7B-Instruct against a reward model (text + video -> text), the paper's settings.

Command:  python launch/rl.py --config configs/tv2t/qwen2_vl_ppo.py \\
              --config.model.path=/ckpt/qwen2-vl-7b-instruct \\
              --config.reward.path=runs/qwen2_vl_reward/model \\
              --config.prompts.path=PKU-Alignment/align-anything \\
              --workdir runs/qwen2_vl_ppo
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
        "mesh": {"data": 1, "fsdp": -1},
        "model": {
            "path": required_placeholder(str),
            "dtype": "bfloat16", "param_dtype": "bfloat16", "remat": "full",
        },
        "prompts": {
            "path": required_placeholder(str),
            "template": "AA_TV2T", "subset": "text-video-to-text", "split": "train",
            "limits": {"max_prompt_length": 1536},
        },
        "reward": {"path": required_placeholder(str), "dtype": "bfloat16", "batch_rows": 32},
        "critic": {"path": placeholder(str), "lr_scale": 1.0},
        "rollout": {
            "prompts": 8, "samples": 1, "epochs": 1, "minibatches": 1, "iterations": 1000,
        },
        "sampling": {
            "max_new_tokens": 512, "batch_rows": 8, "temperature": 1.0, "top_p": 1.0,
        },
        "kl": {"coef": 0.02, "target": placeholder(float)},
        "estimator": {
            "gamma": 1.0, "lam": 0.95, "whiten": False, "reward_clip": 50.0,
        },
        "objective": {"clip_low": 0.2, "value_clip": 5.0},
        "optim": {
            "lr": 5e-8, "schedule": "cosine", "warmup_ratio": 0.03, "weight_decay": 0.0,
        },
        "frozen": ("vision_tower/*",),
        "offload": False,
        "checkpoint_every": 100,
    })  # fmt: skip
