"""The other side of llava_dpo.py: transformers and TRL's own DPO loss, on the same checkpoint.

A side is a function without arguments: one update (or one round of sampling), and its figures.
"""

import contextlib
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import transformers
from clock import timed
from trl.trainer.dpo_trainer import DPOTrainer
from trl.trainer.utils import add_fused_lm_head

from aa_jax.data.tokens import Encoded

Inputs = dict[str, torch.Tensor]
Loss = Callable[[], tuple[torch.Tensor, dict[str, float]]]


def load(folder: Path):
    """The checkpoint in float32 with a frozen tower and fused attention."""
    model = transformers.LlavaForConditionalGeneration.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="sdpa"
    )
    model.model.vision_tower.requires_grad_(False)
    return model


def pixels_of(items: list[Encoded]) -> torch.Tensor:
    pixels = np.concatenate([item.media["pixel_values"] for item in items])
    return torch.tensor(pixels, dtype=torch.float32)


def pairs(items: list[Encoded], pad_id: int) -> Inputs:
    """The rows TRL's collator makes: all chosen, then all rejected; right padded to the longest."""
    rows = [(item.prompt, item.responses[side]) for side in (0, 1) for item in items]
    width = max(len(prompt) + len(response) for prompt, response in rows)
    ids = np.full((len(rows), width), pad_id, np.int64)
    attention, completion = np.zeros_like(ids), np.zeros_like(ids)
    for row, (prompt, response) in enumerate(rows):
        end = len(prompt) + len(response)
        ids[row, :end] = np.concatenate([prompt, response])
        attention[row, :end] = 1
        completion[row, len(prompt) : end] = 1
    return {
        "input_ids": torch.tensor(ids),
        "attention_mask": torch.tensor(attention),
        "completion_mask": torch.tensor(completion),
        "pixel_values": pixels_of(items * 2),
    }


def trainer_of(model, beta: float) -> SimpleNamespace:
    """What the methods of `DPOTrainer` read from the trainer, without its data loading."""
    same = lambda x, **_: x  # noqa: E731
    return SimpleNamespace(
        model=model, ref_model=None, precompute_ref_logps=True, beta=beta, aux_loss_enabled=False,
        accelerator=SimpleNamespace(
            device=torch.device("cpu"), gather=same, gather_for_metrics=same, reduce=same,
            autocast=contextlib.nullcontext,
        ),
        args=SimpleNamespace(gradient_checkpointing_kwargs=None, discopop_tau=0.05),
        ld_alpha=None, f_divergence_type="reverse_kl", f_alpha_divergence_coef=1.0,
        loss_types=["sigmoid"], loss_weights=[1.0], label_smoothing=0.0, use_weighting=False,
        _metrics=defaultdict(lambda: defaultdict(list)), _total_train_tokens=0, _tp_size=1,
    )  # fmt: skip


def ref_logps(folder: Path, inputs: Inputs) -> Inputs:
    """Log-probs of the reference by `DPOTrainer.compute_ref_log_probs`."""
    reference = load(folder).eval()
    add_fused_lm_head(reference)
    logps = DPOTrainer.compute_ref_log_probs(trainer_of(reference, 0.0), reference, inputs)
    return dict(zip(("ref_chosen_logps", "ref_rejected_logps"), logps, strict=True))


def trl_loss(model, inputs: Inputs, beta: float) -> Loss:
    """``() -> (loss, figures)`` by `DPOTrainer._compute_loss`, with the metrics it logs."""
    add_fused_lm_head(model, outputs=("log_probs", "entropy", "mean_logits", "is_top1"))
    trainer = trainer_of(model, beta)
    names = {"chosen_logps": "logps/chosen", "rejected_logps": "logps/rejected"}

    def compute():
        loss = DPOTrainer._compute_loss(trainer, model, inputs, False)
        logged = trainer._metrics["train"]
        figures = {ours: logged[theirs][-1] for ours, theirs in names.items()}
        return loss, {**figures, "entropy": logged["entropy"][-1]}

    return compute


def bare_loss(model, inputs: Inputs, beta: float) -> Loss:
    """``() -> (loss, figures)``: the least a torch step needs. Only response tokens reach the
    head (TRL does so on GPUs alone), and nothing is computed to be logged."""
    mask = inputs["completion_mask"][:, 1:].bool()
    targets, row = inputs["input_ids"][:, 1:][mask], mask.nonzero()[:, 0]
    backbone = {k: inputs[k] for k in ("input_ids", "attention_mask", "pixel_values")}
    ref_chosen, ref_rejected = inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]

    def compute():
        hidden = model.model(**backbone, use_cache=False).last_hidden_state[:, :-1]
        logits = model.lm_head(hidden[mask])
        logps = -torch.nn.functional.cross_entropy(logits, targets, reduction="none")
        chosen, rejected = logps.new_zeros(len(mask)).index_add(0, row, logps).chunk(2)
        margin = beta * ((chosen - ref_chosen) - (rejected - ref_rejected))
        return -torch.nn.functional.logsigmoid(margin).mean(), {}

    return compute


def dpo_step(
    folder: Path,
    inputs: Inputs,
    make_loss: Callable[..., Loss],
    *,
    beta: float,
    lr: float,
    b1: float,
    b2: float,
    eps: float,
    clip_norm: float,
) -> Callable[[], dict[str, float]]:
    """One update with the fused AdamW, the default of transformers' trainer."""
    model = load(folder).train()
    compute = make_loss(model, inputs, beta)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        trained, lr=lr, betas=(b1, b2), eps=eps, weight_decay=0.0, fused=True
    )

    def update() -> dict[str, float]:
        optimizer.zero_grad(set_to_none=True)
        loss, figures = compute()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(trained, clip_norm)
        optimizer.step()
        return {"loss": loss.item(), "grad_norm": norm.item(), **figures}

    return update


def sampling(model, items: list[Encoded], new_tokens: int, pad_id: int) -> Callable:
    """`generate`: left-padded prompts, its default (growing) cache, no token ends a response."""
    width = max(len(item.prompt) for item in items)
    ids = np.full((len(items), width), pad_id, np.int64)
    for row, item in enumerate(items):
        ids[row, width - len(item.prompt) :] = item.prompt
    inputs = {
        "input_ids": torch.tensor(ids),
        "attention_mask": torch.tensor(ids != pad_id).long(),
        "pixel_values": pixels_of(items),
    }
    how = transformers.GenerationConfig(
        do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=new_tokens,
        eos_token_id=None, pad_token_id=pad_id, use_cache=True,
    )  # fmt: skip

    def run() -> np.ndarray:
        with torch.inference_mode():
            return model.generate(**inputs, generation_config=how)[:, width:].numpy()

    return run


def sampled_logps(model, item: Encoded, tokens: np.ndarray) -> np.ndarray:
    """Log-probs of sampled tokens by the plain forward pass, without a cache."""
    ids = torch.tensor(np.concatenate([item.prompt, tokens[:-1]]).astype(np.int64))[None]
    with torch.inference_mode():
        out = model.model(input_ids=ids, pixel_values=pixels_of([item])).last_hidden_state[0]
        logps = model.lm_head(out[len(item.prompt) - 1 :]).log_softmax(-1).numpy()
    return logps[np.arange(len(tokens)), tokens]


def with_best_threads(call: Callable, cores: int) -> tuple[int, Callable]:
    """(threads, the call on that many): all cores or one, whichever is faster here and now.

    Small operations on several threads can be slower than on one, by far so on a busy machine,
    where a thread that waits for its turn stops all others.
    """

    def on(threads: int) -> Callable:
        def run():
            torch.set_num_threads(threads)
            return call()

        return run

    best: dict[int, float] = {}
    for threads in {cores, 1}:
        on(threads)()
        best[threads] = min(timed(on(threads))[0] for _ in range(2))
    chosen = min(best, key=best.get)
    return chosen, on(chosen)
