"""Reinforcement learning on the digits world: a small Chameleon says and draws the digits it sees.

Image tokenizer, base model, SFT start, reward model, PPO and GRPO, from nothing. Drawings are
decoded and read by an independent reader (a support vector machine on real training digits).

Command:  python launch/rl.py --config configs/ti2ti/digits_rl.py --workdir runs/rl_ti2ti
Hardware: one CPU core, no download.
Time and result: docs/results/digits_rl_families.md.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    plain = {"batch_rows": 64, "frozen": ("vq/*",)}
    groups = {"prompts": 32, "samples": 4, "minibatches": 2}
    singles = {"prompts": 128, "samples": 1, "minibatches": 2, "epochs": 2}
    return ConfigDict({
        "pipeline": "digits",
        "subtask": "TI2TI",
        "seed": 0,
        "max_digits": 2,
        "min_digits": 2,
        "start": {
            "image_tokenizer": {
                "sizes": {"codes": 128, "embed_dim": 8},
                "batch_rows": 16, "continuous_steps": 300, "steps": 500,
            },
            "model": {
                "text": {"dim": 64, "layers": 3, "heads": 4, "kv_heads": 4, "mlp_dim": 192},
                "tower": {"codes": 128, "embed_dim": 8},
            },
            "pretrain_examples": 6000,
            "pretrain": {**plain, "steps": 500, "optim": {"lr": 3e-3, "weight_decay": 0.01}},
            "demonstrations": {"n": 3000, "flawed": 0.4},
            "sft": {**plain, "steps": 100, "optim": {"lr": 1e-3, "weight_decay": 0.01}},
            "preference_prompts": 5000,
        },
        "labels": "oracle",
        "reward": {"batch_rows": 32, "epochs": 3, "optim": {"lr": 5e-4, "weight_decay": 0.01}},
        "algorithms": {
            "grpo": {"rollout": groups, "objective": {"kl_coef": 0.3}},
            "ppo": {"rollout": singles, "kl": {"coef": 0.5}, "critic_lr_scale": 3.0},
        },
        "lrs": (2e-4,),
        "rollout": {"iterations": 40},
        "sampling": {"batch_rows": 128, "temperature": 1.0},
        "optim": {"schedule": "constant", "warmup_steps": 0},
        "frozen": ("vq/*",),
        "prompts": 1000,
        "validation_prompts": 64,
        "test_prompts": 512,
    })  # fmt: skip
