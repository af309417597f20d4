"""Reward model from Qwen2-VL-7B on preference pairs (text + video -> text), the paper's settings.

Command:  python launch/train.py --config configs/tv2t/qwen2_vl_reward.py \\
              --config.model.path=/ckpt/Qwen2-VL-7B-Instruct \\
              --config.data.path=PKU-Alignment/align-anything \\
              --workdir runs/qwen2_vl_reward
Hardware: eight accelerators with 80 GB each (fsdp=8); a small checkpoint runs on a CPU.
Time:     not measured on that hardware.
Expected: accuracy on held-out pairs rises above one half.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder, required_placeholder


def get_config() -> ConfigDict:
    return ConfigDict({
        "recipe": "reward",
        "seed": 0,
        "mesh": {"data": 1, "fsdp": -1},
        "model": {
            "path": required_placeholder(str),
            "dtype": "bfloat16",
            "param_dtype": "bfloat16",
            "remat": "full",
        },
        "data": {
            "path": required_placeholder(str),
            "template": "AA_TV2T", "subset": "text-video-to-text",
            "split": "train",
            "limits": {"max_length": 4096},
        },
        "objective": {"regularization": 0.001},
        "optim": {"lr": 1e-6, "schedule": "cosine", "warmup_ratio": 0.01},
        "train": {
            "epochs": 3, "batch_rows": 8, "accumulation": 1, "offload": False,
            "frozen": ("vision_tower/*",),
            "tower_cache": placeholder(str),  # folder for the frozen tower's features
            "checkpoint_every": 500,
            "log_every": 10,
        },
    })  # fmt: skip
