"""GRPO with rules for rewards on written arithmetic: SFT on flawed demonstrations, then the policy.

Command:  python launch/rl.py --config configs/t2t/arithmetic_grpo.py --workdir runs/arithmetic
          python launch/rl_table.py runs/arithmetic_0 runs/arithmetic_1
Hardware: two CPU cores, no download.
Time and result: docs/results/arithmetic.md.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    return ConfigDict({
        "pipeline": "arithmetic",
        "algorithm": "grpo",
        "seed": 0,
        "model": {"dim": 64, "layers": 2, "heads": 4, "mlp_dim": 160},
        "digits": 2,
        "slip": 0.6,
        "demonstrations": 16000,
        "sft": {"batch_rows": 64, "epochs": 4,
                "optim": {"lr": 3e-3, "schedule": "cosine", "warmup_ratio": 0.05}},
        "prompts": 4000,
        "reward": {"terms": {"exact": {"where": "answer"}, "format": {"weight": 0.2}}},
        "rollout": {"prompts": 32, "samples": 8, "minibatches": 2, "iterations": 40},
        "sampling": {"max_new_tokens": 32, "batch_rows": 64, "temperature": 1.0},
        "objective": {"kl_coef": 0.0, "clip_low": 0.2},
        "optim": {"lr": 5e-4, "schedule": "constant", "warmup_steps": 0},
        "test_problems": 512,
    })  # fmt: skip
