"""GRPO family and RLOO of TRL 1.16.0, PPO of 1.12.0, BCO of 1.13.0: values and gradients.

The expected numbers come from `trl_policy.py` and `trl_older.py`, which run TRL.
"""

import functools
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aa_jax import losses
from aa_jax.losses import policy
from aa_jax.losses.unpaired import RunningMean

HERE = Path(__file__).parent
GOLD = np.load(HERE / "goldens" / "trl_policy.npz")
OLDER = np.load(HERE / "goldens" / "trl_older.npz")
SEEDS = (0, 1)

# TRL's case -> our loss and options; "kl" and "entropy" name arrays of the file
CASES = {
    "grpo/grpo": (policy.grpo, {"ref_logps": "ref"}),
    "grpo/grpo no kl": (policy.grpo, {"kl_coef": 0.0}),
    "grpo/bnpo": (policy.ppo, {}),
    "grpo/dr_grpo": (policy.dr_grpo, {"budget": 11, "kl_coef": 0.1, "ref_logps": "ref"}),
    "grpo/dapo": (policy.dapo, {}),
    "grpo/cispo": (policy.cispo, {"clip_high": 0.2}),
    "grpo/gspo": (policy.gspo, {"kl_coef": 0.02, "ref_logps": "ref"}),
    "grpo/dual clip": (policy.ppo, {"dual_clip": 1.5}),
    "grpo/entropy": (
        policy.grpo, {"kl_coef": 0.0, "entropy": "entropy", "entropy_coef": 0.05},
    ),
    "grpo/dapo entropy": (
        policy.ppo, {"entropy": "entropy", "entropy_coef": 0.05},
    ),
    "rloo": (policy.rloo, {"clip_low": 0.2}),
}  # fmt: skip


@jax.jit
@functools.partial(jax.jacrev, has_aux=True)
def every_case(logps, n):
    found = {}
    for name, (fn, options) in CASES.items():
        options = {k: n[v] if isinstance(v, str) else v for k, v in options.items()}
        found[name] = fn(logps, n["old"], n["advantages"], n["mask"], **options)
    return {name: loss for name, (loss, _) in found.items()}, found


@functools.cache
def ours(seed):
    names = ("logps", "old", "ref", "advantages", "mask", "entropy")
    n = {name: jnp.asarray(GOLD[f"{seed}/{name}"]) for name in names}
    return every_case(n.pop("logps"), n)


def close(found, want, limit=1e-5):
    np.testing.assert_allclose(found, want, atol=limit * np.abs(want).max(), rtol=0)


@pytest.mark.parametrize("case", CASES)
def test_policy_losses_of_trl(case):
    """Value to 1e-6, gradient to 1e-5."""
    for seed in SEEDS:
        grads, found = ours(seed)
        loss, metrics = found[case]
        # Terms of both signs cancel in the loss: the scale is that of its terms.
        want = GOLD[f"{seed}/{case}/loss"]
        np.testing.assert_allclose(loss, want, rtol=1e-6, atol=1e-6 * np.abs(want).clip(0.1))
        close(grads[case], GOLD[f"{seed}/{case}/grad"])
        for name in ("kl", "entropy"):
            if f"{seed}/{case}/{name}" in GOLD and name in metrics:
                theirs = GOLD[f"{seed}/{case}/{name}"]
                np.testing.assert_allclose(metrics[name].mean, theirs, rtol=2e-6)


@pytest.mark.parametrize("case", ["default", "k3", "whiten"])
def test_ppo_of_trl(case):
    """Every stage on TRL's own numbers: KL, rewards, GAE, whitening, both losses."""
    gold = {name: OLDER[f"ppo/{case}/{name}"] for name in (
        "logprobs", "ref_logprobs", "scores", "values", "kl", "non_score_reward", "rewards",
        "advantages", "returns", "mask", "mask_p1", "new", "vpred", "dnew", "dvpred", "pg_loss",
        "vf_loss", "vf_clipfrac",
    )}  # fmt: skip
    f32 = {name: jnp.asarray(value, jnp.float32) for name, value in gold.items()}
    mask, longer = f32["mask"], f32["mask_p1"]
    estimator = "k3" if case == "k3" else "k1"
    kl = losses.kl_estimate(f32["logprobs"], f32["ref_logprobs"], estimator)
    close(kl * mask, gold["kl"] * gold["mask"], 1e-6)
    shaped = losses.shaped_rewards(
        f32["logprobs"], f32["ref_logprobs"], f32["scores"], mask, kl_coef=0.05, estimator=estimator
    )
    # TRL pays the score one slot behind the end token where there is one: rows 0 has no room.
    if case != "whiten":
        close(shaped[0], gold["rewards"][0], 1e-6)
    np.testing.assert_allclose(shaped.sum(1), (gold["non_score_reward"] * gold["mask"]).sum(1)
                               + gold["scores"], rtol=1e-5)  # fmt: skip
    gamma, lam = (0.9, 0.8) if case == "whiten" else (1.0, 0.95)
    advantages, returns = losses.gae(f32["rewards"], f32["values"], longer, gamma=gamma, lam=lam)
    close(returns, gold["returns"] * gold["mask_p1"])
    close(losses.whiten(advantages, mask) * mask, gold["advantages"])
    if case == "whiten":
        plain = losses.shaped_rewards(
            f32["logprobs"], f32["ref_logprobs"], 0 * f32["scores"], mask, kl_coef=0.05
        )
        ends = np.minimum(gold["mask"].sum(1), mask.shape[1] - 1).astype(int)
        plain = np.array(plain)
        plain[np.arange(len(ends)), ends] += gold["scores"]
        white = losses.whiten(jnp.asarray(plain), longer, shift_mean=False) * longer
        close(white, gold["rewards"])

    @jax.jit
    @functools.partial(jax.value_and_grad, argnums=(0, 1), has_aux=True)
    def both(new, vpred):
        actor = losses.policy_loss(new, f32["logprobs"], f32["advantages"], mask)
        critic = losses.value_loss(vpred, f32["values"], f32["returns"], longer, clip=0.2)
        loss, metrics = losses.mix(policy=(actor, 1.0), value=(critic, 0.1))
        return loss, metrics

    (_, metrics), (dnew, dvpred) = both(f32["new"], f32["vpred"])
    np.testing.assert_allclose(metrics["policy/loss"].mean, gold["pg_loss"], rtol=2e-6, atol=1e-7)
    np.testing.assert_allclose(metrics["value/loss"].mean, gold["vf_loss"], rtol=2e-6)
    fraction = metrics["value/value_clip_fraction"].mean
    np.testing.assert_allclose(fraction, gold["vf_clipfrac"], rtol=1e-6)
    close(dnew, gold["dnew"])
    close(dvpred, gold["dvpred"])


def test_bco_of_trl_with_its_running_shift():
    state = RunningMean()
    for step in range(3):
        gold = {
            name: OLDER[f"bco/{step}/{name}"]
            for name in ("chosen", "rejected", "ref_chosen", "ref_rejected", "dchosen",
                         "drejected", "loss", "delta")
        }  # fmt: skip
        sides = {k: jnp.asarray(v, jnp.float32) for k, v in gold.items()}
        logps = jnp.concatenate([sides["chosen"], sides["rejected"]])
        ref = jnp.concatenate([sides["ref_chosen"], sides["ref_rejected"]])
        label = jnp.concatenate([jnp.ones(len(gold["chosen"])), jnp.zeros(len(gold["rejected"]))])
        state = state.update(0.3 * (logps - ref), jnp.ones(len(label)))
        np.testing.assert_allclose(state.mean, gold["delta"], rtol=1e-5)

        def loss(logps, ref=ref, label=label, delta=state.mean):
            batch = losses.Unpaired(logps, ref, label, jnp.ones(len(label)))
            return losses.unpaired_loss(batch, variant="bco", beta=0.3, delta=delta)[0]

        value, grad = jax.value_and_grad(loss)(logps)
        np.testing.assert_allclose(value, gold["loss"], rtol=1e-6)
        close(grad, np.concatenate([gold["dchosen"], gold["drejected"]]))


def rerun(script):
    done = subprocess.run(
        [sys.executable, str(HERE / script), "--check"],
        capture_output=True, text=True, timeout=600,
        env={**os.environ, "TRL_EXPERIMENTAL_SILENCE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]


def test_the_stored_numbers_are_what_trl_gives_today():
    rerun("trl_policy.py")


if "TRL_PPO" in os.environ and "TRL_BCO" in os.environ:  # folders of the older versions

    def test_the_stored_numbers_are_what_older_versions_give():
        rerun("trl_older.py")
