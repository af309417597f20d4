"""The command that compiles kernels for absent accelerators: what it judges, and how it refuses."""

import argparse

import jax
import jax.numpy as jnp
import pytest

from aa_jax.errors import ConfigError
from aa_jax.kernels import static, verify


def case(**kwargs):
    shape = (64, 64), jnp.float32
    return verify.Case("name", lambda x: x @ (x @ x), (shape,), **{"kernels": 0, **kwargs})


def test_the_budget_and_the_kernels_are_checked():
    device = jax.devices()[0]
    line, passed, mib, facts = verify.check(case(budget_mib=1.0), device, mosaic=False)
    assert 0 < mib < 1 and not facts
    assert passed and line.startswith("ok") and "of 1 MiB" in line
    line, passed, *_ = verify.check(case(budget_mib=0.0), device, mosaic=False)
    assert not passed and line.startswith("EXCEEDED")
    line, passed, *_ = verify.check(case(budget_mib=1.0, kernels=1), device, mosaic=True)
    assert not passed and "0 of 1 kernels" in line


def test_a_program_that_does_not_compile_is_a_failed_line():
    broken = verify.Case("name", lambda x: x.nothing, (((2,), jnp.float32),), 1.0, 0)
    line, passed, *_ = verify.check(broken, jax.devices()[0], mosaic=False)
    assert not passed and line.startswith("FAILED") and "AttributeError" in line


def test_every_shape_has_forward_and_gradient():
    shapes = len(verify.LOGPROB_SHAPES) + len(verify.ATTENTION_SHAPES)
    for implementation, refused in (("pallas_tpu", 0), ("xla", 0), ("pallas_hopper", 1)):
        names = [c.name for c in verify.cases(implementation)]
        assert len(set(names)) == len(names) == 2 * (shapes - refused)


def test_reports_of_a_tpu_kernel_are_read_and_removed(tmp_path):
    start = "17-jvp_attention_forward_.1-"
    (tmp_path / f"{start}70-final_hlo-static-per-bundle-utilization.txt").write_text(
        "== CAPACITY:\nMXU, VSTORE, VSTORE:SPILL, SALU\n 4 1 1 2\n== UTILIZATION:\n"
        "0 0 0 1\n0 1 1 0\n2 1 1 0\n"
    )
    # Before waits are merged there is one bundle more, an empty one after the product.
    (tmp_path / f"{start}68-pre-delay_hlo-static-per-bundle-utilization.txt").write_text(
        "== CAPACITY:\nMXU, VSTORE, VSTORE:SPILL, SALU\n 4 1 1 2\n== UTILIZATION:\n"
        "0 0 0 1\n0 1 1 0\n2 1 1 0\n0 0 0 0\n"
    )
    (tmp_path / f"{start}65-packed-bundles-post-ra.txt").write_text(
        "LH: loop header\n     0   :  { %1 = x } /* Start region 1 :: Start region 47 */\n"
        "   0x1   : > { %2 = y ;;\n more } /* End region 47 */\n   0x2 PF: > { %3 = z }\n"
        "   0x3   :  {}\n"
    )
    (tmp_path / f"{start}54-post-ra.txt").write_text(
        "  #allocation1 [shape = 'u32[8]', space=vmem, size = 0x800, scoped]\n"
        "  #allocation2 [shape = 'u8[8]', space=smem, size = 0x900, scoped]\n"
        "    #allocation8 [shape = 'u8[8]', space=vmem, size = 0x400, scoped]\n"
    )
    (tmp_path / "17-fusion-70-final_hlo-static-per-bundle-utilization.txt").write_text("no kernel")
    (found,) = static.take(tmp_path, "tpu")
    assert found == static.Facts(
        "attention_forward", 3.0, 2, bundles=3, bodies=(static.Body(2, 1),)
    )
    long = found._replace(bundles=10)
    assert long.keeps_budget() and not long._replace(spills=3).keeps_budget()
    assert not long._replace(kernel="linear_logprob_forward").keeps_budget()
    assert "2 spill stores in 3 bundles" in str(found) and not list(tmp_path.iterdir())


def test_reports_of_a_gpu_kernel_are_read(tmp_path):
    (tmp_path / "attention_dq_3.ptxas").write_text(
        "    0 bytes stack frame, 8 bytes spill stores, 8 bytes spill loads\n"
        "ptxas info    : Used 168 registers, used 16 barriers\n"
    )
    (tmp_path / "attention_dq_3.mlir-passes.log").write_text(
        "gpu.launch async dynamic_shared_memory_size %c135280_i32 {"
    )
    (found,) = static.take(tmp_path, "gpu")
    assert found == static.Facts("attention_dq", 135280 / 1024, 8, registers=168)
    assert not found.keeps_budget() and found._replace(spills=0).keeps_budget()
    assert "8 bytes spilled" in str(found)


def test_cudnn_is_asked_for_where_it_is_chosen():
    names = [c.name for c in verify.cudnn_cases()]
    assert len(set(names)) == 6 and all(c.call.startswith("__cudnn") for c in verify.cudnn_cases())


def test_a_compiler_that_is_not_there_is_named(monkeypatch, tmp_path):
    target = tmp_path / "gpu.txtpb"
    target.write_text("nonsense")
    options = argparse.Namespace(platform="gpu", target=str(target), topology=None)
    with pytest.raises(ConfigError, match="no compiler for cuda.*CUDA plugin"):
        list(verify.devices(options))
