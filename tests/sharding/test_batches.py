"""Batches on a mesh: rows padded exactly, arrays spread over data x fsdp."""

import jax
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from aa_jax.errors import DataError
from aa_jax.sharding import AXES, Share, make_mesh, pad_rows, put_batch, rows, share


def example(n: int) -> dict:
    rng = np.random.default_rng(0)
    return {
        "tokens": rng.integers(1, 9, (n, 4), dtype=np.int32),
        "feature_index": rng.integers(0, 3, (n, 4), dtype=np.int32),
        "sequence_mask": np.ones((n, 2), np.float32),
        "media": {"pixel_values": rng.normal(size=(n, 1, 3, 2, 2)).astype(np.float32)},
        "temperature": np.float32(0.5),
    }


def test_added_rows_are_marked_empty():
    batch = example(5)
    padded = pad_rows(batch, 4)
    assert rows(padded) == 8
    for name in ("tokens", "feature_index", "sequence_mask"):
        np.testing.assert_array_equal(padded[name][:5], batch[name])
        assert padded[name].dtype == batch[name].dtype
    assert (padded["sequence_mask"][5:] == 0).all() and (padded["tokens"][5:] == 0).all()
    assert (padded["feature_index"][5:] == -1).all()
    assert (padded["media"]["pixel_values"][5:] == 0).all()
    nested = pad_rows({"sequence_mask": batch["sequence_mask"], "mismatched": batch}, 4)
    assert (nested["mismatched"]["feature_index"][5:] == -1).all()
    assert padded["temperature"] == np.float32(0.5)


def test_nothing_to_add():
    batch = {"tokens": np.zeros((4, 2), np.int32)}
    assert pad_rows(batch, 2)["tokens"] is batch["tokens"]


def test_padding_needs_a_mask():
    with pytest.raises(DataError, match="3 rows and needs a multiple of 4.*sequence_mask"):
        pad_rows({"tokens": np.zeros((3, 2), np.int32)}, 4)


def test_rows_must_agree():
    with pytest.raises(DataError, match="a: 3, media/b: 2"):
        rows({"a": np.zeros((3, 1)), "media": {"b": np.zeros((2, 1))}})
    with pytest.raises(DataError, match="no arrays"):
        rows({"temperature": np.float32(1.0)})


def test_put_batch_spreads_rows():
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    batch = example(8)
    placed = put_batch(batch, mesh)
    assert placed["tokens"].sharding.spec == P(("data", "fsdp"))
    assert placed["media"]["pixel_values"].addressable_shards[0].data.shape == (2, 1, 3, 2, 2)
    assert placed["temperature"].sharding.spec == P()
    jax.tree.map(np.testing.assert_array_equal, placed, batch)


def test_rows_that_do_not_divide():
    with pytest.raises(DataError, match=r"6 rows.*4 devices \(data=4 x fsdp=1\).*pad_rows"):
        put_batch(example(6), make_mesh(tensor=2))


class Device:
    def __init__(self, process_index):
        self.process_index = process_index


def spread(processes, **sizes):
    """As many devices per process as there are, in order, on data x fsdp x tensor x seq."""
    shape = {name: sizes.get(name, 1) for name in AXES}
    count = int(np.prod(list(shape.values())))
    devices = [Device(i * processes // count) for i in range(count)]
    return Mesh(np.array(devices, object).reshape(tuple(shape.values())), AXES)


@pytest.mark.parametrize(
    "processes, sizes, own",
    [
        (1, dict(data=2, fsdp=2), [(0, 1, 2, 3)]),
        (2, dict(data=2, fsdp=2), [(0, 1), (2, 3)]),
        (4, dict(data=2, tensor=4), [(0,), (0,), (1,), (1,)]),
        (2, dict(tensor=4), [(0,), (0,)]),
        (3, dict(data=2, tensor=3), [(0,), (0, 1), (1,)]),  # they overlap in part
        (2, dict(fsdp=2, seq=2), [(0,), (1,)]),
    ],
)
def test_shares_follow_the_mesh(processes, sizes, own):
    mesh = spread(processes, **sizes)
    shares = [share(mesh, process) for process in range(processes)]
    assert [s.own for s in shares] == own
    # tokens are counted once, whoever holds them
    counted = [i for s in shares for i in s.counted]
    assert sorted(counted) == list(range(shares[0].pieces))
    for s in shares:
        mine = s.rows(24)
        assert s.total(len(mine)) == 24 and len(s.counts(len(mine))) == len(mine)
        per = 24 // s.pieces
        assert set(mine[s.counts(len(mine))] // per) == set(s.counted)


def test_shares_that_do_not_fit():
    with pytest.raises(DataError, match="9 rows cannot be cut into 4"):
        Share(4, (0,), (0,)).rows(9)
    with pytest.raises(DataError, match="3 rows are no equal share of 2 of 4 pieces"):
        Share(4, (0, 1), (0, 1)).total(3)
