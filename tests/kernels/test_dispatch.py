"""The choice of an implementation is explicit and loud."""

import logging

import jax
import jax.numpy as jnp
import pytest

from aa_jax.errors import ConfigError
from aa_jax.kernels import dispatch
from aa_jax.kernels.dispatch import Implementation, choose


def _fast():
    return "fast"


def _slow():
    return "slow"


TABLE = {
    "fast": Implementation(_fast, platforms=("tpu",), preferred=("tpu",)),
    "reference": Implementation(_slow),
    "portable": Implementation(_slow, preferred=None),
}


def test_auto_follows_the_table_and_says_so_once(caplog):
    dispatch._log_once.cache_clear()
    with caplog.at_level(logging.INFO, logger=dispatch.__name__):
        assert choose("op", TABLE, platform="tpu") is _fast
        assert choose("op", TABLE, platform="tpu") is _fast
        assert choose("op", TABLE, platform="some new chip") is _slow
    assert caplog.messages == [
        "op runs its 'fast' implementation on tpu",
        "op runs its 'portable' implementation on some new chip",
    ]


def test_forcing_is_obeyed_or_refused():
    assert choose("op", TABLE, "reference", platform="tpu") is _slow
    with pytest.raises(ConfigError, match=r"'fast' runs on \['tpu'\].*'cpu'.*'portable'"):
        choose("op", TABLE, "fast", platform="cpu")
    with pytest.raises(ConfigError, match=r"no implementation 'fats'.*'fast', 'portable'"):
        choose("op", TABLE, "fats", platform="tpu")


def test_what_cannot_take_the_arrays_is_passed_over_aloud_or_refused(caplog):
    picky = Implementation(_fast, ("tpu",), ("tpu",), lambda dtype: f"{dtype} is not for me")
    table = {"fast": picky, "portable": Implementation(_slow, preferred=None)}
    table["portable"] = table["portable"]._replace(refuses=lambda dtype: None)
    with caplog.at_level(logging.INFO, logger=dispatch.__name__):
        assert choose("picky", table, platform="tpu", dtype="int8") is _slow
    assert caplog.messages == [
        "picky runs its 'portable' implementation on tpu ('fast' does not run: int8 is not for me)"
    ]
    with pytest.raises(ConfigError, match="'fast' cannot run here: int8 is not for me"):
        choose("picky", table, "fast", platform="tpu", dtype="int8")
    del table["portable"]
    with pytest.raises(ConfigError, match="no implementation runs on 'tpu': 'fast' does not run"):
        choose("picky", table, platform="tpu", dtype="int8")


def test_a_kernel_needs_one_device_or_a_manual_mesh():
    assert not dispatch.undivided()  # eight devices and nobody knows where the arrays are
    axes = dict(axis_types=(jax.sharding.AxisType.Auto,))
    with jax.set_mesh(jax.make_mesh((1,), ("data",), devices=jax.devices()[:1], **axes)):
        assert dispatch.undivided()
    mesh = jax.make_mesh((8,), ("data",), **axes)
    seen = []

    def inside(x):
        seen.append(dispatch.undivided())
        return x

    with jax.set_mesh(mesh):
        assert not dispatch.undivided()
        spec = jax.sharding.PartitionSpec("data")
        jax.jit(jax.shard_map(inside, in_specs=spec, out_specs=spec)).lower(jnp.zeros(8))
    assert seen and all(seen)


def test_the_default_backend_is_asked():
    assert choose("op", TABLE) is _slow
