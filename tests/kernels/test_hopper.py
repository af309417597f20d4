"""The Mosaic kernels for Hopper GPUs: what they share, where they refuse, their programs.

Nothing here runs on a GPU. JAX 0.11 and later interpret the kernels on a CPU, against float64 and,
for log-probs, looking for races; what is interpreted otherwise is said in
`attention.pallas_hopper._dot`.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from aa_jax.errors import ConfigError
from aa_jax.kernels.attention import api as attention_api
from aa_jax.kernels.attention import attention, visible
from aa_jax.kernels.attention import pallas_hopper as attention_hopper
from aa_jax.kernels.attention import tile as attention_tile
from aa_jax.kernels.dispatch import choose
from aa_jax.kernels.linear_logprob import api as logprob_api
from aa_jax.kernels.linear_logprob import linear_logprob, tile
from aa_jax.kernels.linear_logprob import pallas_hopper as logprob_hopper
from aa_jax.kernels.linear_logprob.spec import Spec
from aa_jax.platforms.target import Target, compiling_for
from tests.kernels import test_attention_tpu, test_linear_logprob_tpu, test_lowering

HOPPER = Target("cuda", 1, "9.0")

interpreted = pytest.mark.skipif(
    not hasattr(plgpu, "InterpretGPUParams"), reason="JAX below 0.11 cannot interpret GPU kernels"
)


def draw(*shape, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(len(shape)).normal(size=shape), dtype)


def test_the_softmax_state_may_hold_one_value_per_token():
    z, spec = 3 * draw(8, 96), Spec(need_entropy=True)
    z = z.at[0, :70].set(-jnp.inf)
    is_target = tile.columns(0, z.shape) == jnp.arange(80, 88)[:, None]
    want = tile.update(tile.nothing(8, spec), z, is_target)
    got = jax.tree.map(lambda x: x[:, 0], tile.nothing(8, spec))
    for at in range(0, 96, 32):  # in slices, as registers hold them
        got = tile.update(got, z[:, at : at + 32], is_target[:, at : at + 32])
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b[:, 0], rtol=1e-6)


def test_the_softmax_of_scores_in_slices():
    """Against float64 in one piece; query 3 sees nothing, query 5 nothing of the first slice."""
    scores, seen = 5 * draw(8, 32), np.asarray(draw(8, 32)[::-1] > 0).copy()
    seen[3], seen[5, :16] = False, False
    top, total = jnp.full(8, attention_tile.LOWEST), jnp.zeros(8)
    found = jnp.zeros((8, 32))
    for at in (slice(16), slice(16, 32)):
        one = scores[:, at], jnp.asarray(seen[:, at])
        top, total, factor, weights = attention_tile.softmax_step(top, total, *one, 0.7)
        found = (found * factor[:, None]).at[:, at].set(weights)
    norm, log_sum = attention_tile.softmax_end(top, total, 0.7)
    weights = np.where(seen, np.exp(0.7 * np.asarray(scores, np.float64)), 0)
    sums = np.where(seen.any(1), weights.sum(1), 1)
    np.testing.assert_allclose(found * norm[:, None], weights / sums[:, None], atol=1e-6)
    np.testing.assert_allclose(log_sum, np.log(sums), rtol=1e-6)
    assert (found[3] == 0).all() and norm[3] == 1


def test_programs_hold_the_kernels():
    spec = Spec(need_entropy=True, temperature=0.7, softcap=20.0)

    def logps(h, w, t, m, b):
        out = logprob_hopper.linear_logprob(h, w, t, m, b, spec)
        return out.logps.sum() + out.entropy.sum()

    bias = (((5000,), jnp.float32),)
    run = jax.grad(logps, (0, 1, 4))
    assert test_lowering.text(run, test_lowering.LOGPROB + bias, "cuda").count("@mosaic_gpu") == 2
    run = test_lowering.attention_gradient(lambda *x: attention_hopper.attention(*x, 0.1))
    arrays = test_lowering.ATTENTION + test_lowering.INTERVALS
    assert test_lowering.text(run, arrays, "cuda").count("@mosaic_gpu") == 3


def test_never_executed_kernels_are_not_chosen_but_obeyed():
    low = jax.ShapeDtypeStruct((4, 64), jnp.bfloat16)
    q = jax.ShapeDtypeStruct((1, 128, 2, 128), jnp.bfloat16)
    with compiling_for(HOPPER):
        fn = choose("linear_logprob", logprob_api.IMPLEMENTATIONS, hidden=low, head=low)
        assert fn is logprob_api.IMPLEMENTATIONS["xla"].fn
        for mask, name in (("intervals", "xla"), ("causal", "cudnn")):
            fn = choose("attention", attention_api.IMPLEMENTATIONS, q=q, mask=mask)
            assert fn is attention_api.IMPLEMENTATIONS[name].fn
        table = attention_api.IMPLEMENTATIONS
        fn = choose("attention", table, "pallas_hopper", q=q, mask="intervals")
        assert fn is table["pallas_hopper"].fn


def test_forcing_them_elsewhere_is_refused():
    x = draw(4, 64, dtype=jnp.bfloat16)
    ids = jnp.zeros(4, jnp.int32)
    call = functools.partial(linear_logprob, x, x, ids, impl="pallas_hopper")
    q = draw(1, 128, 2, 64, dtype=jnp.bfloat16)
    attend = functools.partial(attention, impl="pallas_hopper")
    with pytest.raises(ConfigError, match=r"'pallas_hopper' runs on .*'cpu'"):
        call()
    with compiling_for(Target("cuda", 1, "8.0")):
        for run in (call, lambda: attend(q, q, q)):
            with pytest.raises(ConfigError, match=r"compute capability is 8.0, not 9.0"):
                run()
    with compiling_for(HOPPER):
        with pytest.raises(ConfigError, match="float32, not bfloat16 or float16"):
            linear_logprob(draw(4, 64), draw(4, 64), ids, impl="pallas_hopper")
        with pytest.raises(ConfigError, match="queries are float32"):
            attend(*[q.astype(jnp.float32)] * 3)
        with pytest.raises(ConfigError, match="heads of 32 are not 64 or 128"):
            attend(*[q[..., :32]] * 3)
    with compiling_for(Target("cuda", 2, "9.0")), pytest.raises(ConfigError, match="divided over"):
        call()


@interpreted
@pytest.mark.slow
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_log_probs_interpreted_agree_with_float64(softcap):
    """Two tiles of tokens and three of the vocabulary, partly filled; buffers are filled again."""
    n, depth, vocab = 150, 330, 600
    racing = plgpu.InterpretGPUParams(detect_races=True)
    hidden, head = draw(n, depth, dtype=jnp.bfloat16), draw(vocab, depth, dtype=jnp.bfloat16) / 8
    bias, cotangents = draw(vocab), draw(3, n)
    targets, mask = jnp.arange(n) * 4 % vocab, jnp.arange(n) % 5 > 0
    spec = Spec(0.7, softcap, need_entropy=True)

    def fn(hidden, head, bias):
        return tuple(
            logprob_hopper.call(
                hidden, head, targets, mask, bias, spec, logprob_hopper.engine(interpret=racing)
            )
        )

    outs, pull = jax.vjp(fn, hidden, head, bias)
    want = test_linear_logprob_tpu.oracle(
        hidden, head, bias, targets, mask, cotangents, 0.7, softcap
    )
    for got, exact in zip(outs, want[0], strict=True):
        np.testing.assert_allclose(got, exact, atol=1e-4)
    for got, exact in zip(pull(tuple(cotangents)), want[1], strict=True):
        error = np.linalg.norm(np.asarray(got, np.float64) - exact) / np.linalg.norm(exact)
        assert error < 4e-3


@interpreted
@pytest.mark.slow
def test_attention_interpreted_agrees_with_float64():
    """A shared prompt seen both ways, two responses, and queries without keys.

    Without looking for races: the detector objects to the read that stands for registers.
    """
    length = test_attention_tpu.T
    iv = test_attention_tpu.padded_packed_prefix()[1:]
    iv[0, -7:] = 0
    q, k, v, dout = (draw(1, length, h, 64, dtype=jnp.bfloat16) for h in (2, 1, 1, 2))
    seen = np.asarray(visible(jnp.asarray(iv), length))
    want = test_attention_tpu.oracle(q, k, v, seen, dout, 0.2)
    call = functools.partial(
        attention_hopper.attention, scale=0.2, interpret=plgpu.InterpretGPUParams()
    )
    out, pull = jax.vjp(lambda *x: call(*x, jnp.asarray(iv)), q, k, v)
    got = out, *pull(dout)
    for a, b, gate in zip(got, want, (5e-3, 1e-2, 1e-2, 1e-2), strict=True):
        error = np.linalg.norm(np.asarray(a, np.float64) - b) / np.linalg.norm(b)
        assert a.dtype == jnp.bfloat16 and error < gate
    for x in got[:2]:
        assert (np.asarray(x, np.float32)[~seen.any(-1)] == 0).all()
