"""The command that compiles kernels for absent accelerators: what it judges, and how it refuses."""

import argparse

import jax
import jax.numpy as jnp
import pytest

from aa_jax.errors import ConfigError
from aa_jax.kernels import verify


def case(**kwargs):
    shape = (64, 64), jnp.float32
    return verify.Case("name", lambda x: x @ (x @ x), (shape,), **{"kernels": 0, **kwargs})


def test_the_budget_and_the_kernels_are_checked():
    device = jax.devices()[0]
    line, passed = verify.check(case(budget_mib=1.0), device, mosaic=False)
    assert passed and line.startswith("ok") and "of 1 MiB" in line
    line, passed = verify.check(case(budget_mib=0.0), device, mosaic=False)
    assert not passed and line.startswith("EXCEEDED")
    line, passed = verify.check(case(budget_mib=1.0, kernels=1), device, mosaic=True)
    assert not passed and "0 of 1 kernels" in line


def test_a_program_that_does_not_compile_is_a_failed_line():
    broken = verify.Case("name", lambda x: x.nothing, (((2,), jnp.float32),), 1.0, 0)
    line, passed = verify.check(broken, jax.devices()[0], mosaic=False)
    assert not passed and line.startswith("FAILED") and "AttributeError" in line


def test_every_shape_has_forward_and_gradient():
    names = [c.name for c in verify.cases("pallas_tpu")]
    shapes = len(verify.LOGPROB_SHAPES) + len(verify.ATTENTION_SHAPES)
    assert len(set(names)) == len(names) == 2 * shapes


def test_cudnn_is_asked_for_where_it_is_chosen():
    names = [c.name for c in verify.cudnn_cases()]
    assert len(set(names)) == 6 and all(c.call.startswith("__cudnn") for c in verify.cudnn_cases())


def test_a_compiler_that_is_not_there_is_named(monkeypatch, tmp_path):
    target = tmp_path / "gpu.txtpb"
    target.write_text("nonsense")
    options = argparse.Namespace(platform="gpu", target=str(target), topology=None)
    with pytest.raises(ConfigError, match="no compiler for cuda.*CUDA plugin"):
        list(verify.devices(options))
