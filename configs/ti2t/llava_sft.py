"""Supervised fine-tuning of LLaVA-1.5-7B on image instructions (text + image -> text).

Command:  python launch/train.py --config configs/ti2t/llava_sft.py \\
              --config.model.path=/ckpt/llava-1.5-7b-hf \\
              --config.data.path=PKU-Alignment/Align-Anything-TI2T-Instruction-100K \\
              --workdir runs/llava_sft
Hardware: eight accelerators with 80 GB each (fsdp=8); a small checkpoint runs on a CPU.
Time:     not measured on that hardware.
Expected: the held-out loss falls.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder, required_placeholder


def get_config() -> ConfigDict:
    return ConfigDict({
        "recipe": "sft",
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
            "template": "AA_TI2T",
            "split": "train",
            "limits": {"max_length": 4096},
        },
        "optim": {"lr": 2e-5, "schedule": "cosine", "warmup_ratio": 0.03},
        "train": {
            "epochs": 1, "batch_rows": 128, "accumulation": 4, "offload": False,
            "frozen": ("vision_tower/*",),
            "tower_cache": placeholder(str),  # folder for the frozen tower's features
            "checkpoint_every": 500,
            "log_every": 10,
        },
    })  # fmt: skip
