"""Cost model from LLaVA-1.5-7B on BeaverTails-V (text + image -> text), the settings of its reward
model; what PPO-Lagrangian limits.

Command:  python launch/train.py --config configs/ti2t/llava_cost.py \\
              --config.model.path=/ckpt/llava-1.5-7b-hf \\
              --config.data.path=PKU-Alignment/BeaverTails-V \\
              --workdir runs/llava_cost
Hardware: eight accelerators with 80 GB each (fsdp=8); a small checkpoint runs on a CPU.
Time:     not measured on that hardware.
Expected: accuracy and sign_accuracy on held-out pairs rise above one half.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder, required_placeholder


def get_config() -> ConfigDict:
    return ConfigDict({
        "recipe": "cost",
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
            "template": "SafeRLHF_V_Cost",
            "split": "train",
            "limits": {"max_length": 2048},
        },
        "objective": {"sign_coef": 1.0, "regularization": 0.001},
        "optim": {"lr": 1e-6, "schedule": "cosine", "warmup_ratio": 0.03},
        "train": {
            "epochs": 3, "batch_rows": 32, "accumulation": 1, "offload": False,
            "frozen": ("vision_tower/*",),
            "tower_cache": placeholder(str),  # folder for the frozen tower's features
            "checkpoint_every": 500,
            "log_every": 10,
        },
    })  # fmt: skip
