"""The table of tile sizes, and how candidates for it are judged."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aa_jax.kernels import static, tune, tuning
from aa_jax.kernels.attention import pallas_tpu as attention_tpu
from aa_jax.platforms.chips import find_chip
from aa_jax.platforms.target import Target, compiling_for


def test_the_table_is_of_known_chips_and_keeps_them_busy():
    for key, sizes in tuning.TABLE.items():
        chip = find_chip(key.kind)
        assert key.operator in tuning.DEFAULT and key.dtype == "bfloat16"
        assert sizes in tune.CANDIDATES[key.operator]
        assert tune.intensity(key.operator, sizes) >= chip.peak / chip.bandwidth
    for operator, sizes in tuning.DEFAULT.items():
        assert all(size % 128 == 0 for size in sizes) and sizes in tune.CANDIDATES[operator]


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.dtype("bfloat16"), "bfloat16"])
def test_what_is_compiled_for_decides(dtype):
    find = functools.partial(tuning.sizes, "attention", dtype)
    with compiling_for(Target("tpu", 1, kind="TPU v5 lite")):
        v5e = tuning.TABLE["TPU v5 lite", "attention", "bfloat16", "heads of 128"]
        assert find(64) == find(128) == v5e
        assert tuning.sizes("attention", jnp.float32, 128) == tuning.DEFAULT["attention"]
    with compiling_for(Target("tpu", 1, kind="TPU v99")):
        assert find(128) == tuning.DEFAULT["attention"]
    assert find(128) == tuning.DEFAULT["attention"]  # the CPU of this machine
    assert find(128, kind="TPU v5 lite") == v5e


def test_a_kernel_is_built_with_the_sizes_of_the_table(monkeypatch):
    """256 queries in tiles of 128: two of them are the grid's third axis."""
    monkeypatch.setitem(tuning.DEFAULT, "attention", (128, 256))
    q = jax.ShapeDtypeStruct((1, 256, 1, 64), jnp.bfloat16)
    program = jax.make_jaxpr(lambda q: attention_tpu.attention(q, q, q, None, 0.1))(q)
    assert "grid=(1, 1, 2, 1)" in str(program)


def facts(forward=1000, spills=10, kib=1024.0):
    masked = static.Body(5 * forward, 5 * spills)
    return tuple(
        static.Facts(name, kib, 99, 9999, bodies=(masked, static.Body(forward, spills)))
        for name in ("attention_dkv", "attention_dq", "attention_forward")
    )


def test_the_body_without_a_mask_is_weighed():
    weigh = functools.partial(tune.weigh, "attention", (512, 512), 128, "TPU v5 lite")
    found = weigh(facts())
    # 2 + 3 + 4 products of 512 x 512 x 128, 65536 multiplications a cycle
    assert found.busy == 1.0  # 4608 cycles in 3000 bundles
    assert weigh(facts(4000)).busy == pytest.approx(9 * 512 / 12000)
    assert found.spills == pytest.approx(0.01) and found.refused is None
    assert "17.0 MiB" in weigh(facts(kib=17 * 1024)).refused
    assert "no report" in weigh(()).refused
    log_probs = tune.weigh("linear_logprob_forward", (512, 1024, 256), 4096, "", facts()[:1])
    assert log_probs.busy == 1.0


def test_few_operations_per_byte_are_dropped_before_compiling(monkeypatch, tmp_path):
    monkeypatch.setattr(tune, "compile_one", lambda *_: pytest.fail("compiled"))
    device = type("Device", (), {"device_kind": "TPU v6 lite"})()
    judge = functools.partial(tune.judge, "linear_logprob_forward")
    found = judge((512, 1024, 256), "bfloat16", 4096, device, tmp_path)
    assert "341 operations per byte, v6e needs 560" in found.refused
    monkeypatch.setattr(tune, "compile_one", lambda *_: (_ for _ in ()).throw(ValueError("vmem")))
    found = judge((1024, 2048, 256), "bfloat16", 4096, device, tmp_path)
    assert found.refused == "ValueError: vmem"


def test_attention_prefers_small_tiles_and_log_probs_few_spills():
    def outcome(sizes, busy, spills):
        return tune.Outcome(sizes, None, busy, spills)

    found = [outcome((512, 1024), 1.0, 0.4), outcome((512, 512), 0.96, 0.5),
             outcome((256, 256), 0.7, 0.0), tune.Outcome((128, 128), "too small")]  # fmt: skip
    assert [o.sizes for o in tune.rank("attention", found)] == [(512, 512), (512, 1024)]
    found = [outcome((512, 512, 512), 1.0, 0.05), outcome((512, 1024, 512), 0.97, 0.01)]
    assert tune.rank("linear_logprob_forward", found)[0].sizes == (512, 1024, 512)
    assert tune.rank("attention", []) == []


def test_what_is_checked_is_what_is_shipped():
    shipped = dict(tune.wanted("TPU v5 lite", "", check=True))
    for key, sizes in tuning.TABLE.items():
        if key.kind == "TPU v5 lite":
            depth = int(key.bucket.split()[-1]) if key.operator == "attention" else 4096
            assert shipped[key.operator, key.dtype, depth][0] == sizes
    assert all(sizes[-1] == tuning.DEFAULT[key[0]] for key, sizes in shipped.items())
    only = dict(tune.wanted("", "attention", check=False, only=[(512, 512), (1, 2, 3)]))
    assert set(map(tuple, only.values())) == {((512, 512),)}
    assert np.all([len(x) == 1 for x in only.values()])
