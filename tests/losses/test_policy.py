"""Policy, value and Lagrangian losses: worked numbers, closed forms, and what connects them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aa_jax import losses
from aa_jax.errors import ConfigError
from aa_jax.losses.lagrangian import (
    combined_advantages,
    lagrangian,
    observe_costs,
    update_multiplier,
)
from aa_jax.losses.policy import POLICY_LOSSES, aggregate

RNG = np.random.default_rng(0)
B, T = 4, 6
LENGTHS = np.array([6, 2, 4, 1])
MASK = (np.arange(T) < LENGTHS[:, None]).astype(np.float64)
OLD = -RNG.random((B, T)) * 2
NEW = OLD + 0.4 * RNG.normal(size=(B, T))
REF = OLD + 0.4 * RNG.normal(size=(B, T))
ADV = np.array([1.0, -0.5, 0.7, -2.0])
RATIO = np.exp(NEW - OLD)
SEQ_RATIO = np.exp(((NEW - OLD) * MASK).sum(1) / LENGTHS)
TOTAL = (NEW * MASK).sum(1)
NEEDED = {"grpo": {"kl_coef": 0.0}, "dr_grpo": {"budget": 8}}


def f32(*arrays):
    return [jnp.asarray(x, jnp.float32) for x in arrays]


def row(*values):
    return jnp.array([values], jnp.float32)


def surrogate(ratio, advantage, low, high):
    return -np.minimum(ratio * advantage, np.clip(ratio, 1 - low, 1 + high) * advantage)


def k3(d):
    return np.exp(-d) - 1 + d


TOKENS = functools.partial(surrogate, RATIO, ADV[:, None])
ROWS = MASK / LENGTHS[:, None] / B  # weights of "tokens of a response, then responses"
CLOSED = {
    "ppo": ({}, (TOKENS(0.2, 0.2) * MASK).sum() / MASK.sum()),
    "grpo": ({},
             ((TOKENS(0.2, 0.2) + 0.04 * k3(NEW - REF)) * ROWS).sum()),
    "dr_grpo": ({"budget": 16}, (TOKENS(0.2, 0.2) * MASK).sum() / (B * 16)),
    "dapo": ({}, (TOKENS(0.2, 0.28) * MASK).sum() / MASK.sum()),
    "gspo": ({}, surrogate(SEQ_RATIO, ADV, 3e-4, 4e-4).mean()),
    "cispo": ({"clip_high": 0.1},
              -(np.minimum(RATIO, 1.1) * ADV[:, None] * NEW * MASK).sum() / MASK.sum()),
    "rloo": ({}, -(ADV * TOTAL).mean()),
    "reinforce_pp": ({}, (TOKENS(0.2, 0.2) * ROWS).sum()),
}  # fmt: skip


def every_policy_loss(logps, old, adv, mask, ref):
    found = {}
    for name, fn in POLICY_LOSSES.items():
        options = CLOSED[name][0] | ({"ref_logps": ref} if name == "grpo" else {})
        found[name] = fn(logps, old, adv, mask, **options)
    return {name: loss for name, (loss, _) in found.items()}, found


def test_each_paper_divides_as_it_says_whatever_the_padding_holds():
    run = jax.jit(lambda *args: jax.jacrev(every_policy_loss, has_aux=True)(*args))
    dirty = f32(*(np.where(MASK > 0, x, np.nan) for x in (NEW, OLD, REF)))
    grads, found = run(*dirty[:2], *f32(ADV, MASK), dirty[2])
    # Further padding, of tokens and of rows, changes nothing.
    pad = [(0, 2), (0, 3)]
    more = f32(*(np.pad(x, pad, constant_values=np.nan) for x in (NEW, OLD, REF)))
    wide = f32(np.pad(ADV, (0, 2), constant_values=np.nan), np.pad(MASK, pad))
    _, padded = run(*more[:2], *wide, more[2])
    for name, (_, want) in CLOSED.items():
        loss, metrics = found[name]
        np.testing.assert_allclose(loss, want, rtol=2e-5, err_msg=name)
        np.testing.assert_allclose(losses.total_loss(metrics["loss"]), loss, rtol=1e-6)
        np.testing.assert_allclose(padded[name][0], want, rtol=2e-5, err_msg=name)
        assert np.isfinite(grads[name]).all(), name
        assert (np.asarray(grads[name])[MASK == 0] == 0).all(), name


def test_ppo_worked_example():
    old, new, ones = row(-1.2, -0.7), row(-1.0, -1.0), row(1.0, 1.0)
    loss, metrics = losses.policy_loss(new, old, row(1.0, -1.0), ones)
    np.testing.assert_allclose(loss, -0.2, atol=1e-6)
    np.testing.assert_allclose(metrics["ratio"].total, 1.221403 + 0.740818, atol=1e-5)
    assert metrics["clip_fraction"].mean == 1


@pytest.mark.parametrize(
    ("advantage", "ratio", "want"),
    [(1, 1.5, -1.28), (1, 0.5, -0.5), (-1, 0.5, 0.8), (-1, 1.5, 1.5), (-1, 5, 3)],
)
def test_asymmetric_and_dual_clip_worked_examples(advantage, ratio, want):
    loss, _ = losses.policy_loss(
        row(np.log(ratio)), row(0.0), row(advantage), row(1.0),
        clip_low=0.2, clip_high=0.28, dual_clip=3.0,
    )  # fmt: skip
    np.testing.assert_allclose(loss, want, rtol=1e-6)


def test_value_clip_worked_example():
    arguments = row(7.0), row(0.0), row(2.0), row(1.0)
    loss, metrics = losses.value_loss(*arguments, clip=5.0)
    assert loss == 12.5 and metrics["value_clip_fraction"].mean == 0
    assert losses.value_loss(*arguments, clip=1.0)[0] == 12.5
    assert losses.value_loss(row(3.0), row(0.0), row(5.0), row(1.0), clip=1.0)[0] == 8.0
    assert losses.value_loss(row(3.0), row(0.0), row(5.0), row(1.0), clip=None)[0] == 2.0
    dirty = jnp.array([[1.0, jnp.nan]])
    grad = jax.grad(lambda v: losses.value_loss(v, dirty, dirty, row(1.0, 0.0))[0])(dirty)
    assert np.isfinite(grad).all()


def test_the_choice_of_the_mean_is_explicit():
    values, mask = jnp.array([[1.0, 2, 3], [4, 9, 9]]), jnp.array([[1.0, 1, 1], [1, 0, 0]])
    found = {how: aggregate(values, mask, how, budget=3) for how in ("token", "sequence")}
    assert found["sequence"].mean == 3.0 and found["token"].mean == 2.5
    assert aggregate(values, mask, "sequence_sum").mean == 5.0
    np.testing.assert_allclose(aggregate(values, mask, "budget", budget=4).mean, 10 / 8)
    with pytest.raises(ConfigError, match="no aggregate 'mean'"):
        aggregate(values, mask, "mean")
    with pytest.raises(ConfigError, match="give budget="):
        aggregate(values, mask, "budget")


def test_on_policy_every_ratio_is_one_and_the_gradient_is_reinforce():
    """Before the first update all token losses have the gradient of -A log π."""
    old, mask = f32(OLD, MASK)
    adv = jnp.asarray(ADV, jnp.float32)

    def slope(name, options):
        return np.asarray(
            jax.grad(lambda x: POLICY_LOSSES[name](x, old, adv, mask, **options)[0])(old)
        )

    token = -ADV[:, None] * MASK / MASK.sum()
    response = -ADV[:, None] * ROWS
    want = {
        "ppo": token, "dapo": token, "cispo": token, "grpo": response, "reinforce_pp": response,
        "gspo": response, "dr_grpo": -ADV[:, None] * MASK / (B * 8),
        "rloo": -ADV[:, None] * MASK / B,
    }  # fmt: skip
    for name in POLICY_LOSSES:
        found = slope(name, NEEDED.get(name, {}))
        np.testing.assert_allclose(found, want[name], atol=1e-6, err_msg=name)
    clipped = slope("rloo", {"clip_low": 0.2})
    np.testing.assert_allclose(clipped, want["rloo"], atol=1e-6)


def test_extreme_ratios_and_nothing_but_padding():
    old = jnp.zeros((1, 4))
    new, mask = row(1e4, -1e4, 1e4, -1e4), jnp.ones((1, 4))

    @jax.jit
    @jax.jacrev
    def slopes(x):
        found = {}
        for name, fn in POLICY_LOSSES.items():
            for sign in (1.0, -1.0):
                options = NEEDED.get(name, {})
                found[name, sign] = fn(x, old, jnp.array([sign]), mask, **options)[0]
                found[name, "none", sign] = fn(x, old, jnp.array([sign]), 0 * mask, **options)[0]
        found["kl", 1.0] = losses.policy_loss(
            x, old, mask, mask, ref_logps=old, kl_coef=1.0, dual_clip=3.0
        )[0]
        return {str(key): value for key, value in found.items()}

    for name, grad in slopes(new).items():
        assert np.isfinite(grad).all(), name
        assert "none" not in name or (grad == 0).all()


def test_kl_entropy_and_ptx_terms():
    new, old, ref, mask = f32(NEW, OLD, REF, MASK)
    entropy = jnp.abs(ref)
    adv = jnp.asarray(ADV, jnp.float32)
    plain = losses.policy_loss(new, old, adv, mask)[0]
    loss, metrics = losses.policy_loss(
        new, old, adv, mask, ref_logps=ref, kl_coef=0.3, kl_estimator="k2",
        entropy=entropy, entropy_coef=0.01, how="sequence",
    )  # fmt: skip
    mean_entropy = (np.abs(REF) * MASK).sum() / MASK.sum()
    want = ((TOKENS(0.2, 0.2) + 0.3 * 0.5 * (NEW - REF) ** 2) * ROWS).sum() - 0.01 * mean_entropy
    np.testing.assert_allclose(loss, want, rtol=1e-5)
    np.testing.assert_allclose(metrics["entropy"].mean, mean_entropy, rtol=1e-5)
    sft = losses.sft_loss(new[:, None], mask[:, None], jnp.ones((B, 1)))
    both, metrics = losses.mix(
        policy=(losses.policy_loss(new, old, adv, mask), 1.0), ptx=(sft, 16.0)
    )
    np.testing.assert_allclose(both, plain + 16 * sft[0], rtol=1e-6)
    assert len(metrics["loss"]) == 2 and metrics["ptx/nll"] == sft[1]["nll"]
    with pytest.raises(ConfigError, match="give ref_logps"):
        losses.policy_loss(new, old, adv, mask, kl_coef=0.1)
    with pytest.raises(ConfigError, match="needs the entropy"):
        losses.policy_loss(new, old, adv, mask, entropy_coef=0.1)
    with pytest.raises(ConfigError, match="no level 'row'"):
        losses.policy_loss(new, old, adv, mask, level="row")


def test_kl_controllers():
    assert losses.fixed_kl(0.05, 9.0) == 0.05
    # Ziegler et al.: the error is clipped to 20 %, the gain is 0.1.
    np.testing.assert_allclose(losses.adaptive_kl(0.2, 12.0, target=6.0), 0.2 * 1.02, rtol=1e-6)
    np.testing.assert_allclose(losses.adaptive_kl(0.2, 0.0, target=6.0), 0.2 * 0.98, rtol=1e-6)
    np.testing.assert_allclose(losses.adaptive_kl(0.2, 6.3, target=6.0), 0.2 * 1.005, rtol=1e-6)
    assert losses.adaptive_kl(0.2, 6.0, target=6.0) == np.float32(0.2)


def test_lagrangian_worked_example():
    """λ = 10, J_c = 0.5, d = -0.5, lr = 0.1, λ_max = 20."""
    state = lagrangian(10.0)
    np.testing.assert_allclose(state.log_lambda, 2.302585, atol=1e-6)
    free = update_multiplier(state, threshold=-0.5, lr=0.1, mean_cost=0.5)
    np.testing.assert_allclose(free.log_lambda, 3.302585, atol=1e-5)
    bound = update_multiplier(state, threshold=-0.5, lr=0.1, mean_cost=0.5, maximum=20.0)
    np.testing.assert_allclose(bound.log_lambda, 2.995732, atol=1e-6)
    both = combined_advantages(jnp.array([1.0]), jnp.array([0.5]), 10.0)
    np.testing.assert_allclose(both, -0.363636, atol=1e-6)
    with pytest.raises(ConfigError, match="initial=0.0"):
        lagrangian(0.0)


def test_window_of_costs_is_the_last_ones():
    state, seen = lagrangian(window=4), []
    assert state.mean_cost == 0
    observe = jax.jit(observe_costs)
    for size in (3, 3, 7, 1):
        costs = RNG.normal(size=8).astype(np.float32)
        mask = np.zeros(8, bool)
        mask[RNG.choice(8, size, replace=False)] = True
        seen += list(costs[mask])
        dirty = np.where(mask, costs, np.nan)
        state = observe(state, jnp.asarray(dirty), jnp.asarray(mask))
        np.testing.assert_allclose(state.mean_cost, np.mean(seen[-4:]), rtol=1e-5)
    updated = update_multiplier(state, threshold=0.0, lr=0.1)
    want = np.log(10) + 0.1 * np.mean(seen[-4:]) * 10
    np.testing.assert_allclose(updated.log_lambda, want, rtol=1e-5)
