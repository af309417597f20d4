"""Learning from language feedback with LLaVA-1.5-7B (text + image -> text), the paper's settings.

A feedback model learns the dataset's critiques and refinements, the model improves its own answers
with them, and the improved answers become preference pairs for DPO.

Command:  python launch/llf.py --config configs/ti2t/llava_llf.py \\
              --config.model.path=/ckpt/llava-1.5-7b-hf \\
              --config.data.path=PKU-Alignment/align-anything \\
              --workdir runs/llava_llf
Hardware: eight accelerators with 80 GB each (fsdp=8); a small checkpoint runs on a CPU.
Time:     not measured on that hardware.
Expected: accuracy on held-out pairs rises above one half.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder, required_placeholder


def get_config() -> ConfigDict:
    training = {"frozen": ("vision_tower/*",), "batch_rows": 32, "checkpoint_every": 500}
    return ConfigDict({
        "pipeline": "dataset",
        "seed": 0,
        "mesh": {"data": 1, "fsdp": -1, "tensor": 1, "seq": 1},
        "model": {
            "path": required_placeholder(str),
            "dtype": "bfloat16", "param_dtype": "bfloat16", "remat": "full",
        },
        "data": {
            "path": required_placeholder(str),
            "template": "AA_TI2T", "subset": "text-image-to-text", "split": "train",
            "limits": {"max_length": 4096},
        },
        # The prompts that are answered and improved: those of the dataset.
        "prompts": {"size": placeholder(int), "limits": {"max_prompt_length": 1024}},
        "lengths": {"answer": 512, "feedback": 512},
        "sampling": {
            "batch_rows": 64, "temperature": 1.0, "feedback_temperature": 0.0, "top_p": 1.0,
        },
        "feedback": {
            **training, "epochs": 3,
            "optim": {"lr": 1e-6, "schedule": "cosine", "warmup_ratio": 0.03},
        },
        "pairs": placeholder(int),
        "baseline": False,
        "dpo": {
            **training, "epochs": 2, "lrs": (1e-6,),
            "optim": {"schedule": "cosine", "warmup_ratio": 0.03},
            "objective": {"beta": 0.1},
        },
    })  # fmt: skip
