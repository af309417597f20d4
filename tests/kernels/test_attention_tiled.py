"""Attention over visible tiles alone: exact, skipped where nobody looks, divided over a mesh."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from aa_jax import models, objectives
from aa_jax.kernels.attention import attention, causal_intervals, tiled, visible, xla
from aa_jax.plan import program
from aa_jax.plan.hlo import collectives
from aa_jax.platforms import PLATFORMS, portable
from aa_jax.platforms.target import Target, compiling_for
from aa_jax.sharding import make_mesh, shardings
from tests.kernels import test_attention_tpu

T = test_attention_tpu.T  # 200: not a multiple of the tiles below
TILES = tiled.Tiles(48, 32)


def intervals(kind):
    """Per row: causal, and what `test_attention_tpu` has; queries without keys at the end."""
    if kind is None:
        return None
    iv = test_attention_tpu.MASKS[kind]().copy()
    iv[1, -7:] = 0
    return jnp.asarray(iv)


def auto_mesh():
    kinds = (jax.sharding.AxisType.Auto,) * 3
    return jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=kinds)


def arrays(rows=2, heads=4, kv_heads=2, depth=8, dtype=jnp.float32, length=T):
    rng = np.random.default_rng(0)
    shapes = [(length, heads), (length, kv_heads), (length, kv_heads), (length, heads)]
    return [jnp.asarray(rng.normal(size=(rows, *s, depth)), dtype) for s in shapes]


@functools.partial(jax.jit, static_argnums=4)
def both(q, k, v, iv, tiles, dout):
    """(out, gradients of q, k and v)"""
    run = functools.partial(xla.attention, scale=0.2, tiles=tiles)
    out, pull = jax.vjp(lambda *x: run(*x, iv), q, k, v)
    return out, *pull(dout)


@pytest.mark.parametrize("kind", ["packed, padded, shared prefix", None])
def test_float64(kind):
    iv, (q, k, v, dout) = intervals(kind), arrays()
    seen = np.ones((2, T, T), bool) if iv is None else np.asarray(visible(iv, T))
    want = test_attention_tpu.oracle(q, k, v, seen, dout, 0.2)
    got = both(q, k, v, iv, TILES, dout)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
        assert np.linalg.norm(np.asarray(a, np.float64) - b) <= 1e-5 * np.linalg.norm(b)
    for x in got[:2]:
        assert (np.asarray(x)[~seen.any(-1)] == 0).all()
    for x in got[2:]:
        assert (np.asarray(x)[~seen.any(1)] == 0).all()


def test_bfloat16_is_as_exact_as_the_dense_path():
    iv, low = intervals("packed, padded, shared prefix"), arrays(dtype=jnp.bfloat16)
    want = test_attention_tpu.oracle(*low[:3], np.asarray(visible(iv, T)), low[3], 0.2)
    dense = jax.jit(functools.partial(both, tiles=None))(*low[:3], iv, dout=low[3])

    def errors(found):
        pairs = zip(found, want, strict=True)
        return [np.linalg.norm(np.asarray(a, np.float64) - b) / np.linalg.norm(b) for a, b in pairs]

    got = both(*low[:3], iv, TILES, low[3])
    assert got[0].dtype == got[1].dtype == jnp.bfloat16
    for mine, theirs, gate in zip(
        errors(got), errors(dense), (5e-3, 1e-2, 1e-2, 1e-2), strict=True
    ):
        assert mine <= gate and mine <= 2 * theirs


def test_nan_that_nobody_sees_stays_where_it_is():
    q, k, v, dout = arrays()
    iv = intervals("packed, padded, shared prefix")
    blind, unseen = iv[..., 3] == 0, ~visible(iv, T).any(1)
    q, dout = (jnp.where(blind[..., None, None], jnp.nan, x) for x in (q, dout))
    k, v = (jnp.where(unseen[..., None, None], jnp.nan, x) for x in (k, v))
    assert np.isnan(k).any() and np.isnan(q).any()
    clean = both(*(jnp.nan_to_num(x) for x in (q, k, v)), iv, TILES, jnp.nan_to_num(dout))
    for got, want in zip(both(q, k, v, iv, TILES, dout), clean, strict=True):
        np.testing.assert_array_equal(got, want)


def test_tiles_that_nobody_sees_are_not_visited():
    """What a tile holds is counted by the loop itself: a step adds the keys' tile number."""
    iv = intervals("packed, padded, shared prefix")
    q, k, *_ = arrays()
    cut = tiled._Cut(q, k, iv, TILES)

    def step(carry, i, j, seen):
        return carry.at[i, j % cut.down].add(seen.sum())

    found = cut.visit(step, jnp.zeros((2 * cut.across, cut.down), jnp.int32))
    steps = jax.jit(lambda: cut.visit(lambda n, *_: n + 1, 0))()
    padded = np.zeros((2, cut.across * 48, cut.down * 32), bool)
    padded[:, :T, :T] = np.asarray(visible(iv, T))
    want = padded.reshape(2, cut.across, 48, cut.down, 32).sum((2, 4))
    np.testing.assert_array_equal(found, want.reshape(-1, cut.down))
    assert steps == (want > 0).sum() < want.size / 2


@pytest.mark.slow
def test_under_vmap_scan_and_checkpoint():
    q, k, v, _ = arrays(length=40, depth=4)
    iv = jnp.repeat(causal_intervals(40), 2, 0)
    run = functools.partial(xla.attention, intervals=iv, scale=0.3, tiles=tiled.Tiles(16, 16))

    def mapped(q):
        return jax.vmap(lambda x: xla.attention(x[None], k[:1], v[:1], iv[:1], 0.3,
                                                tiles=tiled.Tiles(16, 16))[0])(q)  # fmt: skip

    np.testing.assert_allclose(
        jax.jit(mapped)(q), run(q, *(jnp.repeat(x[:1], 2, 0) for x in (k, v))), atol=1e-6
    )
    policy = jax.checkpoint_policies.save_only_these_names("attention_out", "attention_lse")

    def layers(q, wrap):
        layer = wrap(lambda x, _: (run(x, k, v), None))
        return (jax.lax.scan(layer, q, None, length=2)[0] ** 2).sum()

    plain = jax.jit(jax.grad(lambda q: layers(q, lambda f: f)))(q)
    for wrap in (jax.checkpoint, functools.partial(jax.checkpoint, policy=policy)):
        np.testing.assert_allclose(
            jax.jit(jax.grad(lambda q, wrap=wrap: layers(q, wrap)))(q), plain, rtol=1e-5, atol=1e-6
        )


@pytest.mark.parametrize(
    "kind", ["packed, padded, shared prefix", pytest.param(None, marks=pytest.mark.slow)]
)
def test_over_a_mesh_every_device_walks_alone(kind):
    """Rows over data and fsdp, heads over tensor: the same numbers and no word between devices."""
    q, k, v, dout = arrays(rows=4)
    iv = intervals(kind)
    iv = iv if iv is None else jnp.tile(iv, (2, 1, 1))
    want = both(q, k, v, iv, TILES, dout)
    mesh = auto_mesh()
    place = NamedSharding(mesh, P(("data", "fsdp"), None, "tensor"))
    q, k, v, dout = (jax.device_put(x, place) for x in (q, k, v, dout))
    if iv is not None:
        iv = jax.device_put(iv, NamedSharding(mesh, P(("data", "fsdp"))))
    with jax.set_mesh(mesh):
        run = jax.jit(lambda *x: both.__wrapped__(*x[:4], TILES, x[4]), out_shardings=place)
        step = run.lower(q, k, v, iv, dout).compile()
    assert not collectives(step.as_text())
    for a, b in zip(step(q, k, v, iv, dout), want, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_who_takes_tiles(monkeypatch):
    def taken(length, intervals, rows=1, heads=4, kv_heads=2):
        called = []
        monkeypatch.setattr(tiled, "attention", lambda *x: called.append(x[5:]) or x[0])
        shapes = [jax.ShapeDtypeStruct((rows, length, n, 64), jnp.float32) for n in (heads, 2, 2)]
        iv = jax.ShapeDtypeStruct((1, length, 4), jnp.int32) if intervals else None
        jax.eval_shape(lambda *x: xla.attention(*x, 0.1), *shapes, iv)
        return called[0] if called else None

    with compiling_for(Target("cpu", 1)):
        assert taken(200, True) is taken(400, False) is None
        assert taken(300, True) == ((100, 100), None)
        assert taken(577, False) == ((116, 116), None)
        assert taken(2048, True) == ((256, 256), None)
    with compiling_for(Target("cuda", 1, "9.0")):
        assert taken(4096, False) is taken(1024, True) is None
        assert taken(4096, True, rows=4, heads=32) == ((512, 1024), None)
    # On several devices the mesh must say how rows and heads are divided, and divide them.
    with compiling_for(Target("cpu", 8)):
        assert taken(2048, True, rows=4) is None
        with jax.set_mesh(auto_mesh()):
            assert taken(2048, True, rows=6) is None
            tiles, division = taken(2048, True, rows=4)
            assert tiles == (256, 256) and division is not None


def test_operations_are_those_of_every_platform():
    iv = intervals("causal")
    exported = portable.export(
        lambda *x: both.__wrapped__(*x[:4], TILES, x[4]), *arrays()[:3], iv, arrays()[3],
        platform=PLATFORMS["ascend"],
    )  # fmt: skip
    text = exported.mlir_module()
    assert "custom_call" not in text and "stablehlo.while" in text


def test_the_operator_takes_them_by_itself():
    """A long packed row through the public function, beside the oracle of every implementation."""
    length = 512
    at = np.arange(length)
    iv = jnp.asarray(np.stack([0 * at, 0 * at, at // 128 * 128, at + 1], -1)[None], jnp.int32)
    q, k, v, _ = arrays(rows=1, heads=2, kv_heads=1, depth=4, length=length)
    with compiling_for(Target("cpu", 1)):
        got = jax.jit(lambda *x: attention(*x, intervals=iv))(q, k, v)
        text = jax.jit(lambda *x: attention(*x, intervals=iv)).lower(q, k, v).as_text()
    assert "stablehlo.while" in text
    want = attention(q, k, v, intervals=iv, impl="reference")
    np.testing.assert_allclose(got, want, atol=2e-6)


@pytest.mark.slow
def test_a_dpo_step_over_eight_devices_sends_nothing_more(monkeypatch):
    """Beside the path that XLA divides by itself: the same collectives."""
    model = models.build(dict(
        model_type="llama", architectures=["LlamaForCausalLM"], vocab_size=64, hidden_size=16,
        intermediate_size=24, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
    ))  # fmt: skip
    objective = objectives.dpo(model)
    batch = program.abstract_batch(model, "preference", 4, 256, 8, program.Layout())
    batch["ref_logps"] = jax.ShapeDtypeStruct((4, 2), jnp.float32)
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    layout = shardings(model.axes(), model.abstract(), mesh)
    rows = NamedSharding(mesh, P(("data", "fsdp")))

    def placed(x, sharding):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    params = jax.tree.map(placed, model.abstract(), layout)
    batch = jax.tree.map(lambda x: placed(x, rows), batch)

    def sent():
        with jax.set_mesh(mesh):
            grad = jax.jit(
                jax.grad(lambda p, b: objective(p, b)[0]), out_shardings=layout
            ).lower(params, batch)  # fmt: skip
            return grad.as_text(), collectives(grad.compile().as_text())

    text, tiled_traffic = sent()
    monkeypatch.setattr(xla, "TILED_ON_CPU", {"intervals": 10**6, "full": 10**6})
    jax.clear_caches()
    dense_text, dense_traffic = sent()
    # The first one did take tiles.
    assert text.count("manual_computation") > dense_text.count("manual_computation")
    assert tiled_traffic == dense_traffic and tiled_traffic["all-gather"].count
