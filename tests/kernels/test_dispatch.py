"""The choice of an implementation is explicit and loud."""

import logging

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


def test_the_default_backend_is_asked():
    assert choose("op", TABLE) is _slow
