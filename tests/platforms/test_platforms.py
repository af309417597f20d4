"""Platform selection, start-up and self-description."""

import logging
import os
import subprocess
import sys

import jax
import pytest

from aa_jax import platforms
from aa_jax.errors import ConfigError
from aa_jax.platforms import gpu, startup


@pytest.mark.parametrize(
    ("backend", "name", "dtype", "kernel"),
    [
        ("cpu", "cpu", "float32", "xla"),
        ("gpu", "gpu", "bfloat16", "pallas_gpu"),
        ("cuda", "gpu", "bfloat16", "pallas_gpu"),
        ("rocm", "rocm", "bfloat16", "xla"),
        ("tpu", "tpu", "bfloat16", "pallas_tpu"),
        ("ascend", "ascend", "bfloat16", "xla"),
        ("npu", "generic", "float32", "xla"),
    ],
)
def test_select(backend, name, dtype, kernel):
    platform = platforms.select(backend)
    assert platform.name == name
    assert platform.compute_dtype == dtype
    available = {"xla", "pallas_gpu", "pallas_tpu", "reference"}
    assert platform.choose_kernel(available) == kernel
    assert platform.choose_kernel(available - {kernel}) in ("xla", "reference")


def test_every_platform_is_listed_under_its_name():
    assert list(platforms.PLATFORMS) == ["cpu", "gpu", "rocm", "tpu", "ascend", "generic"]
    for name, platform in platforms.PLATFORMS.items():
        assert platform.name == name
        assert platform.param_dtype == "float32"


def test_no_kernel_is_an_error():
    with pytest.raises(ConfigError, match="'cpu'.*pallas_tpu.*xla, reference"):
        platforms.PLATFORMS["cpu"].choose_kernel(["pallas_tpu"])


def test_current_follows_jax():
    assert platforms.current().name == "cpu"


def test_unknown_backend_is_mentioned_once(monkeypatch, caplog):
    monkeypatch.setattr(jax, "default_backend", lambda: "photonic")
    startup._select_once.cache_clear()
    with caplog.at_level(logging.INFO, logger="aa_jax"):
        assert platforms.current().name == "generic"
        assert platforms.current().name == "generic"
    assert [r.getMessage() for r in caplog.records if "'photonic'" in r.getMessage()] == [
        "unknown backend 'photonic': using the generic platform "
        "(unknown backend: XLA operations in float32)"
    ]


def test_environment_names_versions_but_not_the_user():
    facts = platforms.environment()
    assert facts["jax"] == jax.__version__
    assert facts["device"] == f"{jax.device_count()} × cpu"
    assert int(facts["CPU cores"]) >= 1
    assert facts["host memory"].endswith("GiB")
    text = " ".join(facts.values())
    assert os.getcwd() not in text and os.uname().nodename not in text
    assert platforms.describe().startswith(facts["device"])


def test_start_sets_only_what_the_user_has_not(monkeypatch):
    for name in ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"):
        monkeypatch.delenv(name, raising=False)
    # Both names at once make JAX refuse to start: the user's old name must keep ours away.
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.3")
    platforms.start()
    assert "XLA_CLIENT_MEM_FRACTION" not in os.environ
    monkeypatch.setenv("XLA_CLIENT_MEM_FRACTION", "unset")  # restored by monkeypatch
    platforms.start(memory_fraction=0.5)
    assert os.environ["XLA_CLIENT_MEM_FRACTION"] == "0.5"
    assert "XLA_PYTHON_CLIENT_MEM_FRACTION" not in os.environ
    platforms.start()
    assert os.environ["XLA_CLIENT_MEM_FRACTION"] == "0.5"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize(
    ("variables", "kept"), [({}, True), ({"MALLOC_TRIM_THRESHOLD_": "1000"}, False)]
)
def test_freed_memory_is_kept_unless_the_user_has_set_malloc(variables, kept):
    """By the kernel's count of page faults: the second use of as large an array causes none."""
    program = (
        "import resource, numpy as np\n"
        "from aa_jax.platforms.memory import keep_freed_memory\n"
        "said = keep_freed_memory()\n"
        "np.ones(1 << 23)\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "np.ones(1 << 23)\n"
        "faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before\n"
        "print(said, faults)\n"
    )
    env = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_"))}
    out = subprocess.run(
        [sys.executable, "-c", program], env=env | variables, check=True, capture_output=True
    )
    said, faults = out.stdout.decode().split()
    assert said == str(kept)
    assert int(faults) < 10 if kept else int(faults) > 20


def test_start_errors(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="compilation cache .* cannot be created"):
        platforms.start(compilation_cache=tmp_path / "file" / "cache")
    with pytest.raises(ConfigError, match=r"\(0, 1\], got 1.5"):
        platforms.start(memory_fraction=1.5)


def test_start_fills_the_compilation_cache(tmp_path):
    program = (
        "import sys, jax, jax.numpy as jnp\n"
        "from aa_jax import platforms\n"
        "platforms.start(compilation_cache=sys.argv[1])\n"
        "jax.config.update('jax_persistent_cache_min_compile_time_secs', 0)\n"
        "jax.jit(lambda x: x * 2 + 1)(jnp.ones(3)).block_until_ready()\n"
    )
    cache = tmp_path / "cache"
    subprocess.run([sys.executable, "-c", program, str(cache)], check=True)
    assert any(cache.iterdir())


def test_a_platform_says_once_what_it_decides(caplog):
    startup._select_once.cache_clear()
    with caplog.at_level(logging.INFO, logger="aa_jax"):
        platforms.current()
        platforms.current()
    lines = [r.getMessage() for r in caplog.records if "platform cpu" in r.getMessage()]
    assert len(lines) == 1
    assert "compute float32" in lines[0] and "kernels xla > reference" in lines[0]
    line = platforms.decisions(platforms.PLATFORMS["ascend"])
    assert "no custom call" in line and "not executed" in line
    assert "without loss scaling" in platforms.decisions(platforms.PLATFORMS["tpu"])


@pytest.mark.parametrize(
    ("version", "capability", "cudnn", "words"),
    [
        ("PJRT C API\ncuda 13000", "9.0", 91000, []),
        ("cuda 12090", "9.0", 91000, ["ptxas"]),
        ("cuda 11080", "7.5", None, ["needs 12 or 13", "no bfloat16"]),
        ("cuda 13000", "8.0", None, ["cuDNN is not installed"]),
        ("PJRT C API\nrocm 60400", "gfx942", None, []),
    ],
)
def test_the_cuda_toolchain_is_checked(version, capability, cudnn, words):
    problems = gpu.toolchain_problems(version, capability, cudnn)
    assert len(problems) == len(words)
    for problem, word in zip(problems, words, strict=True):
        assert word in problem
    assert gpu.is_rocm(version) == ("rocm" in version)
