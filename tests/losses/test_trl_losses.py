"""Preference losses of TRL 1.16.0, value and gradient, on random ragged log-probs.

The expected numbers come from `trl_losses.py`, which runs TRL.
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

HERE = Path(__file__).parent
GOLD = np.load(HERE / "goldens" / "trl_losses.npz")
SEEDS = (0, 1)

# TRL's case -> our options
PREFERENCE = {
    "sigmoid": {},
    "sigmoid_norm": {"variant": "sigmoid_norm"},
    "ipo": {"variant": "ipo"},
    "hinge": {"variant": "hinge"},
    "robust": {"variant": "robust", "label_smoothing": 0.2},
    "exo_pair": {"variant": "exo_pair", "label_smoothing": 0.05, "beta": 0.4},
    "nca_pair": {"variant": "nca"},
    "bco_pair": {"variant": "bco_pair"},
    "sppo_hard": {"variant": "sppo_hard"},
    "aot": {"variant": "aot"},
    "aot smoothed": {"variant": "aot", "label_smoothing": 0.1},
    "aot_unpaired": {"variant": "aot_unpaired"},
    "aot_unpaired smoothed": {"variant": "aot_unpaired", "label_smoothing": 0.1},
    "apo_zero": {"variant": "apo_zero"},
    "apo_down": {"variant": "apo_down"},
    "discopop": {"variant": "discopop"},
    "discopop tau": {"variant": "discopop", "tau": 0.5, "beta": 0.3},
    "forward_kl": {"divergence": "forward_kl"},
    "js": {"divergence": "js", "beta": 0.5},
    "alpha": {"divergence": "alpha", "alpha": 0.7},
    "js ipo": {"variant": "ipo", "divergence": "js"},
    "forward_kl exo": {"variant": "exo", "divergence": "forward_kl", "label_smoothing": 0.05},
    "wpo": {"wpo": True},
    "wpo ipo": {"variant": "ipo", "wpo": True, "beta": 0.5},
    "sft": {"variant": "ipo", "sft_coef": 0.7},
}
FREE = {
    "cpo": {"variant": "cpo"},
    "cpo smoothed": {"variant": "cpo", "label_smoothing": 0.1, "sft_coef": 0.0},
    "simpo": {"variant": "simpo", "beta": 2.5, "gamma": 1.4},
    "orpo": {"variant": "orpo"},
    "orpo, 0.5": {"variant": "orpo", "beta": 0.5},
}


def numbers(seed):
    names = ("logps", "mask", "ref", "squares", "kl", "ref_kl", "label")
    return {name: jnp.asarray(GOLD[f"{seed}/{name}"]) for name in names}


def by_pair(x):
    """TRL's rows [chosen; rejected] in our order chosen, rejected, chosen, ..."""
    return x.reshape(2, -1, *x.shape[1:]).swapaxes(0, 1).reshape(-1, 1, *x.shape[1:])


def preference(n, *, wpo=False, **options):
    logps, mask, ref, squares = (by_pair(n[k]) for k in ("logps", "mask", "ref", "squares"))
    total, lengths = losses.sequence_logps(logps, mask)
    ref_logps = None
    if losses.needs_reference(options.get("variant", "sigmoid")):
        ref_logps, _ = losses.sequence_logps(ref, mask)
    if wpo:
        options["weights"] = losses.wpo_weights(logps, squares, mask).reshape(-1, 2).prod(-1)
    pairs = losses.pair_up(total, ref_logps, lengths, jnp.ones_like(total))
    return losses.preference_loss(pairs, **options)


def kto(n, **options):
    ones = jnp.ones(len(n["mask"]))
    total, _ = losses.sequence_logps(n["logps"], n["mask"])
    if options.get("variant", "kto") == "kto":
        options["kl"] = losses.reference_kl(n["kl"].sum(1), n["ref_kl"].sum(1), ones)
    batch = losses.Unpaired(total, n["ref"].sum(1), n["label"], ones)
    return losses.unpaired_loss(batch, **options)


KTO = {
    "kto": {},
    "kto weighted": {"desirable_weight": 1.3, "undesirable_weight": 0.7, "beta": 0.5},
    "apo_zero_unpaired": {"variant": "apo_zero_unpaired"},
}


@jax.jit
@functools.partial(jax.jacrev, has_aux=True)
def every_case(logps, others):
    """case -> loss (differentiated), and case -> (loss, metrics); all of them in one program."""
    n = others | {"logps": logps}
    found = {f"dpo/{name}": preference(n, **options) for name, options in PREFERENCE.items()}
    found |= {f"free/{name}": preference(n, **options) for name, options in FREE.items()}
    found |= {f"kto/{name}": kto(n, **options) for name, options in KTO.items()}
    return {name: loss for name, (loss, _) in found.items()}, found


@functools.cache
def ours(seed):
    """case -> (loss, metrics, gradient)."""
    others = numbers(seed)
    grads, found = every_case(others.pop("logps"), others)
    return {name: (*found[name], grads[name]) for name in found}


CASES = [f"dpo/{name}" for name in PREFERENCE] + [f"free/{name}" for name in FREE]


@pytest.mark.parametrize("case", CASES + [f"kto/{name}" for name in KTO])
def test_value_and_gradient_are_those_of_trl(case):
    """Value to 1e-6 and gradient to 1e-5, relative to its largest entry."""
    for seed in SEEDS:
        loss, _, grad = ours(seed)[case]
        np.testing.assert_allclose(loss, GOLD[f"{seed}/{case}/loss"], rtol=1e-6)
        want = GOLD[f"{seed}/{case}/grad"]
        np.testing.assert_allclose(grad, want, atol=1e-5 * np.abs(want).max(), rtol=0)


@pytest.mark.parametrize("name", KTO)
def test_metrics_of_kto_are_those_of_trl(name):
    names = {"rewards/chosen": "chosen_rewards", "rewards/rejected": "rejected_rewards",
             "logps/chosen": "chosen_logps", "kl": "kl"}  # fmt: skip
    for seed in SEEDS:
        metrics = ours(seed)[f"kto/{name}"][1]
        for theirs, mine in names.items():
            if mine in metrics:
                want = GOLD[f"{seed}/kto/{name}/{theirs}"]
                np.testing.assert_allclose(metrics[mine].mean, want, rtol=1e-5)


def test_the_stored_numbers_are_what_trl_gives_today():
    done = subprocess.run(
        [sys.executable, str(HERE / "trl_losses.py"), "--check"],
        capture_output=True, text=True, timeout=300,
        env={**os.environ, "TRL_EXPERIMENTAL_SILENCE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
