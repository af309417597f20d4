"""KTO of Qwen2-VL-7B on preference pairs taken apart (text + video -> text), the paper's
settings of DPO.

Command:  python launch/train.py --config configs/tv2t/qwen2_vl_kto.py \\
              --config.model.path=/ckpt/Qwen2-VL-7B-Instruct \\
              --config.data.path=PKU-Alignment/align-anything \\
              --workdir runs/qwen2_vl_kto
Hardware: eight accelerators with 80 GB each (fsdp=8); a small checkpoint runs on a CPU.
Time:     not measured on that hardware.
Expected: the margin between good and bad responses grows.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder, required_placeholder


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
            "template": "AA_TV2T", "subset": "text-video-to-text",
            "split": "train",
            "limits": {"max_length": 4096},
        },
        "objective": {"variant": "kto", "beta": 0.1},
        "optim": {"lr": 1e-7, "schedule": "cosine", "warmup_ratio": 0.1},
        "train": {
            "epochs": 2, "batch_rows": 24, "accumulation": 1, "offload": False,
            "frozen": ("vision_tower/*",),
            "tower_cache": placeholder(str),  # folder for the frozen tower's features
            "checkpoint_every": 500,
            "log_every": 10,
        },
    })  # fmt: skip
