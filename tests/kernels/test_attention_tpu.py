"""The Mosaic attention kernels in interpret mode against float64, and their table of tiles."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from aa_jax.kernels.attention import causal_intervals, pallas_tpu, tile, visible

T, S = 200, 200  # two tiles of 128 and a remainder, both ways


def causal():
    return np.repeat(np.asarray(causal_intervals(T)), 2, 0)


def padded_packed_prefix():
    """Row 0: packed, right padded. Row 1: prompt seen both ways, two responses share it."""
    iv = np.zeros((2, T, 4), np.int32)
    for start, end in ((0, 140), (140, 170)):
        iv[0, start:end, 2], iv[0, start:end, 3] = start, np.arange(start, end) + 1
    iv[1, :20] = 0, 0, 0, 20
    for start, end in ((20, 150), (150, 200)):
        iv[1, start:end, 1], iv[1, start:end, 2] = 20, start
        iv[1, start:end, 3] = np.arange(start, end) + 1
    return iv


MASKS = {
    "causal": causal,
    "packed, padded, shared prefix": padded_packed_prefix,
    "full": lambda: None,
}


def oracle(q, k, v, mask, cotangent, scale):
    """Float64 torch: output and gradients."""
    import torch

    arrays = [np.asarray(x, np.float64).transpose(0, 2, 1, 3) for x in (q, k, v)]
    q, k, v = leaves = [torch.tensor(x).requires_grad_() for x in arrays]
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, 1) for x in (k, v))
    mask = torch.tensor(np.asarray(mask))[:, None]
    weights = torch.softmax((q @ k.mT * scale).masked_fill(~mask, -1e30), -1) * mask
    out = weights @ v
    (out * torch.tensor(np.asarray(cotangent, np.float64).transpose(0, 2, 1, 3))).sum().backward()
    return [x.detach().numpy().transpose(0, 2, 1, 3) for x in (out, *(l.grad for l in leaves))]


def run(mask, dtype=jnp.float32, depth=64, heads=2, kv_heads=1, rows=2, interpret=True, scale=0.2):
    rng = np.random.default_rng(0)
    shapes = [(T, heads), (S, kv_heads), (S, kv_heads), (T, heads)]
    q, k, v, dout = (
        jnp.asarray(rng.normal(size=(rows, *s, depth)), jnp.float32).astype(dtype) for s in shapes
    )
    iv = MASKS[mask]()
    iv = iv if iv is None else jnp.asarray(iv[:rows])
    seen = np.ones((rows, T, S), bool) if iv is None else np.asarray(visible(iv, S))
    want = oracle(q, k, v, seen, dout, scale)
    fn = functools.partial(
        pallas_tpu.attention, scale=scale, sizes=pallas_tpu.Sizes(128, 128), interpret=interpret
    )

    @jax.jit
    def both(q, k, v, dout):
        out, pull = jax.vjp(lambda *x: fn(*x, iv), q, k, v)
        return out, *pull(dout)

    return both, (q, k, v, dout), want, seen


@pytest.mark.parametrize("mask", MASKS)
def test_float64(mask):
    both, arrays, want, seen = run(mask)
    got = both(*arrays)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)
    assert (np.asarray(got[0])[~seen.any(-1)] == 0).all()
    assert (np.asarray(got[1])[~seen.any(-1)] == 0).all()


@pytest.mark.parametrize("scale", [-0.3, 0.0])
def test_a_scale_that_is_not_positive(scale):
    """The kernels take the largest product for the largest score."""
    both, arrays, want, _ = run("causal", rows=1, scale=scale)
    for a, b in zip(both(*arrays), want, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(256, 128), (384, 256)])
def test_tiles_of_two_halves(sizes):
    """Two tiles each way, of one, two and three registers across."""
    rng = np.random.default_rng(1)
    q, k, v, dout = (jnp.asarray(rng.normal(size=(1, 500, 1, 64)), jnp.float32) for _ in range(4))
    iv = jnp.asarray(causal_intervals(500))
    want = oracle(q, k, v, visible(iv, 500), dout, 0.2)
    sizes = pallas_tpu.Sizes(*sizes)
    fn = functools.partial(pallas_tpu.attention, scale=0.2, sizes=sizes, interpret=True)
    out, pull = jax.vjp(lambda *x: fn(*x, iv), q, k, v)
    for a, b in zip((out, *pull(dout)), want, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("depth", "heads", "kv_heads"), [(64, 4, 4), (128, 4, 2), (192, 2, 1), (256, 2, 1)]
)
def test_bfloat16_and_head_sizes(depth, heads, kv_heads):
    mask = "packed, padded, shared prefix"
    both, arrays, want, _ = run(mask, jnp.bfloat16, depth, heads, kv_heads)
    for a, b, gate in zip(both(*arrays), want, (5e-3, 1e-2, 1e-2, 1e-2), strict=True):
        error = np.linalg.norm(np.asarray(a, np.float64) - b) / np.linalg.norm(b)
        assert a.dtype == jnp.bfloat16 and error < gate


def test_nan_in_padding_neither_leaks_nor_reaches_gradients():
    both, arrays, _, seen = run("packed, padded, shared prefix", rows=1)
    clean = both(*arrays)
    hidden = ~seen.any(1)[0], ~seen.any(2)[0]
    assert hidden[0][170:].all() and hidden[1][170:].all()
    dirty = both(*(x.at[:, 170:].set(jnp.nan) for x in arrays))
    for a, b in zip(dirty, clean, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.slow
def test_no_races(capfd):
    races = pltpu.InterpretParams(detect_races=True)
    both, arrays, want, _ = run("packed, padded, shared prefix", rows=1, interpret=races)
    for a, b in zip(both(*arrays), want, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)
    printed = capfd.readouterr()
    assert "race" not in (printed.out + printed.err).lower()


def test_tiles_are_skipped_exactly_where_nothing_is_visible():
    iv = np.zeros((3, 256, 4), np.int32)
    iv[:2] = 0
    iv[0] = np.asarray(causal_intervals(256))[0]
    iv[1, :, 1], iv[1, :, 2], iv[1, :, 3] = 10, 200, 210  # nothing between 10 and 200
    dense = np.asarray(visible(jnp.asarray(iv), 256))
    want = dense.reshape(3, 4, 64, 8, 32).any((2, 4))
    got = np.asarray(tile.touched(jnp.asarray(iv), 64, 256, 32))
    np.testing.assert_array_equal(got, want)
    whole = np.asarray(tile.covered(jnp.asarray(iv), 64, 256, 32))
    np.testing.assert_array_equal(whole, dense.reshape(3, 4, 64, 8, 32).all((2, 4)))
    assert whole[0].sum() == 12
    assert got[0].sum() == 20 and got[1].sum() == 8 and not got[2].any()
