"""PPO of Chameleon-7B against a reward model (text + image -> text + image),
the paper's settings, paid for what it draws.

Rows hold input_text and input_image.

Command:  python launch/rl.py --config configs/ti2ti/chameleon_ppo.py \\
              --config.model.path=/ckpt/chameleon-7b-hf \\
              --config.reward.path=runs/chameleon_reward/model \\
              --config.prompts.path=/data/ti2ti.jsonl \\
              --config.sampling.image_tokenizer=/ckpt/chameleon-vq \\
              --workdir runs/chameleon_ppo
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
            "template": "ti2ti", "split": "train",
            "limits": {"max_prompt_length": 1536},
        },
        "reward": {"path": required_placeholder(str), "dtype": "bfloat16", "batch_rows": 32},
        "critic": {"path": placeholder(str), "lr_scale": 0.5},
        "rollout": {
            "prompts": 32, "samples": 1, "epochs": 1, "minibatches": 1, "iterations": 1000,
        },
        "sampling": {
            "images": "one", "image_tokenizer": required_placeholder(str),
            "max_new_tokens": 1536, "batch_rows": 32, "temperature": 0.2,
        },
        "kl": {"coef": 0.02, "target": placeholder(float)},
        "estimator": {
            "gamma": 1.0, "lam": 0.95, "whiten": False, "reward_clip": 50.0,
        },
        "objective": {"clip_low": 0.2, "value_clip": 5.0},
        "optim": {
            "lr": 1e-5, "schedule": "cosine", "warmup_ratio": 0.03, "weight_decay": 0.0,
        },
        "frozen": ("vq/*",),
        "accumulation": 4, "offload": False,
        "checkpoint_every": 100,
    })  # fmt: skip
