"""Fifty steps of DPO and GRPO with the TPU kernels (interpreted) beside those with the oracles."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from aa_jax import models, objectives
from aa_jax.kernels.attention import api as attention_api
from aa_jax.kernels.attention import pallas_tpu as attention_tpu
from aa_jax.kernels.attention import reference as attention_reference
from aa_jax.kernels.dispatch import Implementation
from aa_jax.kernels.linear_logprob import api as logprob_api
from aa_jax.kernels.linear_logprob import pallas_tpu as logprob_tpu
from aa_jax.kernels.linear_logprob import reference as logprob_reference
from aa_jax.rl import objectives as rl_objectives

STEPS, ROWS, LENGTH, SLOTS, PROMPT, VOCAB = 50, 4, 40, 12, 16, 96

LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": VOCAB,
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 64, "initializer_range": 0.2,
}  # fmt: skip


def kernels(hidden, head, targets, mask, bias, spec):
    engine = logprob_tpu.engine(logprob_tpu.Sizes(16, 128, 128), interpret=True)
    return logprob_tpu._call(hidden, head, targets, mask, bias, spec, engine)


SIDES = {
    "kernels": (
        functools.partial(
            attention_tpu.attention, sizes=attention_tpu.Sizes(128, 128), interpret=True
        ),
        kernels,
    ),
    "oracles": (attention_reference.attention, logprob_reference.linear_logprob),
}


def take(monkeypatch, side):
    """What ``impl="auto"`` finds on a CPU from here on."""
    for api, fn in zip((attention_api, logprob_api), SIDES[side], strict=True):
        monkeypatch.setitem(api.IMPLEMENTATIONS, "xla", Implementation(fn, preferred=None))
    jax.clear_caches()


def batch(rng, sequences):
    """Rows ``prompt | response | ...`` that share the prompt."""
    out = {
        "tokens": rng.integers(3, VOCAB, (ROWS, LENGTH)),
        "positions": np.zeros((ROWS, LENGTH)), "intervals": np.zeros((ROWS, LENGTH, 4)),
        "target_positions": np.zeros((ROWS, sequences, SLOTS)),
        "targets": np.zeros((ROWS, sequences, SLOTS)),
    }  # fmt: skip
    mask = np.zeros((ROWS, sequences, SLOTS), np.float32)
    for b in range(ROWS):
        at = np.arange(PROMPT)
        out["positions"][b, :PROMPT], out["intervals"][b, :PROMPT, 3] = at, at + 1
        start = PROMPT
        for s in range(sequences):
            n = int(rng.integers(4, SLOTS + 1))
            at = np.arange(start, start + n)
            out["positions"][b, at] = PROMPT + np.arange(n)
            out["intervals"][b, at] = np.stack([0 * at, 0 * at + PROMPT, 0 * at + start, at + 1], 1)
            out["target_positions"][b, s, :n] = np.r_[PROMPT - 1, at[:-1]]
            out["targets"][b, s, :n] = out["tokens"][b, at]
            mask[b, s, :n] = 1
            start += n
    out = {name: jnp.asarray(x, jnp.int32) for name, x in out.items()}
    return out | {"loss_mask": mask, "sequence_mask": np.ones((ROWS, sequences), np.float32)}


def dpo(model, start, stored):
    stored = stored | {"ref_logps": jax.jit(objectives.compute_ref_logps(model))(start, stored)}
    return objectives.dpo(model, beta=0.3), stored


def grpo(model, start, stored):
    tokens = jax.jit(lambda p, b: objectives.token_logps(model, p, b).logps)(start, stored)
    signs = np.where(np.arange(tokens.shape[1]) % 2, -1.0, 1.0)[None, :, None]
    more = {
        "old_logps": tokens,
        "ref_token_logps": tokens,
        "advantages": signs * stored["loss_mask"],
    }
    return rl_objectives.policy(model, loss="grpo", kl_coef=0.1), stored | more


def losses_of(side, make, monkeypatch):
    """Loss of every step, and the log-ratio of equal weights before the first."""
    take(monkeypatch, side)
    model = models.build(LLAMA)
    start = params = model.init(jax.random.key(0))
    rng = np.random.default_rng(1)
    prepared = [make(model, start, batch(rng, 2)) for _ in range(2)]
    objective = prepared[0][0]
    stored = prepared[0][1]
    if "ref_logps" in stored:
        now = jax.jit(objectives.compute_ref_logps(model))(params, stored)
        ratio = now - stored["ref_logps"]
    else:
        now = jax.jit(lambda p, b: objectives.token_logps(model, p, b).logps)(params, stored)
        ratio = (now - stored["old_logps"]) * stored["loss_mask"]
    optimizer = optax.adam(3e-3)

    @jax.jit
    def step(params, state, batch):
        (loss, _), grads = jax.value_and_grad(objective, has_aux=True)(params, batch)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    state, found = optimizer.init(params), []
    text = step.lower(params, state, stored).as_text()
    for _, one in itertools.islice(itertools.cycle(prepared), STEPS):
        params, state, loss = step(params, state, one)
        found.append(float(loss))
    return np.array(found), np.asarray(ratio), text


@pytest.mark.slow
@pytest.mark.parametrize("make", [dpo, grpo])
def test_fifty_steps_agree_with_the_oracles(make, monkeypatch):
    want, _, plain = losses_of("oracles", make, monkeypatch)
    got, ratio, text = losses_of("kernels", make, monkeypatch)
    # Interpreted grids are loops; the oracles have none but the layers'.
    assert text.count("stablehlo.while") > plain.count("stablehlo.while")
    assert (ratio == 0).all()
    assert abs(want[-1] - want[0]) > 0.05  # it learned, so there was something to diverge
    assert np.abs(got - want).max() <= 1e-3
