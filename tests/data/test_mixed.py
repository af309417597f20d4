"""Several datasets as one: shares, subsets, and the config key that asks for it."""

import json

import pytest

from aa_jax.data import sources
from aa_jax.data.dataset import Dataset
from aa_jax.data.mixed import Mixed
from aa_jax.errors import ConfigError
from aa_jax.runs import load_dataset


def dataset(kit, name, count, empty=0):
    rows = [{"prompt": f"{name} {i}", "response": "yes" * (i % 5 + 1)} for i in range(count)]
    rows += [{"prompt": "x", "response": ""}] * empty
    columns = {"prompt": "prompt", "response": "response"}
    return Dataset(sources.rows_source(rows), columns=columns, processor=kit.chatml)


def counts(mixed):
    names = [mixed.example(i).messages[0].text for i in range(len(mixed))]
    assert len(set(names)) == len(names)  # nothing twice
    return [sum(name.startswith(part) for name in names) for part in "abc"]


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        (None, [30, 10, 60]),
        ((1, 1, 1), [10, 10, 10]),
        ((3, 1, 6), [30, 10, 60]),
        ((0.5, 0.25, 0.25), [20, 10, 10]),
        ((1, 0.001, 0.5), [30, 0, 15]),
    ],
)
def test_shares_are_the_weights(kit, weights, expected):
    parts = [dataset(kit, name, n) for name, n in (("a", 30), ("b", 10), ("c", 60))]
    mixed = Mixed(parts, weights)
    assert counts(mixed) == expected
    assert [len(mixed.sizes), mixed.report.kept] == [sum(expected)] * 2
    again, other = Mixed(parts, weights), Mixed(parts, weights, seed=1)
    assert again._index == mixed._index
    if weights == (1, 1, 1):
        assert other._index != mixed._index
    longest = max(len(item.responses[0]) for item in mixed)
    assert mixed.shapes("supervised").response_length == longest


def test_what_is_dropped_adds_up(kit):
    mixed = Mixed([dataset(kit, "a", 4, empty=2), dataset(kit, "b", 4, empty=1)])
    assert mixed.report.dropped == {"empty response": 3}
    assert (mixed.report.rows, mixed.report.kept) == (11, 8)


def test_from_a_config(kit, tmp_path):
    for name, count in (("one", 8), ("two", 4)):
        lines = [json.dumps({"q": f"{name} {i}", "a": "yes"}) for i in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    (tmp_path / "three.jsonl").write_text(
        json.dumps({"instruction": "i", "input": "", "output": "o"})
    )
    own = {"columns": {"prompt": "q", "response": "a"}}
    paths = {name: str(tmp_path / f"{name}.jsonl") for name in ("one", "two", "three")}
    mixed = load_dataset(
        "supervised", kit.chatml, **own,
        mix=({"path": paths["one"]}, {"path": paths["two"]},
             {"path": paths["three"], "template": "Alpaca"}),
    )  # fmt: skip
    assert len(mixed) == 13
    weighted = load_dataset(
        "supervised", kit.chatml, **own,
        mix=({"path": paths["one"], "weight": 1}, {"path": paths["two"], "weight": 1}),
    )  # fmt: skip
    assert len(weighted) == 8
    for section, message in (
        ({}, "either a path or a mix"),
        ({"path": "x", "mix": ({"path": "y"},)}, "either a path or a mix"),
        ({"mix": ({"path": paths["one"], "weight": 1}, {"path": paths["two"]})}, "or none of them"),
        ({"mix": ({"path": paths["one"], "shuffle": 1},)}, r"mix\[0\] has no key 'shuffle'"),
        ({"mix": ({"path": paths["one"], "weight": 0},)}, "must be positive"),
    ):
        with pytest.raises(ConfigError, match=message):
            load_dataset("supervised", kit.chatml, **own, **section)
