"""The arithmetic experiment from nothing, small: its files, its table, and what it refuses."""

import pytest

from aa_jax.errors import DataError
from aa_jax.rl import arithmetic_run


@pytest.mark.slow
def test_a_small_run(tmp_path):
    figures = arithmetic_run.run(
        tmp_path / "a", algorithm="grpo", model=dict(dim=16, layers=1, heads=2, mlp_dim=24),
        sft=dict(batch_rows=16, epochs=1, optim=dict(lr=1e-2)), demonstrations=64, prompts=32,
        test_problems=16, digits=1, optim=dict(lr=1e-3),
        rollout=dict(prompts=8, samples=2, iterations=2),
        sampling=dict(max_new_tokens=16, batch_rows=8),
        reward={"terms": {"exact": {"where": "answer"}, "format": {"weight": 0.2}}},
    )  # fmt: skip
    assert list(figures) == ["start", "start, greedy", "grpo", "grpo, greedy"]
    assert "exact match" in (tmp_path / "a/report.html").read_text()
    lines = arithmetic_run.table([tmp_path / "a"]).splitlines()
    assert len(lines) == 8 and lines[2].startswith("| start | ")
    assert (tmp_path / "a/model/model.safetensors").exists()


def test_an_unfinished_run_is_named(tmp_path):
    with pytest.raises(DataError, match="holds no finished run on arithmetic"):
        arithmetic_run.table([tmp_path])
