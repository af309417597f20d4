"""Runs TRL 1.16.0's GRPO and RLOO losses on random ragged log-probs; stores values and gradients.

python tests/losses/trl_policy.py            # writes goldens/trl_policy.npz
python tests/losses/trl_policy.py --check    # compares a fresh run with the file
"""

import importlib.util
import sys
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from trl.trainer.grpo_trainer import GRPOTrainer
from trl.trainer.rloo_trainer import RLOOTrainer

FILE = Path(__file__).parent / "goldens" / "trl_policy.npz"
ROWS, SLOTS, BUDGET, SEEDS = 6, 8, 11, (0, 1)

# name -> options of the namespace
GRPO = {
    "grpo": {"loss_type": "grpo", "beta": 0.04},
    "grpo no kl": {"loss_type": "grpo"},
    "bnpo": {"loss_type": "bnpo"},
    "dr_grpo": {"loss_type": "dr_grpo", "beta": 0.1},
    "dapo": {"loss_type": "dapo", "epsilon_high": 0.28},
    "cispo": {"loss_type": "cispo", "epsilon_high": 1.2},
    "gspo": {"loss_type": "grpo", "importance_sampling_level": "sequence",
             "epsilon_low": 3e-4, "epsilon_high": 4e-4, "beta": 0.02},
    "dual clip": {"loss_type": "dapo", "delta": 1.5},
    "entropy": {"loss_type": "grpo", "_entropy_bonus_enabled": True},
    "dapo entropy": {"loss_type": "dapo", "_entropy_bonus_enabled": True},
}  # fmt: skip


def draw(seed):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, SLOTS + 1, ROWS)
    mask = (np.arange(SLOTS) < lengths[:, None]).astype(np.float32)
    old = -np.abs(rng.normal(size=(ROWS, SLOTS)))
    numbers = {
        "mask": mask,
        "old": old,
        "logps": old + 0.3 * rng.normal(size=(ROWS, SLOTS)),
        "ref": old + 0.3 * rng.normal(size=(ROWS, SLOTS)),
        "entropy": np.abs(rng.normal(size=(ROWS, SLOTS))),
        "advantages": rng.normal(size=ROWS),
    }
    return {name: value.astype(np.float32) for name, value in numbers.items()}


def trainer(leaf, entropy, options):
    args = SimpleNamespace(
        delta=options.pop("delta", None), use_bias_correction_kl=False, steps_per_generation=1
    )
    common = dict(
        model=SimpleNamespace(training=True),
        args=args,
        accelerator=SimpleNamespace(
            gather=lambda x: x, reduce=lambda x, **_: x, num_processes=1, sync_gradients=True
        ),
        aux_loss_enabled=False,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        importance_sampling_level="token",
        beta=0.0,
        epsilon_low=0.2,
        epsilon_high=0.2,
        use_vllm=False,
        current_gradient_accumulation_steps=1,
        max_completion_length=BUDGET,
        _entropy_bonus_enabled=False,
        use_adaptive_entropy=False,
        entropy_coef=0.05,
        _metrics=defaultdict(lambda: defaultdict(list)),
        _get_per_token_logps_and_entropies=lambda *_, **__: (leaf, entropy, None),
    )
    return SimpleNamespace(**(common | options))


def run(numbers, kind, options):
    tensors = {name: torch.tensor(value).double() for name, value in numbers.items()}
    leaf = tensors["logps"].requires_grad_()
    entropy = tensors["entropy"].requires_grad_()
    mask = tensors["mask"]
    ids = torch.ones(mask.shape, dtype=torch.long)
    inputs = dict(
        prompt_ids=ids[:, :1],
        prompt_mask=ids[:, :1],
        completion_ids=ids,
        completion_mask=mask,
        advantages=tensors["advantages"],
        old_per_token_logps=tensors["old"],
        ref_per_token_logps=tensors["ref"],
        num_items_in_batch=mask.sum(),
        old_logps=(tensors["old"] * mask).sum(1),
    )
    state = trainer(leaf, entropy, dict(options))
    return kind._compute_loss(state, state.model, inputs), leaf, state


def compute():
    out = {}
    for seed in SEEDS:
        numbers = draw(seed)
        out.update({f"{seed}/{name}": value for name, value in numbers.items()})
        cases = {f"grpo/{name}": (GRPOTrainer, options) for name, options in GRPO.items()}
        cases["rloo"] = (RLOOTrainer, {})
        for name, (kind, options) in cases.items():
            loss, leaf, state = run(numbers, kind, options)
            out[f"{seed}/{name}/loss"] = np.float64(loss.item())
            out[f"{seed}/{name}/grad"] = torch.autograd.grad(loss, leaf)[0].numpy()
            for metric in ("kl", "entropy"):
                if state._metrics["train"][metric]:
                    value = state._metrics["train"][metric][0]
                    out[f"{seed}/{name}/{metric}"] = np.float64(value)
    return out


def common():
    """`trl_losses.py` next to this file."""
    spec = importlib.util.spec_from_file_location(
        "trl_losses", Path(__file__).with_name("trl_losses.py")
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    sys.exit(common().write_or_check(FILE, compute))
