"""GRPO of Chameleon-7B against a reward model (text -> image): no critic.

Command:  python launch/rl.py --config configs/t2i/chameleon_grpo.py \\
              --config.model.path=/ckpt/chameleon-7b-hf \\
              --config.reward.path=runs/chameleon_reward/model \\
              --config.prompts.path=PKU-Alignment/align-anything \\
              --config.sampling.image_tokenizer=/ckpt/chameleon-vq \\
              --workdir runs/chameleon_grpo
Hardware: eight accelerators with 80 GB each (fsdp=8); a small checkpoint runs on a CPU.
Time:     not measured on that hardware.
Expected: the mean reward of the samples rises while the KL to the reference stays bounded.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import required_placeholder


def get_config() -> ConfigDict:
    return ConfigDict({
        "pipeline": "dataset",
        "algorithm": "grpo",
        "seed": 0,
        "mesh": {"data": 1, "fsdp": -1},
        "model": {
            "path": required_placeholder(str),
            "dtype": "bfloat16", "param_dtype": "bfloat16", "remat": "full",
        },
        "prompts": {
            "path": required_placeholder(str),
            "template": "AA_T2I", "subset": "text-to-image", "split": "train",
            "limits": {"max_prompt_length": 1536},
        },
        "reward": {"path": required_placeholder(str), "dtype": "bfloat16", "batch_rows": 32},
        "rollout": {
            "prompts": 16, "samples": 8, "epochs": 1, "minibatches": 1, "iterations": 1000,
        },
        "sampling": {
            "images": "one", "image_tokenizer": required_placeholder(str),
            "max_new_tokens": 1032, "batch_rows": 128, "temperature": 1.0,
        },
        "objective": {"clip_low": 0.2, "kl_coef": 0.04},
        "optim": {
            "lr": 1e-6, "schedule": "cosine", "warmup_ratio": 0.03, "weight_decay": 0.01,
        },
        "frozen": ("vq/*",),
        "offload": False,
        "checkpoint_every": 100,
    })  # fmt: skip
