"""Runs TRL 1.16.0's losses on random ragged log-probs and stores values and gradients.

    python tests/losses/trl_losses.py            # writes goldens/trl_losses.npz
    python tests/losses/trl_losses.py --check    # compares a fresh run with the file

The losses are TRL's own methods, called unbound on a namespace that stands in for the trainer;
the model is a stub that answers with given per-token log-probs, in float64 where TRL allows it.
`make_goldens.py` does the same from hidden states for some of them.
"""

import argparse
import sys
from collections import defaultdict
from pathlib import Path
from types import MethodType, SimpleNamespace

import numpy as np
import torch
from trl.experimental.cpo.cpo_trainer import CPOTrainer
from trl.experimental.orpo.orpo_trainer import ORPOTrainer
from trl.trainer.dpo_trainer import DPOTrainer
from trl.trainer.kto_trainer import KTOTrainer

FILE = Path(__file__).parent / "goldens" / "trl_losses.npz"
PAIRS, SLOTS, SEEDS = 5, 9, (0, 1)

# name -> (loss types, their weights, options of the namespace)
DPO = {
    **{
        kind: ([kind], [1.0], {})
        for kind in (
            "sigmoid", "sigmoid_norm", "ipo", "hinge", "nca_pair", "bco_pair", "sppo_hard", "aot",
            "aot_unpaired", "apo_zero", "apo_down", "discopop",
        )
    },
    "robust": (["robust"], [1.0], {"label_smoothing": 0.2}),
    "exo_pair": (["exo_pair"], [1.0], {"label_smoothing": 0.05, "beta": 0.4}),
    "aot smoothed": (["aot"], [1.0], {"label_smoothing": 0.1}),
    "aot_unpaired smoothed": (["aot_unpaired"], [1.0], {"label_smoothing": 0.1}),
    "discopop tau": (["discopop"], [1.0], {"discopop_tau": 0.5, "beta": 0.3}),
    "forward_kl": (["sigmoid"], [1.0], {"f_divergence_type": "forward_kl"}),
    "js": (["sigmoid"], [1.0], {"f_divergence_type": "js_divergence", "beta": 0.5}),
    "alpha": (
        ["sigmoid"], [1.0],
        {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.3},
    ),
    "js ipo": (["ipo"], [1.0], {"f_divergence_type": "js_divergence"}),
    "forward_kl exo": (
        ["exo_pair"], [1.0], {"f_divergence_type": "forward_kl", "label_smoothing": 0.05},
    ),
    "wpo": (["sigmoid"], [1.0], {"use_weighting": True}),
    "wpo ipo": (["ipo"], [1.0], {"use_weighting": True, "beta": 0.5}),
    "sft": (["ipo", "sft"], [1.0, 0.7], {}),
}  # fmt: skip
KTO = {
    "kto": {},
    "kto weighted": {"desirable_weight": 1.3, "undesirable_weight": 0.7, "beta": 0.5},
    "apo_zero_unpaired": {"loss_type": "apo_zero_unpaired", "calculate_KL": False},
}
# name -> (trainer, average log-probs, options)
FREE = {
    "cpo": ("cpo", False, {}),
    "cpo smoothed": ("cpo", False, {"label_smoothing": 0.1, "cpo_alpha": 0.0}),
    "simpo": (
        "cpo", True, {"loss_type": "simpo", "simpo_gamma": 1.4, "beta": 2.5, "cpo_alpha": 0.0},
    ),
    "orpo": ("orpo", True, {"beta": 0.1}),
    "orpo, 0.5": ("orpo", True, {"beta": 0.5}),
}  # fmt: skip


def draw(seed):
    """Per-token numbers of rows [chosen; rejected], ragged."""
    rng = np.random.default_rng(seed)
    rows = 2 * PAIRS
    lengths = rng.integers(1, SLOTS, rows)
    mask = (np.arange(SLOTS) < lengths[:, None]).astype(np.float32)
    numbers = {"mask": mask, "label": (np.arange(rows) % 3 != 1).astype(np.float32)}
    for name in ("logps", "ref", "kl", "ref_kl"):
        numbers[name] = (-np.abs(rng.normal(size=(rows, SLOTS))) * mask).astype(np.float32)
    squares = -np.abs(rng.normal(size=(rows, SLOTS))).astype(np.float32)
    return numbers | {"squares": squares}


def accelerator():
    return SimpleNamespace(
        device="cpu",
        gather=lambda x: x,
        gather_for_metrics=lambda x: x,
        reduce=lambda x, **_: x,
    )


def answer(logps, squares=None):
    """A model whose fused head answers with these log-probs."""
    shape = logps.shape
    outputs = SimpleNamespace(
        log_probs=logps,
        entropy=torch.zeros(shape),
        log_sum_sq_probs=squares,
        mean_logits=torch.zeros(shape),
        is_top1=torch.zeros(shape, dtype=torch.bool),
    )
    return lambda **_: outputs


def inputs(mask):
    """A prompt of one token before the responses."""
    rows = len(mask)
    completion = torch.cat([torch.zeros(rows, 1), torch.tensor(mask)], 1).long()
    ids = torch.ones_like(completion)
    return {"input_ids": ids, "attention_mask": ids, "completion_mask": completion}


def state(**options):
    args = SimpleNamespace(
        gradient_checkpointing_kwargs=None, discopop_tau=options.pop("discopop_tau", 0.05)
    )
    common = dict(
        model=plain_model(),
        accelerator=accelerator(),
        aux_loss_enabled=False,
        precompute_ref_logps=False,
        _metrics=defaultdict(lambda: defaultdict(list)),
        _total_train_tokens=0,
        _tp_size=1,
        args=args,
        beta=0.1,
        label_smoothing=0.0,
    )
    return SimpleNamespace(**(common | options))


def plain_model():
    """A module without adapters: with peft installed the trainers look into it."""
    model = torch.nn.Identity()
    model.is_gradient_checkpointing = False
    return model


def dpo(numbers, types, weights, options):
    dtype = (
        torch.float32 if options.get("f_divergence_type") == "alpha_divergence" else torch.float64
    )
    leaf = torch.tensor(numbers["logps"], dtype=dtype, requires_grad=True)
    masked = leaf * torch.tensor(numbers["mask"])
    policy = answer(masked, torch.tensor(numbers["squares"], dtype=dtype))
    common = dict(
        ref_model=answer(torch.tensor(numbers["ref"], dtype=dtype)),
        ld_alpha=None,
        f_divergence_type="reverse_kl",
        f_alpha_divergence_coef=1.0,
        loss_types=types,
        loss_weights=weights,
        use_weighting=False,
    )
    loss = DPOTrainer._compute_loss(
        state(**common | options), policy, inputs(numbers["mask"]), False
    )
    return loss, leaf


def kto(numbers, options):
    leaf = torch.tensor(numbers["logps"], dtype=torch.float64, requires_grad=True)
    policy = answer(leaf * torch.tensor(numbers["mask"]))
    reference = answer(torch.tensor(numbers["ref"]).double())
    sums = {id(policy): numbers["kl"], id(reference): numbers["ref_kl"]}

    def kl_logps(self, model, batch):
        return torch.tensor(sums[id(model)].sum(1)).double() if self.calculate_KL else None

    common = dict(
        ref_model=reference,
        loss_type="kto",
        calculate_KL=True,
        desirable_weight=1.0,
        undesirable_weight=1.0,
    )
    trainer = state(**common | options)
    trainer._compute_kl_logps = MethodType(kl_logps, trainer)
    batch = inputs(numbers["mask"]) | {"label": torch.tensor(numbers["label"]).bool()}
    return KTOTrainer._compute_loss(trainer, policy, batch, False), leaf, trainer


def free(numbers, kind, average, options):
    """CPO's loss with its likelihood term; of ORPO the odds-ratio part and the same term."""
    leaf = torch.tensor(numbers["logps"], dtype=torch.float64, requires_grad=True)
    mask = torch.tensor(numbers["mask"])
    logps = (leaf * mask).sum(1) / (mask.sum(1) if average else 1)
    nll = -(leaf * mask)[:PAIRS].sum() / mask[:PAIRS].sum()
    common = dict(alpha=0.0, loss_type="sigmoid", simpo_gamma=0.5, cpo_alpha=1.0)
    trainer = state(**common | options)
    sides = logps[:PAIRS], logps[PAIRS:]
    if kind == "orpo":
        return nll - ORPOTrainer.odds_ratio_loss(trainer, *sides)[0].mean(), leaf
    trainer.cpo_loss = MethodType(CPOTrainer.cpo_loss, trainer)
    logits = torch.zeros(1)
    trainer.concatenated_forward = lambda model, batch: (*sides, logits, logits, nll)
    return CPOTrainer.get_batch_loss_metrics(trainer, None, {})[0], leaf


def compute():
    """All arrays of the file, by name."""
    out = {}

    def keep(name, loss, leaf):
        out[f"{name}/loss"] = np.float64(loss.item())
        out[f"{name}/grad"] = torch.autograd.grad(loss, leaf)[0].numpy()

    for seed in SEEDS:
        numbers = draw(seed)
        out.update({f"{seed}/{name}": value for name, value in numbers.items()})
        for name, (types, weights, options) in DPO.items():
            keep(f"{seed}/dpo/{name}", *dpo(numbers, types, weights, dict(options)))
        for name, options in KTO.items():
            loss, leaf, trainer = kto(numbers, dict(options))
            keep(f"{seed}/kto/{name}", loss, leaf)
            for metric in ("kl", "rewards/chosen", "rewards/rejected", "logps/chosen"):
                value = trainer._metrics["train"][metric][0]
                out[f"{seed}/kto/{name}/{metric}"] = np.float64(value)
        for name, (kind, average, options) in FREE.items():
            keep(f"{seed}/free/{name}", *free(numbers, kind, average, dict(options)))
    return out


def write_or_check(file, compute):
    """Stores what `compute` gives, or with --check compares it with what is stored."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--check", action="store_true", help="compare instead of writing")
    check = parser.parse_args().check
    fresh = compute()
    if not check:
        file.parent.mkdir(exist_ok=True)
        np.savez_compressed(file, **fresh)
        return 0
    stored = np.load(file)
    assert sorted(stored.files) == sorted(fresh), set(stored.files) ^ set(fresh)
    for name, value in fresh.items():
        np.testing.assert_allclose(value, stored[name], rtol=1e-6, atol=1e-9, err_msg=name)
    return 0


if __name__ == "__main__":
    sys.exit(write_or_check(FILE, compute))
