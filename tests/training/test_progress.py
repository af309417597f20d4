"""Progress: lines in a log, a bar on a terminal, silence where asked."""

import io

import jax.numpy as jnp
import pytest
from rich.console import Console

from aa_jax.training import progress
from aa_jax.training.progress import Progress, stage_banner


class Clock:
    now = 100.0

    def monotonic(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


def plain():
    return Console(file=io.StringIO(), width=80)


def test_a_line_every_tenth(clock):
    console = plain()
    with Progress("dpo", 100, enabled=True, console=console) as bar:
        for step in range(1, 101):
            clock.now += 0.5
            bar.update(step, loss=jnp.float32(0.69314), lr=1e-6)
    lines = console.file.getvalue().splitlines()
    assert len(lines) == 10
    assert lines[0] == "dpo 10/100 (10 %) | loss 0.6931  lr 1e-06 | 0:05 elapsed, 0:45 left"
    assert lines[-1] == "dpo 100/100 (100 %) | loss 0.6931  lr 1e-06 | 0:50 elapsed, done"


def test_a_line_every_ten_seconds_when_slow(clock):
    console = plain()
    with Progress("ppo", 1000, start=500, enabled=True, console=console) as bar:
        for step in range(501, 505):
            clock.now += 11.0
            bar.update(step)
    lines = console.file.getvalue().splitlines()
    assert len(lines) == 4
    # 496 steps to go at the speed of this run: the 500 steps done before do not count.
    assert lines[-1] == "ppo 504/1000 (50 %) | 0:44 elapsed, 1:30:56 left"


def test_bar_on_a_terminal():
    console = Console(file=io.StringIO(), force_terminal=True, width=100)
    with Progress("sft [x]", 3, enabled=True, console=console) as bar:
        for step in (1, 2, 3):
            bar.update(step, loss=0.5)
    output = console.file.getvalue()
    assert "3/3" in output and "loss 0.5" in output and "sft [x]" in output


def test_quiet_under_pytest_and_by_environment(monkeypatch):
    def shown():
        console = plain()
        with Progress("x", 1, console=console) as bar:
            bar.update(1)
        stage_banner("x", console=console)
        return console.file.getvalue()

    assert shown() == ""
    monkeypatch.setenv("AA_JAX_PROGRESS", "1")
    assert "x 1/1" in shown()
    monkeypatch.setenv("AA_JAX_PROGRESS", "0")
    assert shown() == ""
    monkeypatch.delenv("AA_JAX_PROGRESS")
    monkeypatch.delenv("PYTEST_CURRENT_TEST")
    assert "x 1/1" in shown()


def test_banner():
    console = plain()
    stage_banner("stage 1 of 3", "[critiques]", console=console, enabled=True)
    assert console.file.getvalue() == "== stage 1 of 3 · [critiques]\n"
    console = Console(file=io.StringIO(), force_terminal=True, width=60)
    stage_banner("stage 1 of 3", "[critiques]", console=console, enabled=True)
    assert "stage 1 of 3 · [critiques]" in console.file.getvalue()


def test_nothing_to_do():
    console = plain()
    with Progress("empty", 0, enabled=True, console=console) as bar:
        bar.update(0)
    assert "empty 0/0" in console.file.getvalue()
