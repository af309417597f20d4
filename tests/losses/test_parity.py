"""Losses and gradients of TRL 1.16.0 and Hugging Face on the same hidden states and head.

The expected numbers come from `make_goldens.py`, which runs those libraries.
"""

import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aa_jax import losses
from aa_jax.losses.preference import pair_up

HERE = Path(__file__).parent
GOLD = np.load(HERE / "goldens" / "trl.npz")

VARIANTS = {
    "sigmoid": {},
    "sigmoid, beta 0.5": {"beta": 0.5},
    "sigmoid_norm": {"variant": "sigmoid_norm", "beta": 2.0},
    "robust": {"variant": "robust", "label_smoothing": 0.1},
    "ipo": {"variant": "ipo"},
    "hinge": {"variant": "hinge"},
    "sigmoid + sft": {"sft_coef": 0.3},
    "label smoothing": {"label_smoothing": 0.1},
}


def slots():
    """(target_positions, targets, loss_mask) [6, 1, R] of the stored rows."""
    ids, completion = GOLD["ids"], GOLD["completion"]
    rows, width = len(ids), int(completion.sum(1).max()) + 1  # one slot of padding everywhere
    positions, targets = np.zeros((2, rows, 1, width), np.int32)
    mask = np.zeros((rows, 1, width), np.float32)
    for row in range(rows):
        at = np.flatnonzero(completion[row])
        positions[row, 0, : len(at)] = at - 1
        targets[row, 0, : len(at)] = ids[row, at]
        mask[row, 0, : len(at)] = 1
    return jnp.asarray(positions), jnp.asarray(targets), jnp.asarray(mask)


def by_pair(x):
    """TRL's rows [chosen; rejected] in our order chosen, rejected, chosen, ..."""
    return x.reshape(2, -1, *x.shape[1:]).swapaxes(0, 1).reshape(x.shape)


def preference(hidden, head, **options):
    where = slots()
    policy = losses.response_logps(hidden, head, *where, need_entropy=True)
    reference = losses.response_logps(
        jnp.asarray(GOLD["reference/hidden"]), jnp.asarray(GOLD["reference/head"]), *where
    )
    logps, lengths = losses.sequence_logps(policy.logps, policy.mask)
    ref_logps, _ = losses.sequence_logps(reference.logps, reference.mask)
    arrays = (by_pair(x) for x in (logps, ref_logps, lengths, jnp.ones_like(logps)))
    loss, metrics = losses.preference_loss(pair_up(*arrays), **options)
    return loss, metrics | {"entropy": losses.ratio(policy.entropy, policy.mask)}


def differentiate(fn):
    arguments = jnp.asarray(GOLD["policy/hidden"]), jnp.asarray(GOLD["policy/head"])
    return jax.jit(jax.value_and_grad(fn, (0, 1), has_aux=True))(*arguments)


def check(name, loss, grads):
    np.testing.assert_allclose(loss, GOLD[f"{name}/loss"], rtol=1e-6)
    for grad, key in zip(grads, ("dhidden", "dhead"), strict=True):
        want = GOLD[f"{name}/{key}"]
        np.testing.assert_allclose(grad, want, atol=1e-5 * np.abs(want).max())


@pytest.mark.parametrize("name", VARIANTS)
def test_preference_losses_of_trl(name):
    (loss, metrics), grads = differentiate(lambda h, w: preference(h, w, **VARIANTS[name]))
    check(f"preference/{name}", loss, grads)
    names = {
        "rewards/chosen": "chosen_rewards",
        "rewards/rejected": "rejected_rewards",
        "rewards/margins": "margin",
        "rewards/accuracies": "accuracy",
        "logps/chosen": "chosen_logps",
        "logps/rejected": "rejected_logps",
        "entropy": "entropy",
    }
    for theirs, ours in names.items():
        if f"preference/{name}/{theirs}" in GOLD:
            want = GOLD[f"preference/{name}/{theirs}"]
            np.testing.assert_allclose(metrics[ours].mean, want, rtol=2e-6, atol=1e-6)


def test_sft_is_hugging_face_causal_lm_loss():
    def sft(hidden, head):
        tokens = losses.response_logps(hidden, head, *slots())
        return losses.sft_loss(tokens.logps, tokens.mask, jnp.ones((6, 1)))

    (loss, metrics), grads = differentiate(sft)
    check("sft", loss, grads)
    assert metrics["loss"].count == GOLD["completion"].sum()


@pytest.mark.parametrize(
    ("name", "options"), [("plain", {}), ("centered", {"centering": 0.01}), ("margin", {})]
)
def test_reward_loss_of_trl(name, options):
    if name == "margin":
        options = {"margin": jnp.asarray(GOLD["reward/margin"])}

    @jax.jit
    @jax.value_and_grad
    def run(scores):
        return losses.reward_loss(scores[:4], scores[4:], jnp.ones(4), **options)[0]

    scores = jnp.asarray(GOLD["reward/scores"])
    loss, grad = run(scores)
    np.testing.assert_allclose(loss, GOLD[f"reward/{name}/loss"], rtol=1e-6)
    np.testing.assert_allclose(grad, GOLD[f"reward/{name}/dscores"], rtol=1e-5, atol=1e-7)
    _, metrics = losses.reward_loss(scores[:4], scores[4:], jnp.ones(4))
    for key in ("accuracy", "margin"):
        np.testing.assert_allclose(metrics[key].mean, GOLD[f"reward/{name}/{key}"], rtol=1e-6)


def test_the_stored_numbers_are_what_trl_gives_today():
    script = HERE / "make_goldens.py"
    done = subprocess.run(
        [sys.executable, str(script), "--check"], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
