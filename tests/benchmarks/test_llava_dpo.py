"""The side-by-side benchmark runs, compares before it times, and refuses what is not the same."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"
FIGURES = {"loss": 0.7, "grad_norm": 2.0, "chosen_logps": -30.0, "rejected_logps": -31.0}


@pytest.fixture
def program(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("llava_dpo")


@pytest.mark.slow
def test_tiny_run(tmp_path):
    out = tmp_path / "result.json"
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    command = "--size tiny --repetitions 2 --seconds 0.001 --pool 4 --seed 1 --out".split()
    done = subprocess.run(
        [sys.executable, str(FOLDER / "llava_dpo.py"), *command, str(out)],
        env={**environment, "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"},  # compiles in half the time
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    record = json.loads(out.read_text())
    assert record["environment"]["trl"] == "1.16.0"
    result = record["sizes"]["tiny"]
    assert set(result["dpo"]["gaps"]) == {*FIGURES, "entropy"}
    assert max(*result["dpo"]["gaps"].values(), result["sampling"]["gap"]) <= 1e-4
    assert result["sampling"]["tokens_per_call"] == 2 * 3
    for part, sides, baselines in (("dpo", 5, 3), ("sampling", 2, 1)):
        seconds = result[part]["seconds_per_call"]
        assert len(seconds) == sides and all(len(each) == 2 for each in seconds.values())
        assert len(result[part]["ratio"]) == (sides - baselines) * baselines
        assert set(result[part]["threads"]) == set(seconds)
    name = "aa_jax / TRL's DPO loss"
    ours, theirs = (result["dpo"]["seconds_per_call"][side] for side in name.split(" / "))
    expected = np.median(np.divide(theirs, ours))
    assert result["dpo"]["ratio"][name]["median"] == pytest.approx(expected)
    assert f"{name}: {expected:.2f}x" in done.stdout


def test_ratios_of_a_known_clock(program, monkeypatch):
    clock = importlib.import_module("clock")
    now = [0.0]
    monkeypatch.setattr(clock.time, "perf_counter", lambda: now[0])

    def taking(seconds):
        return lambda: now.__setitem__(0, now[0] + seconds)

    sides = {"ours": taking(0.5), "theirs": taking(2.0)}
    measured = clock.measure(sides, ("theirs",), 100, repetitions=3, seconds=1.2)
    assert measured["calls_per_round"] == 3  # 3 x 0.5 s is the first to reach 1.2 s
    assert measured["seconds_per_call"] == {"ours": [0.5] * 3, "theirs": [2.0] * 3}
    assert measured["tokens_per_second"]["theirs"] == {"median": 50.0, "min": 50.0, "max": 50.0}
    assert measured["ratio"] == {"ours / theirs": {"median": 4.0, "min": 4.0, "max": 4.0}}


@pytest.mark.parametrize("name", FIGURES)
@pytest.mark.parametrize("factor", [1 + 2e-4, float("nan"), float("inf")])
def test_different_figures_are_refused(program, name, factor):
    theirs = [FIGURES, FIGURES]
    same = {program.TRL: theirs, program.SHARED: theirs, program.BARE: [{"loss": 0.7}] * 2}
    assert program.check_steps(same, 1e-4) == dict.fromkeys(FIGURES, 0.0)
    ours = [FIGURES, {**FIGURES, name: FIGURES[name] * factor}]
    with pytest.raises(program.Unequal, match=f"{name} of step 2 .* for 'aa_jax'"):
        program.check_steps({program.TRL: theirs, program.SHARED: ours}, 1e-4)


def test_a_request_that_ended_early_is_refused(program):
    mask = np.array([[1.0, 1.0], [1.0, 0.0]])
    samples = program.Samples(np.full((2, 2), 7), np.zeros((2, 2)), mask, None)
    with pytest.raises(program.Unequal, match="ended before"):
        program.check_samples(samples, None, [], 1e-4)


def test_rows_of_the_torch_side(program):
    pool = program.random_pairs(program.SIZES["tiny"], 3, seed=0)
    assert len({len(item.prompt) for item in pool}) > 1  # otherwise padding would not be met
    rows = {k: v.numpy() for k, v in program.other.pairs(pool, pad_id=0).items()}
    for row in range(6):
        item, response = pool[row % 3], pool[row % 3].responses[row // 3]
        real = rows["attention_mask"][row] == 1
        expected = [*item.prompt, *response]
        assert rows["input_ids"][row][real].tolist() == expected
        assert real.tolist() == [i < len(expected) for i in range(len(real))]
        completion = rows["completion_mask"][row] == 1
        assert rows["input_ids"][row][completion].tolist() == response.tolist()
        assert response[-1] == program.END and program.END not in response[:-1]
        np.testing.assert_array_equal(rows["pixel_values"][row], item.media["pixel_values"][0])


def test_the_digits_vocabulary_cannot_be_changed(program, capsys):
    with pytest.raises(SystemExit):
        program.main(["--size", "digits", "--vocab", "5"])
    assert "its own vocabulary" in capsys.readouterr().err
    size = program.SIZES["digits"]
    assert program.model_config(size) | {"text_config": {}} == program.llava_config(3) | {
        "text_config": {}
    }
    assert program.llava_config(3)["text_config"]["vocab_size"] == size.vocab
