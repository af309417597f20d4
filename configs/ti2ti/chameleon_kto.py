"""KTO of Chameleon-7B on preference pairs taken apart (text + image -> text + image), the
paper's settings of DPO.

Rows hold input_text, input_image, better_text, better_img, worse_text, worse_img.

Command:  python launch/train.py --config configs/ti2ti/chameleon_kto.py \\
              --config.model.path=/ckpt/chameleon-7b \\
              --config.data.path=/data/ti2ti.jsonl \\
              --workdir runs/chameleon_kto
Hardware: eight accelerators with 80 GB each (fsdp=8); a small checkpoint runs on a CPU.
Time:     not measured on that hardware.
Expected: the margin between good and bad responses grows.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import required_placeholder


def get_config() -> ConfigDict:
    return ConfigDict({
        "recipe": "kto",
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
            "template": "ti2ti_preference",
            "split": "train",
            "limits": {"max_length": 4096},
        },
        "objective": {"variant": "kto", "beta": 0.1},
        "optim": {"lr": 5e-7, "schedule": "cosine", "warmup_ratio": 0.03},
        "train": {
            "epochs": 2, "batch_rows": 32, "accumulation": 2, "offload": False,
            "frozen": ("vq/*",),
            "checkpoint_every": 500,
            "log_every": 10,
        },
    })  # fmt: skip
