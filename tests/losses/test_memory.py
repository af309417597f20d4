"""The compiler's own account: log-probs of responses do not need memory for all logits."""

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from aa_jax.kernels.linear_logprob import xla

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "dpo_memory.py"


@pytest.fixture(scope="module")
def benchmark():
    spec = importlib.util.spec_from_file_location("dpo_memory", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def test_the_logprob_part_does_not_grow_with_tokens_times_vocabulary(benchmark):
    small = benchmark.Shape(pairs=2, length=512, responses=64, dim=32, vocab=32_000)
    large = replace(small, pairs=8, length=2048)
    logits = large.pairs * large.length * large.vocab * 4  # 2 GiB
    head = large.vocab * large.dim * 4
    hidden = large.pairs * large.length * large.dim * 4
    budget = xla.CHUNK_BYTES["cpu"]

    ours = {shape: benchmark.logprob_bytes("ours", shape) for shape in (small, large)}
    assert ours[large] < 2 * budget + 2 * head + 4 * hidden < logits / 8
    assert ours[large] - ours[small] < budget + 4 * hidden
    naive = benchmark.logprob_bytes("all", large)
    assert naive >= logits and naive > 8 * ours[large]


def test_a_whole_step_is_smaller_too(benchmark):
    shape = benchmark.Shape(pairs=2, length=256, responses=32, dim=64, vocab=20_000)
    ours = benchmark.step_bytes("ours", shape, layers=1)
    assert 2 * ours < benchmark.step_bytes("all", shape, layers=1)


def test_the_script_prints_ratios_and_writes_them(benchmark, tmp_path, capsys, monkeypatch):
    import json

    out = tmp_path / "figures.json"
    flags = "--pairs 1 --length 32 --responses 8 --dim 16 --vocab 50000 --skip-step --out"
    monkeypatch.setattr(sys, "argv", ["dpo_memory.py", *flags.split(), str(out)])
    benchmark.main()
    assert "all / ours = " in capsys.readouterr().out
    (row,) = json.loads(out.read_text())["logprob"]
    figures = row["temporary_bytes"]
    assert row["ratio"]["all"] == figures["all"] / figures["ours"] > 1
