"""Attention against a float64 NumPy oracle and torch, and the promises about masks."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.test_util import check_grads

from aa_jax.errors import ConfigError
from aa_jax.kernels import dispatch
from aa_jax.kernels.attention import (
    api,
    attention,
    causal_intervals,
    decode_attention,
    visible,
    xla,
)

compiled = jax.jit(attention, static_argnames=("causal", "scale", "impl"))
blocked = functools.partial(xla.attention, block=4)


@functools.partial(jax.jit, static_argnums=0)
def call(name, q, k, v, intervals, scale=None):
    """Every way to compute it, including one that is cut into blocks of four queries."""
    if name != "blocked":
        return attention(q, k, v, intervals=intervals, scale=scale, impl=name)
    return blocked(q, k, v, intervals, q.shape[-1] ** -0.5 if scale is None else scale)


def oracle(q, k, v, mask, scale=None):
    """Float64, one head and one query at a time."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    rows, queries, heads, depth = q.shape
    group = heads // k.shape[2]
    out = np.zeros_like(q)
    for b, t, h in np.ndindex(rows, queries, heads):
        keys = np.flatnonzero(mask[b, t])
        if len(keys):
            s = k[b, keys, h // group] @ q[b, t, h] * (depth**-0.5 if scale is None else scale)
            p = np.exp(s - s.max())
            out[b, t, h] = p @ v[b, keys, h // group] / p.sum()
    return out


def arrays(rows=2, queries=9, keys=9, heads=4, kv_heads=2, depth=6, seed=0):
    rng = np.random.default_rng(seed)
    shapes = [(queries, heads), (keys, kv_heads), (keys, kv_heads)]
    return [jnp.asarray(rng.normal(size=(rows, *s, depth)), jnp.float32) for s in shapes]


def shared_prefix(prompt=3, chosen=3, rejected=2, pad=1):
    """Intervals of one row ``prompt | chosen | rejected | padding``."""
    rows = [(0, 0, 0, t + 1) for t in range(prompt)]
    start = prompt
    for length in (chosen, rejected):
        rows += [(0, prompt, start, t + 1) for t in range(start, start + length)]
        start += length
    return np.array([rows + [(0, 0, 0, 0)] * pad], np.int32)


def padded(length, total):
    iv = np.asarray(causal_intervals(total)).copy()
    iv[:, length:] = 0
    return iv


MASKS = {
    "full": lambda: np.broadcast_to(np.array([0, 0, 0, 9], np.int32), (2, 9, 4)),
    "causal, padded": lambda: np.concatenate([padded(9, 9), padded(5, 9)]),
    "shared prefix": lambda: np.repeat(shared_prefix(), 2, 0),
    "window": lambda: np.array([[(0, 0, max(t - 2, 0), t + 1) for t in range(9)]] * 2, np.int32),
    "nothing": lambda: np.zeros((2, 9, 4), np.int32),
    "overlapping": lambda: np.array([[(1, 6, 4, 8)] * 9] * 2, np.int32),
}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("impl", ["reference", "xla", "blocked"])
def test_float64_oracle(impl, mask):
    q, k, v = arrays()
    iv = MASKS[mask]()
    dense = np.asarray(visible(jnp.asarray(iv), 9))
    out = call(impl, q, k, v, iv)
    np.testing.assert_allclose(out, oracle(q, k, v, dense), atol=2e-6)
    assert (np.asarray(out)[~dense.any(-1)] == 0).all()


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("impl", ["xla", "blocked"])
def test_gradients_of_the_oracle(impl, mask):
    q, k, v = arrays()
    iv = jnp.asarray(MASKS[mask]())
    weight = np.random.default_rng(1).normal(size=q.shape).astype(np.float32)

    def grads(name):
        return jax.grad(lambda *x: (weight * call(name, *x, iv)).sum(), (0, 1, 2))(q, k, v)

    for got, want in zip(grads(impl), grads("reference"), strict=True):
        np.testing.assert_allclose(got, want, atol=5e-6)


def test_torch_forward_and_gradients():
    import torch

    q, k, v = arrays(heads=6, kv_heads=3, depth=8)
    mask = np.asarray(visible(causal_intervals(9), 9))
    tq, tk, tv = (
        torch.tensor(np.asarray(x).transpose(0, 2, 1, 3)).requires_grad_() for x in (q, k, v)
    )
    t_out = torch.nn.functional.scaled_dot_product_attention(
        tq, tk, tv, attn_mask=torch.tensor(mask), scale=0.3, enable_gqa=True
    )
    (t_out**2).sum().backward()
    out, pull = jax.vjp(lambda *x: compiled(*x, causal=True, scale=0.3), q, k, v)
    np.testing.assert_allclose(out, t_out.detach().numpy().transpose(0, 2, 1, 3), atol=2e-6)
    for got, want in zip(pull(2 * out), (tq, tk, tv), strict=True):
        np.testing.assert_allclose(got, want.grad.numpy().transpose(0, 2, 1, 3), atol=1e-5)


def test_numerical_gradients():
    q, k, v = arrays(queries=3, keys=3, heads=2, kv_heads=1, depth=3)
    check_grads(lambda *x: compiled(*x, causal=True), (q, k, v), order=1, modes=["rev"], rtol=2e-2)


@pytest.mark.parametrize("impl", ["reference", "xla", "blocked"])
def test_nan_in_padding_neither_leaks_nor_reaches_gradients(impl):
    q, k, v = arrays()
    iv = jnp.asarray(np.concatenate([padded(7, 9), padded(5, 9)]))
    dirty = [x.at[0, 7:].set(np.nan).at[1, 5:].set(np.inf) for x in (q, k, v)]

    def run(args):
        out, pull = jax.vjp(lambda *x: call(impl, *x, iv), *args)
        cotangent = jnp.where((iv[..., 3] > 0)[..., None, None], 1.0, jnp.nan) * jnp.ones_like(out)
        return (out, *pull(cotangent))

    for got, want in zip(run(dirty), run((q, k, v)), strict=True):
        np.testing.assert_array_equal(got, want)
        assert (np.asarray(got)[0, 7:] == 0).all() and (np.asarray(got)[1, 5:] == 0).all()


@pytest.mark.parametrize(("depth", "kv_heads"), [(16, 2), (64, 2), (64, 4)])
def test_decode_step_equals_the_last_row(depth, kv_heads):
    q, k, v = arrays(depth=depth, kv_heads=kv_heads)
    lengths = np.array([6, 9])
    iv = np.zeros((2, 1, 4), np.int32)
    iv[:, 0, 3] = lengths
    k, v = (x.at[0, 6:].set(np.nan) for x in (k, v))
    last = jnp.stack([q[b, n - 1 : n] for b, n in enumerate(lengths)])
    step, pull = jax.vjp(lambda *x: compiled(*x, intervals=jnp.asarray(iv)), last, k, v)
    mask = np.arange(9)[None, None] < lengths[:, None, None]
    np.testing.assert_allclose(step, oracle(last, k, v, mask), atol=2e-6)
    ref = jax.vjp(lambda *x: compiled(*x, intervals=jnp.asarray(iv), impl="reference"), last, k, v)[
        1
    ]
    for got, want in zip(pull(step), ref(step), strict=True):
        np.testing.assert_allclose(got, want, atol=5e-6)
    empty = compiled(last, k, v, intervals=jnp.zeros((2, 1, 4), jnp.int32))
    assert (np.asarray(empty) == 0).all()


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 2), (2, 2)])
def test_ragged_decode(heads, kv_heads):
    q, k, v = arrays(rows=3, queries=1, heads=heads, kv_heads=kv_heads, depth=64)
    lengths = np.array([0, 5, 9])
    k, v = (x.at[1, 5:].set(np.nan) for x in (k, v))
    mask = np.arange(9)[None, None] < lengths[:, None, None]
    out = jax.jit(decode_attention)(q[:, 0], k, v, jnp.asarray(lengths))
    np.testing.assert_allclose(out, oracle(q, k, v, mask)[:, 0], atol=2e-6)
    assert (np.asarray(out[0]) == 0).all()


def test_who_takes_which_mask(monkeypatch):
    """cuDNN would attend across packed segments: it never sees intervals."""
    table = api.IMPLEMENTATIONS
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    gpu = types.SimpleNamespace(compute_capability="9.0")
    monkeypatch.setattr(jax, "devices", lambda *_: [gpu])

    def chosen(platform, mask, dtype=jnp.bfloat16, depth=128, queries=8):
        q = jax.ShapeDtypeStruct((1, queries, 2, depth), dtype)
        fn = dispatch.choose("attention", table, platform=platform, q=q, mask=mask)
        return next(name for name, entry in table.items() if entry.fn is fn)

    for mask in ("full", "causal"):
        assert chosen("gpu", mask) == "cudnn"
    assert chosen("gpu", "intervals") == "xla"
    assert chosen("gpu", "causal", jnp.float32) == chosen("gpu", "causal", depth=256) == "xla"
    gpu.compute_capability = "gfx942"
    assert chosen("gpu", "causal") == "xla"
    assert chosen("tpu", "intervals") == chosen("tpu", "full") == "pallas_tpu"
    assert chosen("tpu", "full", depth=32) == chosen("tpu", "intervals", queries=1) == "xla"
    assert chosen("tpu", "full", jnp.float16) == chosen("ascend", "causal") == "xla"


def test_shared_prefix_equals_separate_rows():
    q, k, v = arrays(rows=1)
    row = compiled(q, k, v, intervals=jnp.asarray(shared_prefix()))
    for where in (np.array([0, 1, 2, 3, 4, 5]), np.array([0, 1, 2, 6, 7])):
        alone = compiled(*(x[:, where] for x in (q, k, v)), causal=True)
        np.testing.assert_allclose(row[:, where], alone, atol=2e-6)


def test_packed_rows_equal_separate_rows():
    q, k, v = arrays(rows=1)
    spans = [(0, 4), (4, 9)]
    iv = np.array([[(0, 0, a, t + 1) for a, b in spans for t in range(a, b)]], np.int32)
    packed = compiled(q, k, v, intervals=jnp.asarray(iv))
    for a, b in spans:
        alone = compiled(*(x[:, a:b] for x in (q, k, v)), causal=True)
        np.testing.assert_allclose(packed[:, a:b], alone, atol=2e-6)


def test_grouped_heads_equal_repeated_heads():
    q, k, v = arrays()
    repeated = (jnp.repeat(x, 2, axis=2) for x in (k, v))
    np.testing.assert_allclose(
        compiled(q, k, v, causal=True), compiled(q, *repeated, causal=True), atol=2e-6
    )


def test_causal_and_intervals_intersect():
    q, k, v = arrays()
    iv = np.array([[(0, 3, 5, 9)] * 9] * 2, np.int32)
    mask = np.asarray(visible(jnp.asarray(iv), 9)) & np.tril(np.ones((9, 9), bool))
    out = compiled(q, k, v, intervals=jnp.asarray(iv), causal=True)
    np.testing.assert_allclose(out, oracle(q, k, v, mask), atol=2e-6)


def test_intervals_beyond_the_keys_are_clipped():
    q, k, v = arrays()
    iv = np.array([[(-3, 4, 9, 20)] * 9] * 2, np.int32)
    out = compiled(q, k, v, intervals=jnp.asarray(iv))
    mask = np.broadcast_to(np.arange(9) < 4, (2, 9, 9))
    np.testing.assert_allclose(out, oracle(q, k, v, mask), atol=2e-6)


@settings(max_examples=15, deadline=None)
@given(st.data())
def test_any_two_intervals(data):
    bounds = st.lists(st.integers(0, 7), min_size=2, max_size=2).map(sorted)
    iv = np.array([[data.draw(bounds) + data.draw(bounds) for _ in range(5)]], np.int32)
    q, k, v = arrays(rows=1, queries=5, keys=7)
    dense = np.asarray(visible(jnp.asarray(iv), 7))
    np.testing.assert_allclose(
        compiled(q, k, v, intervals=jnp.asarray(iv)), oracle(q, k, v, dense), atol=2e-6
    )


def test_large_scores_stay_finite():
    q, k, v = arrays()
    out, pull = jax.vjp(lambda *x: compiled(*x, causal=True), 1e4 * q, 1e4 * k, v)
    mask = np.asarray(visible(jnp.repeat(causal_intervals(9), 2, 0), 9))
    np.testing.assert_allclose(out, oracle(1e4 * q, 1e4 * k, v, mask), atol=2e-6)
    assert all(np.isfinite(g).all() for g in pull(out))


def test_bfloat16_keeps_float32_softmax():
    q, k, v = (jnp.asarray(x, jnp.bfloat16) for x in arrays(depth=32))
    exact = compiled(*(x.astype(jnp.float32) for x in (q, k, v)), causal=True)
    out = compiled(q, k, v, causal=True)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(out.astype(jnp.float32), exact, atol=2e-2)


def test_long_rows_are_cut_into_blocks():
    """No [B, H, T, S] buffer in the compiled gradient once it would pass the dense limit."""
    shape = jax.ShapeDtypeStruct((1, 8192, 1, 8), jnp.float32)
    loss = jax.grad(lambda q, k, v: compiled(q, k, v, causal=True).sum(), (0, 1, 2))
    temp = jax.jit(loss).lower(shape, shape, shape).compile().memory_analysis()
    assert temp.temp_size_in_bytes < 4.5 * xla.BLOCK_BYTES  # scores and their gradient, one block
    assert 8192**2 * 4 > xla.DENSE_BYTES


def test_errors_list_the_choices():
    q, k, v = arrays()
    with pytest.raises(ConfigError, match="'flash'.*'cudnn', 'pallas_hopper', 'pallas_tpu'"):
        attention(q, k, v, impl="flash")
    with pytest.raises(ConfigError, match="4 query heads cannot share 3"):
        attention(q, *arrays(kv_heads=3)[1:])
    with pytest.raises(ConfigError, match="9 queries and 5 keys"):
        attention(q, k[:, :5], v[:, :5], causal=True)
    with pytest.raises(ConfigError, match="describe 3 rows and q has 2"):
        attention(q, k, v, intervals=jnp.zeros((3, 9, 4), jnp.int32))


@pytest.mark.parametrize("causal", [False, True])
def test_the_token_added_for_cudnn_changes_nothing(causal):
    """Its gradient wants even lengths; the arithmetic is checked with JAX's own implementation."""
    keys = jax.random.split(jax.random.key(0), 3)
    q, k, v = (jax.random.normal(key, (2, 7, 4, 8)) for key in keys)

    def ours(q, k, v):
        out = api.even_lengths(q, k, v, 0.3, causal=causal, implementation="xla")
        return out, (out**2).sum()

    def plain(q, k, v):
        out = attention(q, k, v, causal=causal, scale=0.3, impl="reference")
        return out, (out**2).sum()

    np.testing.assert_allclose(ours(q, k, v)[0], plain(q, k, v)[0], atol=1e-5)
    found, expected = (jax.grad(lambda *x, f=f: f(*x)[1], (0, 1, 2)) for f in (ours, plain))
    for one, other in zip(found(q, k, v), expected(q, k, v), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4)
