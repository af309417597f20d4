"""Feedback modelling with Qwen2-Audio-7B (text + audio -> text): (x, y) -> critique and
refinement, the paper's settings.

Command:  python launch/train.py --config configs/ta2t/qwen2_audio_feedback.py \\
              --config.model.path=/ckpt/Qwen2-Audio-7B-Instruct \\
              --config.data.path=PKU-Alignment/align-anything \\
              --workdir runs/qwen2_audio_feedback
Hardware: eight accelerators with 80 GB each (fsdp=8); a small checkpoint runs on a CPU.
Time:     not measured on that hardware.
Expected: the held-out loss falls.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder, required_placeholder


def get_config() -> ConfigDict:
    return ConfigDict({
        "recipe": "feedback",
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
            "template": "AA_TA2T", "subset": "text-audio-to-text",
            "split": "train",
            "limits": {"max_length": 4096},
        },
        "optim": {"lr": 1e-6, "schedule": "cosine", "warmup_ratio": 0.03},
        "train": {
            "epochs": 3, "batch_rows": 32, "accumulation": 1, "offload": False,
            "frozen": ("audio_tower/*",),
            "tower_cache": placeholder(str),  # folder for the frozen tower's features
            "checkpoint_every": 500,
            "log_every": 10,
        },
    })  # fmt: skip
