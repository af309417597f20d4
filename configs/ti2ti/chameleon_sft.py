"""Supervised fine-tuning of Chameleon-7B (text + image -> text + image), the paper's settings
of feedback modelling.

Rows hold input_text, input_image, output_text, output_image.

Command:  python launch/train.py --config configs/ti2ti/chameleon_sft.py \\
              --config.model.path=/ckpt/chameleon-7b \\
              --config.data.path=/data/ti2ti.jsonl \\
              --workdir runs/chameleon_sft
Hardware: eight accelerators with 80 GB each (fsdp=8); a small checkpoint runs on a CPU.
Time:     not measured on that hardware.
Expected: the held-out loss falls.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import required_placeholder


def get_config() -> ConfigDict:
    return ConfigDict({
        "recipe": "sft",
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
            "template": "ti2ti",
            "split": "train",
            "limits": {"max_length": 4096},
        },
        "optim": {"lr": 1e-6, "schedule": "cosine", "warmup_ratio": 0.03},
        "train": {
            "epochs": 3, "batch_rows": 64, "accumulation": 2, "offload": False,
            "frozen": ("vq/*",),
            "checkpoint_every": 500,
            "log_every": 10,
        },
    })  # fmt: skip
