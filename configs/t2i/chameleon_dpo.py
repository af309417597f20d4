"""DPO of Chameleon-7B on preference pairs (text -> image), the paper's settings.

Command:  python launch/train.py --config configs/t2i/chameleon_dpo.py \\
              --config.model.path=/ckpt/chameleon-7b \\
              --config.data.path=PKU-Alignment/align-anything \\
              --workdir runs/chameleon_dpo
Hardware: eight accelerators with 80 GB each (fsdp=8); a small checkpoint runs on a CPU.
Time:     not measured on that hardware.
Expected: accuracy on held-out pairs rises above one half.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import required_placeholder


def get_config() -> ConfigDict:
    return ConfigDict({
        "recipe": "dpo",
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
            "template": "AA_T2I", "subset": "text-to-image",
            "split": "train",
            "limits": {"max_length": 4096},
        },
        "objective": {"beta": 0.1},
        "optim": {"lr": 5e-7, "schedule": "cosine", "warmup_ratio": 0.03},
        "train": {
            "epochs": 2, "batch_rows": 64, "accumulation": 2, "offload": False,
            "frozen": ("vq/*",),
            "checkpoint_every": 500,
            "log_every": 10,
        },
    })  # fmt: skip
