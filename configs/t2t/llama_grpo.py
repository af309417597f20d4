"""GRPO of Llama-3.1-8B-Instruct against a reward model (text -> text): no critic.

Command:  python launch/rl.py --config configs/t2t/llama_grpo.py \\
              --config.model.path=/ckpt/llama-3.1-8b-instruct \\
              --config.reward.path=runs/llama_reward/model \\
              --config.prompts.path=PKU-Alignment/align-anything \\
              --workdir runs/llama_grpo
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
            "template": "AA_T2T", "subset": "text-to-text", "split": "train",
            "limits": {"max_prompt_length": 1536},
        },
        "reward": {"path": required_placeholder(str), "dtype": "bfloat16", "batch_rows": 32},
        "rollout": {
            "prompts": 16, "samples": 8, "epochs": 1, "minibatches": 1, "iterations": 1000,
        },
        "sampling": {
            "max_new_tokens": 512, "batch_rows": 128, "temperature": 1.0, "top_p": 1.0,
        },
        "objective": {"clip_low": 0.2, "kl_coef": 0.04},
        "optim": {
            "lr": 1e-6, "schedule": "cosine", "warmup_ratio": 0.03, "weight_decay": 0.01,
        },
        "frozen": (),
        "offload": False,
        "checkpoint_every": 100,
    })  # fmt: skip
