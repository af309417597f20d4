"""metrics.jsonl: what is written, what survives a crash, what is read back."""

import json
import math
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
import pytest

from aa_jax.errors import DataError
from aa_jax.training.metrics import MetricWriter, read_metrics, series


class Pair(NamedTuple):
    total: object
    count: object


def lines(workdir):
    return [json.loads(text) for text in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_values_become_plain_numbers(tmp_path):
    with MetricWriter(tmp_path, "sft", tensorboard=False) as metrics:
        metrics.write(
            1,
            {
                "loss": Pair(jnp.float32(6.0), jnp.float32(4.0)),
                "pair": (3, 2),
                "lr": 1e-6,
                "norm": jnp.array(2.5),
                "steps": np.int64(7),
                "no data": (0.0, 0),
            },
        )
    (line,) = lines(tmp_path)
    assert line["stage"] == "sft" and line["step"] == 1
    assert line["loss"] == 1.5 and line["pair"] == 1.5 and line["lr"] == 1e-6
    assert line["norm"] == 2.5 and line["steps"] == 7.0
    assert line["no data"] is None and line["nonfinite"] == {"no data": "nan"}


def test_nonfinite_is_valid_json_and_comes_back(tmp_path):
    with MetricWriter(tmp_path, "sft", tensorboard=False) as metrics:
        metrics.write(1, {"a": math.nan, "b": math.inf, "c": -math.inf, "d": 1.0})
    text = (tmp_path / "metrics.jsonl").read_text()
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    (row,) = read_metrics(tmp_path)
    assert math.isnan(row["a"]) and row["b"] == math.inf and row["c"] == -math.inf
    assert row["d"] == 1.0 and "nonfinite" not in row


def test_stages_share_a_file(tmp_path):
    for stage in ("sft", "dpo"):
        with MetricWriter(tmp_path, stage, tensorboard=False) as metrics:
            for step in (1, 2):
                metrics.write(step, {"loss": 1.0 / step})
    assert [row["stage"] for row in read_metrics(tmp_path)] == ["sft", "sft", "dpo", "dpo"]
    rows = read_metrics(tmp_path, stage="dpo")
    assert series(rows, "loss") == ([1, 2], [1.0, 0.5])
    assert series(rows, "absent") == ([], [])
    assert read_metrics(tmp_path / "nothing") == []


def test_rewind_drops_only_this_stage_after_the_step(tmp_path):
    with MetricWriter(tmp_path, "sft", tensorboard=False) as metrics:
        metrics.write(9, {"loss": 1.0})
    with MetricWriter(tmp_path, "dpo", tensorboard=False) as metrics:
        for step in (1, 2, 3, 4):
            metrics.write(step, {"loss": step})
        metrics.rewind(2)
        metrics.write(3, {"loss": 30})
    kept = [(line["stage"], line["step"], line["loss"]) for line in lines(tmp_path)]
    assert kept == [("sft", 9, 1.0), ("dpo", 1, 1), ("dpo", 2, 2), ("dpo", 3, 30)]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize("tail", ['{"stage": "sft", "st', "{", "x" * 200_000])
def test_torn_last_line_is_skipped_and_then_removed(tmp_path, tail):
    with MetricWriter(tmp_path, "sft", tensorboard=False) as metrics:
        metrics.write(1, {"loss": 1.0})
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write(tail)
    assert len(read_metrics(tmp_path)) == 1
    with MetricWriter(tmp_path, "sft", tensorboard=False) as metrics:
        metrics.write(2, {"loss": 2.0})
    assert [line["step"] for line in lines(tmp_path)] == [1, 2]


def test_only_a_torn_line(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"stage"')
    MetricWriter(tmp_path, "sft", tensorboard=False).close()
    assert (tmp_path / "metrics.jsonl").read_text() == ""


def test_damage_in_the_middle_is_named(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"stage":"a","step":1}\nnot json\n')
    with pytest.raises(DataError, match=r"metrics\.jsonl, line 2 is not JSON"):
        read_metrics(tmp_path)


def test_bad_values(tmp_path):
    with MetricWriter(tmp_path, "sft", tensorboard=False) as metrics:
        with pytest.raises(DataError, match=r"'logps' must be a scalar.*\(3,\).*reduce it"):
            metrics.write(1, {"logps": jnp.ones(3)})
        with pytest.raises(DataError, match="'step' has a reserved name"):
            metrics.write(1, {"step": 1.0})
    assert (tmp_path / "metrics.jsonl").read_text() == ""
    metrics.write(2, {"loss": 1.0})  # closed: nothing happens
    assert (tmp_path / "metrics.jsonl").read_text() == ""


def test_only_process_zero_writes(tmp_path, monkeypatch):
    monkeypatch.setattr("jax.process_index", lambda: 1)
    with MetricWriter(tmp_path / "run", "sft") as metrics:
        metrics.write(1, {"loss": 1.0})
        metrics.rewind(0)
    assert not (tmp_path / "run").exists()


def test_tensorboard_events(tmp_path):
    from tensorboardX.proto import event_pb2

    with MetricWriter(tmp_path, "dpo") as metrics:
        metrics.write(1, {"loss": 0.5})
        metrics.write(2, {"loss": 0.25})
        metrics.rewind(1)
        metrics.write(2, {"loss": 0.125})
    found, restarts = [], 0
    for path in sorted((tmp_path / "tensorboard" / "dpo").iterdir()):
        data = path.read_bytes()
        while data:  # TFRecord: length u64, crc u32, payload, crc u32
            size = int.from_bytes(data[:8], "little")
            event = event_pb2.Event.FromString(data[12 : 12 + size])
            restarts += event.session_log.status == 1
            found += [(event.step, value.tag, value.simple_value) for value in event.summary.value]
            data = data[16 + size :]
    assert sorted(found) == [(1, "loss", 0.5), (2, "loss", 0.125), (2, "loss", 0.25)]
    assert restarts == 1
