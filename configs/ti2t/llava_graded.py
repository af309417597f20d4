"""Reward model from the 0-3 grades of each dimension (ordinal regression), with LLaVA-1.5-7B.

Command:  python launch/train.py --config configs/ti2t/llava_graded.py \\
              --config.model.path=/ckpt/llava-1.5-7b-hf \\
              --config.data.path=PKU-Alignment/align-anything \\
              --workdir runs/llava_graded
Hardware: eight accelerators with 80 GB each (fsdp=8); a small checkpoint runs on a CPU.
Time:     not measured on that hardware.
Expected: the absolute error of held-out grades falls.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import required_placeholder


def get_config() -> ConfigDict:
    return ConfigDict({
        "recipe": "graded",
        "seed": 0,
        "mesh": {"data": 1, "fsdp": -1, "tensor": 1, "seq": 1},
        "model": {
            "path": required_placeholder(str),
            "dtype": "bfloat16",
            "param_dtype": "bfloat16",
            "remat": "full",
        },
        "data": {
            "path": required_placeholder(str),
            "template": "AA_TI2T", "subset": "text-image-to-text",
            "split": "train",
            "limits": {"max_length": 2048},
        },
        "objective": {
            "dimensions": (
                "prompt_following", "objective_rules", "clarity", "information_richness", "safety",
            ),
        },
        "optim": {"lr": 1e-6, "schedule": "cosine", "warmup_ratio": 0.03},
        "train": {
            "epochs": 3, "batch_rows": 32, "accumulation": 1, "offload": False,
            "frozen": ("vision_tower/*",),
            "checkpoint_every": 500,
            "log_every": 10,
        },
    })  # fmt: skip
