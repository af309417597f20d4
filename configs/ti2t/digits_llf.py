"""Learning from language feedback on the digits world (text + image -> text), from nothing.

Command:  python launch/llf.py --config configs/ti2t/digits_llf.py --workdir runs/llf
Hardware: two CPU cores, no download.
Time and expected result: docs/results/digits_llf.md, from `make quickstart`.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    return ConfigDict({
        "pipeline": "digits",
        "seed": 0,
        "max_digits": 3,
        "model": {"vision_dim": 64, "dim": 96, "layers": 3, "heads": 4, "mlp_dim": 256},
        "tower": {"steps": 500, "batch_rows": 128, "lr": 3e-3},
        "pretrain_examples": 30_000,
        "pretrain": {
            "frozen": ("vision_tower/*",),
            "batch_rows": 24,
            "pack_length": 128,
            "steps": 1100,
            "optim": {"lr": 3e-3, "weight_decay": 0.01},
            "checkpoint_every": 400,
        },
        "demonstrations": {"n": 20_000},
        "sft": {
            "frozen": ("vision_tower/*",),
            "batch_rows": 24,
            "pack_length": 128,
            "steps": 500,
            "optim": {"lr": 2e-3, "weight_decay": 0.01},
            "checkpoint_every": 250,
        },
        "annotator": "bounded",
        "preference_prompts": 3200,
        "feedback_prompts": 3200,
        "pairs": 2000,
        "feedback": {
            "frozen": ("vision_tower/*",),
            "batch_rows": 24,
            "pack_length": 128,
            "epochs": 5,
            "optim": {"lr": 1e-3},
        },
        "dpo": {
            "frozen": ("vision_tower/*",),
            "lrs": (3e-5, 1e-4, 3e-4),
            "batch_rows": 64,
            "epochs": 2,
            "optim": {"schedule": "cosine"},
            "objective": {"beta": 0.1},
        },
        "sampling": {"batch_rows": 256, "temperature": 1.0, "feedback_temperature": 0.0},
        "validation_prompts": 512,
        "test_prompts": 1024,
    })  # fmt: skip
