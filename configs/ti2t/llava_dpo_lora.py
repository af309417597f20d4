"""DPO of LLaVA-1.5-7B with low-rank adapters on a base in 4 bits (QLoRA; text + image -> text).

Command:  python launch/train.py --config configs/ti2t/llava_dpo_lora.py \\
              --config.model.path=/ckpt/llava-1.5-7b-hf \\
              --config.data.path=PKU-Alignment/align-anything \\
              --workdir runs/llava_dpo_lora
Hardware: one accelerator: base and adapters take 5 GiB (docs/lora.md), activations the rest; a
          small checkpoint runs on a CPU. --config.model.quantize.kind=none keeps the base in
          bfloat16, --config.lora.path=<PEFT folder> continues an adapter.
Time:     not measured on that hardware.
Expected: accuracy on held-out pairs rises above one half.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder, required_placeholder


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
            "quantize": {"kind": "nf4", "block": 64},
        },
        "lora": {
            "rank": 64,
            "alpha": 128.0,
            "targets": ("language_model/layers/*",),
            "rslora": False,
            "full": (),
            "path": placeholder(str),
        },
        "data": {
            "path": required_placeholder(str),
            "template": "AA_TI2T", "subset": "text-image-to-text",
            "split": "train",
            "limits": {"max_length": 2048},
        },
        "objective": {"beta": 0.1},
        "optim": {"lr": 2e-5, "schedule": "cosine", "warmup_ratio": 0.03},
        "train": {
            "epochs": 2, "batch_rows": 32, "accumulation": 8, "offload": False,
            "tower_cache": placeholder(str),  # folder for the frozen tower's features
            "checkpoint_every": 500,
            "log_every": 10,
        },
    })  # fmt: skip
