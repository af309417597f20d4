"""Runs TRL's and Hugging Face's losses on a tiny random Llama and stores what they give.

    python tests/losses/make_goldens.py            # writes goldens/trl.npz
    python tests/losses/make_goldens.py --check    # compares a fresh run with the file

The losses are TRL's own methods, called unbound on a namespace that stands in for the trainer.
The backbone runs once in float32; its hidden states and the head are the inputs stored in the
file, and everything behind them is differentiated in float64, as far as TRL lets it.
"""

import argparse
import sys
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from trl.trainer.dpo_trainer import DPOTrainer
from trl.trainer.reward_trainer import RewardTrainer
from trl.trainer.utils import add_fused_lm_head

FILE = Path(__file__).parent / "goldens" / "trl.npz"
OUTPUTS = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
PROMPTS, CHOSEN, REJECTED = (4, 2, 5), (5, 7, 1), (3, 2, 6)
WIDTH, VOCAB, DIM = 14, 41, 16

# name -> (TRL's loss types, their weights, options)
PREFERENCE = {
    "sigmoid": (["sigmoid"], [1.0], {}),
    "sigmoid, beta 0.5": (["sigmoid"], [1.0], {"beta": 0.5}),
    "sigmoid_norm": (["sigmoid_norm"], [1.0], {"beta": 2.0}),
    "robust": (["robust"], [1.0], {"label_smoothing": 0.1}),
    "ipo": (["ipo"], [1.0], {}),
    "hinge": (["hinge"], [1.0], {}),
    "sigmoid + sft": (["sigmoid", "sft"], [1.0, 0.3], {}),
    # On a single pair "aot" has nothing to sort and is DPO with label smoothing.
    "label smoothing": (["aot"], [1.0], {"label_smoothing": 0.1}),
}
REWARD = {"plain": (None, False), "centered": (0.01, False), "margin": (None, True)}


def batch():
    """Rows [chosen; rejected] of input ids, attention and completion masks, right padded."""
    rng = np.random.default_rng(0)
    ids, attention, completion = np.zeros((3, 2 * len(PROMPTS), WIDTH), np.int64)
    prompts = [rng.integers(1, VOCAB, n) for n in PROMPTS]
    for row, (prompt, length) in enumerate(zip(prompts * 2, CHOSEN + REJECTED, strict=True)):
        end = len(prompt) + length
        ids[row, :end] = np.concatenate([prompt, rng.integers(1, VOCAB, length)])
        attention[row, :end] = 1
        completion[row, len(prompt) : end] = 1
    return ids, attention, completion


def llama(seed):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=DIM,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=32,
        initializer_range=0.4,
        attn_implementation="eager",
    )
    return LlamaForCausalLM(config)


class Frozen:
    """A Llama whose backbone answers with given hidden states: a leaf we can differentiate."""

    def __init__(self, seed, ids, attention):
        self.model = llama(seed)
        with torch.no_grad():
            out = self.model.model(input_ids=ids, attention_mask=attention)
        self.hidden = out.last_hidden_state.double().requires_grad_()
        self.model.double()
        self.rows = slice(None)
        self.model.model.register_forward_hook(self._replace)
        self.head = self.model.lm_head.weight

    def _replace(self, module, args, output):
        output.last_hidden_state = self.hidden[self.rows]
        return output

    def gradients(self, loss):
        return [g.float().numpy() for g in torch.autograd.grad(loss, (self.hidden, self.head))]


def trainer(policy, reference, types, weights, beta=0.1, label_smoothing=0.0):
    keep = SimpleNamespace(
        device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x, reduce=lambda x, **_: x
    )
    return SimpleNamespace(
        model=policy.model,
        ref_model=reference.model,
        accelerator=keep,
        aux_loss_enabled=False,
        ld_alpha=None,
        precompute_ref_logps=False,
        f_divergence_type="reverse_kl",
        f_alpha_divergence_coef=1.0,
        loss_types=types,
        loss_weights=weights,
        beta=beta,
        label_smoothing=label_smoothing,
        use_weighting=False,
        _metrics=defaultdict(lambda: defaultdict(list)),
        _total_train_tokens=0,
        _tp_size=1,
        args=SimpleNamespace(gradient_checkpointing_kwargs=None, discopop_tau=0.05),
    )


def preference(policy, reference, arrays, types, weights, options):
    """TRL's loss over all pairs; pair by pair for "aot", which would sort them."""
    pairs = len(PROMPTS)
    groups = [[i] for i in range(pairs)] if types == ["aot"] else [list(range(pairs))]
    parts = []
    for group in groups:
        rows = group + [i + pairs for i in group]
        policy.rows = reference.rows = rows
        inputs = dict(
            zip(("input_ids", "attention_mask", "completion_mask"), arrays[:, rows], strict=True)
        )
        state = trainer(policy, reference, types, weights, **options)
        parts.append(DPOTrainer._compute_loss(state, policy.model, inputs, False))
    policy.rows = reference.rows = slice(None)
    metrics = {k: v[-1] for k, v in state._metrics["train"].items()}
    return sum(parts) / len(parts), metrics


def compute():
    """All arrays of the file, by name."""
    ids, attention, completion = batch()
    arrays = torch.tensor(np.stack([ids, attention, completion]))
    policy = Frozen(1, arrays[0], arrays[1])
    reference = Frozen(2, arrays[0], arrays[1])
    out = {"ids": ids.astype(np.int32), "completion": completion.astype(np.float32)}
    for name, model in (("policy", policy), ("reference", reference)):
        out[f"{name}/hidden"] = model.hidden.detach().float().numpy()
        out[f"{name}/head"] = model.head.detach().float().numpy()

    def keep(name, loss, grads, **extra):
        out[f"{name}/loss"] = np.float64(loss.item())
        out[f"{name}/dhidden"], out[f"{name}/dhead"] = grads
        out.update({f"{name}/{key}": np.float64(value) for key, value in extra.items()})

    labels = arrays[0].masked_fill(arrays[2] == 0, -100)
    loss = policy.model(input_ids=arrays[0], attention_mask=arrays[1], labels=labels).loss
    keep("sft", loss, policy.gradients(loss))

    for model in (policy, reference):
        add_fused_lm_head(model.model, outputs=OUTPUTS)
    for name, (types, weights, options) in PREFERENCE.items():
        loss, metrics = preference(policy, reference, arrays, types, weights, options)
        whole = {} if types == ["aot"] else metrics  # of the last pair alone otherwise
        kept = {k: v for k, v in whole.items() if k.startswith(("rewards/", "logps/", "entropy"))}
        keep(f"preference/{name}", loss, policy.gradients(loss), **kept)

    rng = np.random.default_rng(1)
    scores = torch.tensor(rng.normal(size=(8, 1)) * 2, dtype=torch.float32).double()
    margin = torch.tensor(np.abs(rng.normal(size=4)), dtype=torch.float32).double()
    out["reward/scores"] = scores.float().numpy()[:, 0]
    out["reward/margin"] = margin.float().numpy()
    for name, (centering, with_margin) in REWARD.items():
        leaf = scores.clone().requires_grad_()
        state = SimpleNamespace(
            model=torch.nn.Identity(),
            accelerator=SimpleNamespace(gather=lambda x: x, gather_for_metrics=lambda x: x),
            args=SimpleNamespace(center_rewards_coefficient=centering),
            _metrics=defaultdict(lambda: defaultdict(list)),
            _total_train_tokens=0,
            _tp_size=1,
        )
        inputs = {"attention_mask": torch.ones(8, 3)} | ({"margin": margin} if with_margin else {})
        answer = SimpleNamespace(logits=leaf)
        loss = RewardTrainer.compute_loss(state, lambda answer=answer, **_: answer, inputs)
        out[f"reward/{name}/loss"] = np.float64(loss.item())
        out[f"reward/{name}/dscores"] = torch.autograd.grad(loss, leaf)[0].numpy()[:, 0]
        for key in ("accuracy", "margin"):
            out[f"reward/{name}/{key}"] = np.float64(state._metrics["train"][key][0])
    return out


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="compare instead of writing")
    check = parser.parse_args().check
    fresh = compute()
    if not check:
        FILE.parent.mkdir(exist_ok=True)
        np.savez_compressed(FILE, **fresh)
        return 0
    stored = np.load(FILE)
    assert sorted(stored.files) == sorted(fresh), set(stored.files) ^ set(fresh)
    for name, value in fresh.items():
        np.testing.assert_allclose(value, stored[name], rtol=2e-5, atol=1e-6, err_msg=name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
