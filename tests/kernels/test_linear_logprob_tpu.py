"""The Mosaic kernels in interpret mode against float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from aa_jax.kernels.linear_logprob import pallas_tpu
from aa_jax.kernels.linear_logprob.spec import Spec

N, D, V = 40, 24, 300  # three token tiles, three vocabulary tiles: nothing divides anything
SIZES = pallas_tpu.Sizes(16, 128, 128)


def problem(dtype, scale=2.0):
    rng = np.random.default_rng(0)

    def draw(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    return (
        draw(N, D).astype(dtype), (draw(V, D) * scale / D**0.5).astype(dtype), draw(V),
        jnp.asarray(rng.integers(0, V, N), jnp.int32), jnp.asarray(rng.random(N) < 0.3),
        draw(3, N),
    )  # fmt: skip


def oracle(hidden, head, bias, targets, mask, cotangents, temperature, softcap):
    """Float64 torch: values of (logps, entropy, lse), gradients of hidden, head and bias."""
    import torch

    arrays = (np.asarray(x, np.float64) for x in (hidden, head, bias))
    h, w, b = leaves = [torch.tensor(x).requires_grad_() for x in arrays]
    z = h @ w.T + b
    z = (z if softcap is None else softcap * torch.tanh(z / softcap)) / temperature
    dist = torch.distributions.Categorical(logits=z)
    outs = dist.log_prob(torch.tensor(np.asarray(targets))), dist.entropy(), z.logsumexp(-1)
    outs = [x * torch.tensor(np.asarray(mask, np.float64)) for x in outs]
    parts = zip(np.asarray(cotangents, np.float64), outs, strict=True)
    sum((torch.tensor(c) * x).sum() for c, x in parts).backward()
    return [x.detach().numpy() for x in outs], [x.grad.numpy() for x in leaves]


def run(
    dtype, *, temperature=1.0, softcap=None, masked=True, dirty=False, shift=0.0, interpret=True
):
    hidden, head, bias, targets, mask, cotangents = problem(dtype)
    bias = bias + shift
    mask = mask if masked else jnp.ones(N, bool)
    want = oracle(hidden, head, bias, targets, mask, cotangents, temperature, softcap)
    if dirty:
        hidden = jnp.where(mask[:, None], hidden, jnp.nan)
        targets = jnp.where(mask, targets, 10**9)
        cotangents = jnp.where(mask[None], cotangents, jnp.nan)
    spec = Spec(temperature, softcap, need_entropy=True, chunk=16, tile=200)

    engine = pallas_tpu.engine(SIZES, interpret)

    def both(hidden, head, bias, targets, mask, cotangents):
        def fn(hidden, head, bias):
            return tuple(pallas_tpu._call(hidden, head, targets, mask, bias, spec, engine))

        outs, pull = jax.vjp(fn, hidden, head, bias)
        return outs, pull(tuple(cotangents))

    outs, grads = jax.jit(both)(hidden, head, bias, targets, mask, cotangents)
    return outs, grads, want, np.asarray(mask)


@pytest.mark.parametrize(
    ("dtype", "kwargs"),
    [
        (jnp.float32, dict(temperature=0.7, softcap=3.0)),
        (jnp.bfloat16, dict(masked=False)),
    ],
    ids=["float32", "bfloat16"],
)
def test_float64(dtype, kwargs):
    outs, grads, want, _ = run(dtype, **kwargs)
    for got, exact in zip(outs, want[0], strict=True):
        np.testing.assert_allclose(got, exact, atol=1e-5 if dtype == jnp.float32 else 1e-4)
    gate = 1e-5 if dtype == jnp.float32 else 4e-3
    for got, exact in zip(grads, want[1], strict=True):
        error = np.linalg.norm(np.asarray(got, np.float64) - exact) / np.linalg.norm(exact)
        assert error < gate
    assert [g.dtype for g in grads] == [dtype, dtype, jnp.float32]


def test_masked_tokens_are_exactly_zero_whatever_they_hold():
    outs, grads, want, mask = run(jnp.float32, dirty=True)
    for got, exact in zip((*outs, *grads), want[0] + want[1], strict=True):
        np.testing.assert_allclose(got, exact, atol=1e-5)
    for x in (*outs, grads[0]):
        assert (np.asarray(x)[~mask] == 0).all()


@pytest.mark.slow
@pytest.mark.parametrize("masked", [True, False])
def test_a_large_bias_of_tokens_that_do_not_count(masked):
    """The exponential of their logits is inf."""
    outs, grads, want, _ = run(jnp.float32, masked=masked, shift=300.0)
    for got, exact in zip((*outs, *grads), want[0] + want[1], strict=True):
        np.testing.assert_allclose(got, exact, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("masked", [True, False])
def test_no_races(capfd, masked):
    """The interpreter of TPU memory and semaphores agrees, and prints no race."""
    races = pltpu.InterpretParams(detect_races=True)
    outs, grads, want, _ = run(jnp.float32, masked=masked, softcap=3.0, interpret=races)
    for got, exact in zip((*outs, *grads), want[0] + want[1], strict=True):
        np.testing.assert_allclose(got, exact, atol=1e-5)
    printed = capfd.readouterr()
    assert "race" not in (printed.out + printed.err).lower()
