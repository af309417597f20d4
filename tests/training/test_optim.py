"""Optimizers against torch and closed forms."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from aa_jax.errors import ConfigError
from aa_jax.training.optim import (
    decay_mask,
    make_optimizer,
    make_schedule,
    updates_done,
    with_master_weights,
)


def test_cosine_with_warmup_is_the_closed_form():
    rate = make_schedule(2e-3, 100, warmup_ratio=0.1, end_lr_ratio=0.1)
    for step in range(101):
        if step < 10:
            expected = 2e-3 * step / 10
        else:
            expected = 2e-3 * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * (step - 10) / 90)))
        assert float(rate(step)) == pytest.approx(expected, rel=1e-5, abs=1e-12)


def test_linear_and_constant():
    linear = make_schedule(1.0, 10, schedule="linear", warmup_steps=2)
    assert [round(float(linear(i)), 6) for i in (0, 1, 2, 6, 10)] == [0.0, 0.5, 1.0, 0.5, 0.0]
    constant = make_schedule(1.0, 10, schedule="constant", warmup_steps=0)
    assert float(constant(0)) == float(constant(9)) == 1.0


def test_warmup_ratio_rounds_up():
    # 3 % of 50 steps is 1.5 steps
    assert [float(make_schedule(1.0, 50)(i)) for i in (0, 1, 2)] == [0.0, 0.5, 1.0]


def test_adamw_is_torch_adamw():
    import torch

    rng = np.random.default_rng(0)
    start = {
        "layers": {"q": {"kernel": rng.normal(size=(4, 3)), "bias": rng.normal(size=(2, 3))}},
        "norm": {"scale": rng.normal(size=(2, 3))},
    }
    start = jax.tree.map(lambda x: x.astype(np.float32), start)
    steps, lr, decay, clip = 12, 3e-2, 0.1, 0.7

    theirs = jax.tree.map(lambda x: torch.nn.Parameter(torch.tensor(x)), start)
    kernel, bias = theirs["layers"]["q"]["kernel"], theirs["layers"]["q"]["bias"]
    scale = theirs["norm"]["scale"]
    groups = [
        {"params": [kernel], "weight_decay": decay},
        {"params": [bias, scale], "weight_decay": 0.0},
    ]
    torch_opt = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), eps=1e-8)
    # transformers.get_cosine_schedule_with_warmup, written out
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        torch_opt,
        lambda i: i / 3 if i < 3 else 0.5 * (1 + math.cos(math.pi * (i - 3) / (steps - 3))),
    )

    tx, rate = make_optimizer(lr, steps, warmup_steps=3, weight_decay=decay, clip_norm=clip)
    params = jax.tree.map(jnp.asarray, start)
    state = tx.init(params)
    update = jax.jit(tx.update)
    for i in range(steps):
        grads = jax.tree.map(lambda p: rng.normal(size=p.shape).astype(np.float32), start)
        assert float(rate(i)) == pytest.approx(scheduler.get_last_lr()[0], rel=1e-5, abs=1e-9)
        assert int(updates_done(state)) == i
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
        for p, g in zip(jax.tree.leaves(theirs), jax.tree.leaves(grads), strict=True):
            p.grad = torch.tensor(g)
        torch.nn.utils.clip_grad_norm_([kernel, bias, scale], clip)
        torch_opt.step()
        scheduler.step()
    for ours, p in zip(jax.tree.leaves(params), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(ours, p.detach().numpy(), atol=1e-6)


def test_decay_skips_norms_biases_and_vectors_even_when_stacked():
    leaf = {
        "embed": {"weight": (5, 4)},
        "layers": {
            "attn": {"q": {"kernel": (2, 4, 4), "bias": (2, 4)}},
            "input_norm": {"scale": (2, 4), "weight": (2, 4)},
        },
        "class_embedding": (4,),
    }
    mask = decay_mask(jax.tree.map(np.zeros, leaf, is_leaf=lambda x: isinstance(x, tuple)))
    assert mask == {
        "embed": {"weight": True},
        "layers": {
            "attn": {"q": {"kernel": True, "bias": False}},
            "input_norm": {"scale": False, "weight": False},
        },
        "class_embedding": False,
    }


def run_sgd(params, steps, lr, **kwargs):
    tx, _ = make_optimizer(
        lr, steps, name="sgd", schedule="constant", warmup_steps=0, clip_norm=None, **kwargs
    )
    state = tx.init(params)

    @jax.jit
    def update(params, state):
        grads = jax.tree.map(jnp.ones_like, params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(steps):
        params, state = update(params, state)
    return params, state


def test_lr_scales_are_learning_rates_of_their_own():
    """Decay included; the first glob that matches counts; bf16 masters too."""
    params = {"policy": {"w": jnp.ones((3, 2))}, "critic": {"w": jnp.ones((3, 2)),
              "b": {"w": jnp.ones((3, 2))}}}  # fmt: skip
    grads = jax.tree.map(lambda p: p * 0.5, params)
    options = dict(schedule="constant", warmup_steps=0, weight_decay=0.1, clip_norm=None)

    def after(lr, **more):
        tx, _ = make_optimizer(lr, 10, **options, **more)
        here, state = params, tx.init(params)
        for _ in range(3):
            updates, state = tx.update(grads, state, here)
            here = optax.apply_updates(here, updates)
        return here

    scaled = after(1e-2, lr_scales={"critic/b/*": 0.1, "critic/*": 0.5})
    for got, lr in (
        (scaled["policy"]["w"], 1e-2), (scaled["critic"]["w"], 5e-3),
        (scaled["critic"]["b"]["w"], 1e-3),
    ):  # fmt: skip
        np.testing.assert_allclose(got, after(lr)["policy"]["w"], rtol=1e-6)


def test_master_weights_keep_updates_smaller_than_bf16_rounding():
    params = {"a": {"kernel": jnp.ones((2, 2), jnp.bfloat16)}, "b": jnp.ones((2,), jnp.float32)}
    new, state = run_sgd(params, 500, 1e-3)
    assert new["a"]["kernel"].dtype == jnp.bfloat16
    # 1 - 500 * 0.001 = 0.5, which bfloat16 holds exactly
    np.testing.assert_allclose(state["master"]["a/kernel"], 0.5, atol=1e-4)
    np.testing.assert_array_equal(
        new["a"]["kernel"], state["master"]["a/kernel"].astype(jnp.bfloat16)
    )
    assert list(state["master"]) == ["a/kernel"]
    np.testing.assert_allclose(new["b"], 0.5, atol=1e-4)
    # Without the master copy every step rounds back to 1.
    stuck, _ = run_sgd(params, 500, 1e-3, master_weights=False)
    np.testing.assert_array_equal(np.asarray(stuck["a"]["kernel"], np.float32), 1.0)


def test_master_weights_change_nothing_in_float32():
    params = {"w": jnp.linspace(-1.0, 1.0, 12).reshape(3, 4)}
    grads = {"w": jnp.cos(params["w"])}
    plain = optax.adam(1e-2)
    wrapped = with_master_weights(plain)
    ours, state = wrapped.update(grads, wrapped.init(params), params)
    theirs, _ = plain.update(grads, plain.init(params), params)
    np.testing.assert_array_equal(ours["w"], theirs["w"])
    assert state["master"] == {}


def test_sgd_momentum_closed_form():
    params, _ = run_sgd({"w": jnp.zeros((1,))}, 3, 0.1, momentum=0.5)
    # velocities 1, 1.5, 1.75
    np.testing.assert_allclose(params["w"], [-0.425], rtol=1e-6)


def test_adafactor_keeps_factored_moments():
    tx, _ = make_optimizer(1e-2, 10, name="adafactor", warmup_steps=0)
    params = {"w": jnp.ones((256, 128))}
    state = tx.init(params)
    sizes = [x.size for x in jax.tree.leaves(state)]
    assert sum(sizes) < 1000
    updates, _ = tx.update({"w": jnp.full((256, 128), 0.1)}, state, params)
    assert bool(jnp.all(updates["w"] < 0))


@pytest.mark.parametrize(
    "kwargs, words",
    [
        ({"name": "adam"}, "'adam' is unknown; there are adamw, sgd, adafactor"),
        ({"schedule": "step"}, "'step' is unknown; there are cosine, linear, constant"),
        ({"warmup_steps": 11}, "10 steps cannot have 11 warm-up steps"),
    ],
)
def test_errors(kwargs, words):
    with pytest.raises(ConfigError, match=words):
        make_optimizer(1e-3, 10, **kwargs)


def test_a_bfloat16_first_moment_halves_it_and_stays_close():
    params = {"w": jnp.linspace(-1.0, 1.0, 64)}
    runs = {}
    for dtype in (None, "bfloat16"):
        tx, _ = make_optimizer(1e-2, 20, schedule="constant", warmup_steps=0, moment_dtype=dtype)
        state, p = tx.init(params), params
        for _ in range(20):
            updates, state = tx.update(jax.tree.map(lambda w: 2 * (w - 0.3), p), state, p)
            p = optax.apply_updates(p, updates)
        runs[dtype] = p["w"], state
    adam = optax.tree.get(runs["bfloat16"][1], "ScaleByAdamState")
    assert adam.mu["w"].dtype == jnp.bfloat16 and adam.nu["w"].dtype == jnp.float32
    np.testing.assert_allclose(runs["bfloat16"][0], runs[None][0], atol=2e-3)
    assert float(jnp.abs(runs[None][0] - params["w"]).max()) > 0.1
    with pytest.raises(ConfigError, match="moment_dtype='float16'.*'float32' or 'bfloat16'"):
        make_optimizer(1e-2, 20, moment_dtype="float16")
    with pytest.raises(ConfigError, match="'sgd'"):
        make_optimizer(1e-2, 20, name="sgd", moment_dtype="bfloat16")
