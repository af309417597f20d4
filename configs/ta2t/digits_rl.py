"""Reinforcement learning on the digits world: a small Qwen2-Audio that hears dialled tones.

Base model, SFT start, reward model, PPO and GRPO, from nothing.

Command:  python launch/rl.py --config configs/ta2t/digits_rl.py --workdir runs/rl_ta2t
Hardware: one CPU core, no download.
Time and result: docs/results/digits_rl_families.md.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    packed = {"batch_rows": 16, "pack_length": 128}
    groups = {"prompts": 32, "samples": 4, "minibatches": 2}
    singles = {"prompts": 128, "samples": 1, "minibatches": 2, "epochs": 2}
    return ConfigDict({
        "pipeline": "digits",
        "subtask": "TA2T",
        "seed": 0,
        "max_digits": 2,
        "min_digits": 2,  # as many as the test shows, where sequences are held out
        "start": {
            "model": {
                "text": {"dim": 64, "layers": 3, "heads": 4, "kv_heads": 4, "mlp_dim": 192},
                "tower": {"dim": 64, "layers": 2, "heads": 4},
            },
            "pretrain_examples": 16_000,
            "pretrain": {
                **packed, "steps": 800, "optim": {"lr": 3e-3, "weight_decay": 0.01},
            },
            "demonstrations": {"n": 6000},
            "sft": {**packed, "steps": 250, "optim": {"lr": 1e-3, "weight_decay": 0.01}},
            "preference_prompts": 6000,
        },
        "labels": "oracle",
        "reward": {"batch_rows": 32, "epochs": 3, "optim": {"lr": 5e-4, "weight_decay": 0.01}},
        "algorithms": {
            "grpo": {"rollout": groups, "objective": {"kl_coef": 0.3}},
            "grpo_truth": {
                "algorithm": "grpo", "reward": "oracle", "rollout": groups,
                "objective": {"kl_coef": 0.04},
            },
            "ppo": {"rollout": singles, "kl": {"coef": 0.2}, "critic_lr_scale": 3.0},
        },
        "lrs": (2e-4,),
        "rollout": {"iterations": 40},
        "sampling": {"batch_rows": 128, "temperature": 1.0},
        "optim": {"schedule": "constant", "warmup_steps": 0},
        "frozen": ("audio_tower/*",),
        "prompts": 2000,
        "validation_prompts": 64,
        "test_prompts": 512,
    })  # fmt: skip
