"""Judged responses and LLaVA-1.5-7B: CUT (Xu et al. 2023, arXiv:2312.14591, section 3).

Command:  python launch/train.py --config configs/ti2t/llava_cut.py \\
              --config.model.path=/ckpt/llava-1.5-7b-hf \\
              --config.data.path=PKU-Alignment/align-anything \\
              --workdir runs/llava_cut
Hardware: eight accelerators with 80 GB each (fsdp=8); a small checkpoint runs on a CPU.
Time:     not measured on that hardware.
Expected: the held-out loss falls; `inappropriate` is the share of tokens that judgments blame.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import required_placeholder


def get_config() -> ConfigDict:
    return ConfigDict({
        "recipe": "cut",
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
            "limits": {"max_length": 4096},
        },
        "objective": {"threshold": 1.1, "unlikelihood_weight": 0.1},
        "optim": {"lr": 1e-6, "schedule": "cosine", "warmup_ratio": 0.03},
        "train": {
            "epochs": 3, "batch_rows": 32, "accumulation": 1, "offload": False,
            "frozen": ("vision_tower/*",),
            "checkpoint_every": 500,
            "log_every": 10,
        },
    })  # fmt: skip
