"""Log-probabilities against float64 torch, and what the compiled programs may hold."""

import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from aa_jax.errors import ConfigError
from aa_jax.kernels.linear_logprob import linear_logprob, sharded, xla
from aa_jax.kernels.linear_logprob.spec import Spec
from aa_jax.platforms.target import Target, compiling_for

N, D, V = 23, 5, 37  # nothing divides anything


def problem(n=N, d=D, v=V, seed=0, scale=2.0):
    rng = np.random.default_rng(seed)
    return types.SimpleNamespace(
        hidden=jnp.asarray(rng.normal(size=(n, d)), jnp.float32),
        head=jnp.asarray(rng.normal(size=(v, d)) * scale / d**0.5, jnp.float32),
        bias=jnp.asarray(rng.normal(size=v), jnp.float32),
        targets=jnp.asarray(rng.integers(0, v, n), jnp.int32),
        mask=jnp.asarray(rng.random(n) < 0.6),
        cotangents=jnp.asarray(rng.normal(size=(3, n)), jnp.float32),
    )


def torch_oracle(p, temperature=1.0, softcap=None, mask=None):
    """Float64 values of (logps, entropy, lse) and gradients of hidden, head and bias."""
    import torch

    h, w, b = (torch.tensor(np.asarray(x), dtype=torch.float64) for x in (p.hidden, p.head, p.bias))
    leaves = [x.requires_grad_() for x in (h, w, b)]
    z = h @ w.T + b
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    dist = torch.distributions.Categorical(logits=z / temperature)
    outs = [dist.log_prob(torch.tensor(np.asarray(p.targets))), dist.entropy()]
    outs.append(torch.logsumexp(z / temperature, -1))
    keep = torch.tensor(np.ones(len(p.targets)) if mask is None else np.asarray(mask, np.float64))
    outs = [x * keep for x in outs]
    parts = zip(p.cotangents, outs, strict=True)
    sum((torch.tensor(np.asarray(c)) * x).sum() for c, x in parts).backward()
    return [x.detach().numpy() for x in outs], [x.grad.numpy() for x in leaves]


def run(p, **kwargs):
    """Values and gradients of every output at once, in one compiled program."""

    @jax.jit
    def both(hidden, head, bias, mask):
        def fn(hidden, head, bias):
            out = linear_logprob(
                hidden, head, p.targets, bias=bias, mask=mask, need_entropy=True, **kwargs
            )
            return out.logps, out.entropy, out.lse

        outs, pull = jax.vjp(fn, hidden, head, bias)
        return outs, pull(tuple(p.cotangents))

    return both


@pytest.fixture
def one_device(monkeypatch):
    """Lets the blocks be compacted, as on a machine with a single device."""
    monkeypatch.setattr(jax, "device_count", lambda *_: 1)


@pytest.mark.parametrize("impl", ["reference", "xla"])
@pytest.mark.parametrize(
    ("temperature", "softcap", "masked"), [(1.0, None, False), (0.7, 3.0, True)], ids=str
)
def test_float64_torch(impl, temperature, softcap, masked):
    p = problem()
    mask = p.mask if masked else None
    got = run(p, temperature=temperature, softcap=softcap, impl=impl, chunk=7)(
        p.hidden, p.head, p.bias, mask
    )
    want = torch_oracle(p, temperature, softcap, mask)
    for a, b in zip(got[0], want[0], strict=True):
        np.testing.assert_allclose(a, b, atol=2e-6, rtol=1e-6)
    for a, b in zip(got[1], want[1], strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("chunk", [7, 100])
def test_blocks_do_not_change_the_result(chunk):
    p = problem()
    want = run(p, impl="reference")(p.hidden, p.head, p.bias, p.mask)
    got = run(p, chunk=chunk)(p.hidden, p.head, p.bias, p.mask)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("kept", [0, 9])
def test_compacted_blocks_do_not_change_the_result(one_device, kept):
    p = problem()
    mask = jnp.asarray(np.random.default_rng(3).permutation(N) < kept)
    want = run(p, impl="reference")(p.hidden, p.head, p.bias, mask)
    got = run(p, chunk=4)(p.hidden, p.head, p.bias, mask)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("kept", [0, 9, N])
@pytest.mark.parametrize("width", [8, 37])  # five tiles, the last one filled up; and one
def test_blocks_cut_along_the_vocabulary_do_not_change_the_result(
    one_device, monkeypatch, width, kept
):
    monkeypatch.setitem(xla.BLOCK, "cpu", (512, width))
    p = problem()
    mask = jnp.asarray(np.random.default_rng(3).permutation(N) < kept)
    kwargs = dict(temperature=0.7, softcap=3.0)
    values, grads = torch_oracle(p, mask=mask, **kwargs)
    got = run(p, chunk=6, **kwargs)(p.hidden, p.head, p.bias, mask)
    for a, b in zip(jax.tree.leaves(got), values + grads, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kept", [9, N])
def test_a_large_bias_of_tokens_that_do_not_count(one_device, kept):
    """The logits of masked and of filled-up tokens are the bias, whose exponential is inf."""
    p = problem()
    p.bias, mask = p.bias + 300, jnp.arange(N) < kept
    values, grads = torch_oracle(p, mask=mask)
    spec = Spec(1.0, None, True, 8, 8)

    def fn(hidden, head, bias):
        return tuple(xla.linear_logprob(hidden, head, p.targets, mask, bias, spec, platform="gpu"))

    outs, pull = jax.vjp(fn, p.hidden, p.head, p.bias)
    for got, exact in zip((*outs, *pull(tuple(p.cotangents))), values + grads, strict=True):
        np.testing.assert_allclose(got, exact, atol=1e-4)


def test_the_default_on_one_cpu_keeps_small_logits_and_cuts_large_ones(one_device, monkeypatch):
    monkeypatch.setitem(xla.BLOCK, "cpu", (512, 64))
    monkeypatch.setitem(xla.KEPT_BYTES, "cpu", 4 * 96 * 200)
    assert matmuls(compiled_text((0, 1), False, n=96, chunk=None)) == 3
    text = compiled_text((0, 1), False, n=97, chunk=None)
    assert re.search(r"f32\[97,50\]", text) and not re.search(r"\[97,200\]", text)


@pytest.mark.parametrize("impl", ["reference", "xla"])
@pytest.mark.parametrize("chunk", [None, 4])
def test_masked_tokens_are_exactly_zero_whatever_they_hold(impl, chunk):
    p = problem()
    clean = run(p, impl=impl, chunk=chunk)(p.hidden, p.head, p.bias, p.mask)
    p.hidden = jnp.where(p.mask[:, None], p.hidden, jnp.nan)
    p.targets = jnp.where(p.mask, p.targets, jnp.where(jnp.arange(N) % 2, -100, 10**9))
    p.cotangents = jnp.where(p.mask[None], p.cotangents, jnp.nan)
    dirty = run(p, impl=impl, chunk=chunk)(p.hidden, p.head, p.bias, p.mask)
    for a, b in zip(jax.tree.leaves(dirty), jax.tree.leaves(clean), strict=True):
        np.testing.assert_array_equal(a, b)
    for x in (*dirty[0], dirty[1][0]):
        assert (np.asarray(x)[~np.asarray(p.mask)] == 0).all()


def test_masked_equals_compressed():
    p = problem()
    keep = np.flatnonzero(np.asarray(p.mask))
    compiled = jax.jit(linear_logprob, static_argnames=("need_entropy", "chunk"))
    full = compiled(p.hidden, p.head, p.targets, mask=p.mask, need_entropy=True, chunk=6)
    part = compiled(p.hidden[keep], p.head, p.targets[keep], need_entropy=True)
    for a, b in zip(full, part, strict=True):
        np.testing.assert_allclose(np.asarray(a)[keep], b, atol=2e-6)


def test_weights_in_the_mask_do_not_scale():
    p = problem()
    weights = jnp.where(p.mask, 0.25, 0.0)
    a = jax.jit(linear_logprob)(p.hidden, p.head, p.targets, mask=weights)
    b = jax.jit(linear_logprob)(p.hidden, p.head, p.targets, mask=p.mask)
    np.testing.assert_array_equal(a.logps, b.logps)


@pytest.mark.parametrize("impl", ["reference", "xla"])
def test_unknown_target_that_counts_is_loud(impl):
    p = problem()
    targets = p.targets.at[0].set(-100).at[1].set(V)
    out = jax.jit(linear_logprob, static_argnames="impl")(p.hidden, p.head, targets, impl=impl)
    assert np.isnan(out.logps[:2]).all() and np.isfinite(out.logps[2:]).all()


def test_numerical_gradients():
    p = problem(n=4, d=3, v=6, scale=1.0)

    def fn(hidden, head, bias):
        out = linear_logprob(
            hidden, head, p.targets, bias=bias, need_entropy=True, softcap=4.0, chunk=3
        )
        return out.logps, out.entropy, out.lse

    arrays = p.hidden, p.head, p.bias
    check_grads(jax.jit(fn), arrays, order=1, modes=["rev"], rtol=2e-2, atol=2e-3)


@pytest.mark.parametrize("impl", ["reference", "xla"])
def test_extreme_logits(impl):
    hidden, head = jnp.eye(4, 4), jnp.zeros((V, 4)).at[0, 0].set(1e4).at[1, 1].set(-1e4)
    head = head.at[:, 2].set(1e4)
    bias = jnp.zeros(V).at[5:].set(-jnp.inf)
    targets = jnp.array([1, 0, 3, 4], jnp.int32)

    def fn(hidden, head, bias):
        return linear_logprob(hidden, head, targets, bias=bias, need_entropy=True, impl=impl)

    out, pull = jax.vjp(jax.jit(fn), hidden, head, bias)
    np.testing.assert_allclose(out.logps, [-1e4, -np.log(4), -np.log(5), -np.log(5)], rtol=1e-6)
    entropy = [0, np.log(4), np.log(5), np.log(5)]
    np.testing.assert_allclose(out.entropy, entropy, atol=2e-6)
    grads = pull(jax.tree.map(lambda x: jnp.full_like(x, 3.0), out))
    assert all(np.isfinite(g).all() for g in grads[:2])


def test_bfloat16_operands_accumulate_in_float32():
    """The gates measured for float32 accumulation of bfloat16 products."""
    p = problem(n=64, d=256, v=2048)
    h, w = p.hidden.astype(jnp.bfloat16), p.head.astype(jnp.bfloat16)
    logits = np.asarray(h, np.float64) @ np.asarray(w, np.float64).T
    lse = np.log(np.exp(logits).sum(-1))
    want = logits[np.arange(64), p.targets] - lse
    out, pull = jax.vjp(jax.jit(lambda h, w: linear_logprob(h, w, p.targets).logps), h, w)
    np.testing.assert_allclose(out, want, atol=1e-4)
    dz = -np.exp(logits - lse[:, None])
    dz[np.arange(64), p.targets] += 1
    dh, dw = pull(jnp.ones_like(out))
    assert dh.dtype == dw.dtype == jnp.bfloat16
    for got, exact in (
        (dh, dz @ np.asarray(w, np.float64)),
        (dw, dz.T @ np.asarray(h, np.float64)),
    ):
        error = np.linalg.norm(np.asarray(got, np.float64) - exact) / np.linalg.norm(exact)
        assert error < 4e-3


def test_float32_head_under_bfloat16_compute_gets_float32_gradients():
    p = problem()
    hidden = p.hidden.astype(jnp.bfloat16)
    dw = jax.grad(lambda w: linear_logprob(hidden, w, p.targets).logps.sum())
    assert jax.eval_shape(dw, p.head).dtype == jnp.float32


def compiled_text(argnums, compact, n=300, d=24, v=200, chunk=64, **kwargs):
    p = problem(n=n, d=d, v=v)
    mask = p.mask if compact else None

    def loss(hidden, head):
        out = linear_logprob(hidden, head, p.targets, mask=mask, chunk=chunk, **kwargs)
        return out.logps.sum()

    compiled = jax.jit(jax.grad(loss, argnums)).lower(p.hidden, p.head).compile()
    return compiled.as_text()


def matmuls(text):
    return len(re.findall(r"= \S+ dot\(|__onednn\$matmul", text))


@pytest.mark.parametrize("compact", [False, True])
def test_no_buffer_holds_all_logits(one_device, compact):
    text = compiled_text((0, 1), compact)
    assert re.search(r"f32\[64,200\]", text)
    assert not re.search(r"\[(300|320),200\]", text)
    naive = compiled_text((0, 1), compact, impl="reference")
    assert re.search(r"f32\[300,200\]", naive)


@pytest.mark.parametrize("compact", [False, True])
@pytest.mark.parametrize("chunk", [64, 300])
def test_a_frozen_head_costs_no_matmul(one_device, compact, chunk):
    """Forward, recomputation, dH: a single block shares the first two, and dW is the rest."""
    forward = 1 if chunk == 300 else 2
    assert matmuls(compiled_text((0, 1), compact, chunk=chunk)) == forward + 2
    assert matmuls(compiled_text(0, compact, chunk=chunk)) == forward + 1


def test_a_frozen_head_costs_no_matmul_in_tiles_either(one_device, monkeypatch):
    monkeypatch.setitem(xla.BLOCK, "cpu", (512, 64))
    assert matmuls(compiled_text((0, 1), True)) == 4
    assert matmuls(compiled_text(0, True)) == 3


def test_default_blocks_fit_the_budget():
    for vocab in (1, 10, 32_000, 128_256, 10**9):
        for tokens in (1, 500, 5000):
            chunk = xla.default_chunk(tokens, vocab, platform="cpu")
            assert 1 <= chunk <= tokens
            assert chunk == 1 or chunk * vocab * 4 <= xla.CHUNK_BYTES["cpu"]
    assert xla.default_chunk(5000, 300, platform="cpu") == 5000
    assert xla.default_chunk(1000, 32_000, platform="cpu") == 512


def test_vocabulary_over_devices_equals_one_device():
    from jax.sharding import AxisType, NamedSharding, PartitionSpec

    p = problem(n=24, d=8, v=40)
    mesh = jax.make_mesh((2, 4), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)

    def loss(hidden, head):
        out = linear_logprob(hidden, head, p.targets, mask=p.mask[:1].repeat(24), chunk=8)
        return out.logps.sum(), out.logps

    step = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))
    want = step(p.hidden, p.head)
    placed = (
        jax.device_put(p.hidden, NamedSharding(mesh, PartitionSpec("data", None))),
        jax.device_put(p.head, NamedSharding(mesh, PartitionSpec("tensor", None))),
    )
    for a, b in zip(jax.tree.leaves(step(*placed)), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_errors_list_the_choices():
    p = problem()
    with pytest.raises(ConfigError, match="'triton'.*'pallas_hopper', 'pallas_tpu', 'reference'"):
        linear_logprob(p.hidden, p.head, p.targets, impl="triton")
    for name, zero in (("temperature", 0.0), ("softcap", 0.0), ("chunk", 0)):
        with pytest.raises(ConfigError, match=f"{name} must be positive, got 0"):
            linear_logprob(p.hidden, p.head, p.targets, **{name: zero})


@pytest.mark.parametrize(
    "need_entropy, vocab", [(True, 40), (False, 40), (True, 44)], ids=["", "no entropy", "uneven"]
)
def test_explicitly_divided_vocabulary_equals_float64(need_entropy, vocab):
    """Also where a device's part, 11 entries, is filled up to whole tiles of 4."""
    from jax.sharding import AxisType

    p = problem(n=24, d=8, v=vocab)
    firsts = vocab // 4 * jnp.arange(4)  # one's first entry follows another's last
    p.targets, p.mask = p.targets.at[:4].set(firsts), p.mask.at[:4].set(True)
    mesh = jax.make_mesh((2, 4), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    spec = Spec(0.7, 3.0, need_entropy, chunk=5, tile=4)
    if not need_entropy:
        p.cotangents = p.cotangents.at[1].set(0)
    values, grads = torch_oracle(p, 0.7, 3.0, p.mask)

    @jax.jit
    def both(hidden, head, bias):
        def fn(*x):
            out = sharded.linear_logprob(
                *x[:2], p.targets, p.mask, x[2], spec, mesh=mesh, tokens=("data",)
            )
            return out.logps, out.entropy, out.lse

        outs, pull = jax.vjp(fn, hidden, head, bias)
        c = p.cotangents
        return outs, pull((c[0], c[1] if need_entropy else None, c[2]))

    outs, got = both(p.hidden, p.head, p.bias)
    for a, b in zip(outs, values, strict=True):
        if a is not None:
            np.testing.assert_allclose(a, b, atol=2e-6, rtol=1e-5)
    for a, b in zip(got, grads, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-5)


def test_the_divided_operator_is_asked_for_by_name_or_taken_on_tpus():
    """Under the mesh of a training step: equal to one device; lowered for TPUs, the kernel."""
    p = problem(n=24, d=8, v=40)
    kinds = (jax.sharding.AxisType.Auto,) * 3
    mesh = jax.make_mesh((2, 1, 4), ("data", "fsdp", "tensor"), axis_types=kinds)

    def loss(hidden, head, impl):
        out = linear_logprob(hidden, head, p.targets, mask=p.mask[:1].repeat(24), impl=impl)
        return out.logps.sum()

    step = jax.jit(jax.value_and_grad(loss, (0, 1)), static_argnums=2)
    want = step(p.hidden, p.head, "reference")
    with jax.set_mesh(mesh):
        got = step(p.hidden, p.head, "sharded")
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-5)
        with compiling_for(Target("tpu", 8)):
            lowered = step.trace(p.hidden, p.head, "auto").lower(lowering_platforms=("tpu",))
        assert lowered.as_text().count("@tpu_custom_call") == 2
        for tokens, vocab, why in ((25, 40, "tokens .25"), (24, 42, "vocabulary .42")):
            assert re.match(f"the {why}. cannot be divided", sharded.refuses(tokens, vocab))
    assert "no mesh" in sharded.refuses(24, 40)
    mesh = jax.make_mesh(
        (1, 1, 4, 2), ("data", "fsdp", "tensor", "seq"), axis_types=(*kinds, kinds[0])
    )
    with jax.set_mesh(mesh):
        assert "also divides along 'seq'" in sharded.refuses(24, 40)


def test_what_cannot_be_divided_says_so():
    p = problem(n=24, d=8, v=42)
    mesh = jax.make_mesh((2, 4), ("data", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    args = p.hidden, p.head, p.targets, None, None, Spec()
    with pytest.raises(ConfigError, match=r"the vocabulary \(42\) cannot be divided over 4"):
        sharded.linear_logprob(*args, mesh=mesh, tokens=("data",))
    with pytest.raises(ConfigError, match=r"and not \['fsdp'\]"):
        sharded.linear_logprob(*args, mesh=mesh)
