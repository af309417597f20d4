import json

import pytest

from aa_jax.errors import ConfigError
from aa_jax.llf.respond import read_lines
from aa_jax.llf.stages import Stage, run_stages, seconds, summary


def stages(calls):
    def make(name, needs=()):
        def run(folder):
            calls.append(name)
            (folder / "out").write_text(name)
            return {"name": name}

        return Stage(name, f"title of {name}", run, needs)

    return [make("a"), make("b", ("a",)), make("c", ("a", "b"))]


def test_a_finished_stage_is_not_run_again(tmp_path):
    calls = []
    assert run_stages(tmp_path, stages(calls)) == {n: {"name": n} for n in "abc"}
    run_stages(tmp_path, stages(calls))
    assert calls == ["a", "b", "c"]
    assert summary(tmp_path, "b") == {"name": "b"} and seconds(tmp_path, "b") >= 0


def test_a_stage_that_failed_is_run_again_and_the_rest_is_kept(tmp_path):
    calls = []
    broken = stages(calls)
    broken[1] = Stage("b", "fails", lambda folder: 1 / 0, ("a",))
    with pytest.raises(ZeroDivisionError):
        run_stages(tmp_path, broken)
    run_stages(tmp_path, stages(calls))
    assert calls == ["a", "b", "c"]


def test_a_single_stage_needs_the_ones_before_it(tmp_path):
    calls = []
    with pytest.raises(ConfigError, match="needs a.*--stage=a"):
        run_stages(tmp_path, stages(calls), only="b")
    run_stages(tmp_path, stages(calls), only="a")
    run_stages(tmp_path, stages(calls), only="b")
    assert calls == ["a", "b"]


def test_an_unknown_stage_lists_those_there_are(tmp_path):
    with pytest.raises(ConfigError, match="a, b, c"):
        run_stages(tmp_path, stages([]), only="feedbck")


def test_a_torn_last_line_is_cut_off(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps({"index": 0}) + "\n" + '{"index": 1, "te')
    assert read_lines(path) == [{"index": 0}]
    assert path.read_text() == json.dumps({"index": 0}) + "\n"
