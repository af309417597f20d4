"""Mismatched twins: another example's response behind the same prompt."""

import numpy as np
import pytest

from aa_jax.data.collate import collate
from aa_jax.data.encoded import WithColumn
from aa_jax.data.example import Report
from aa_jax.data.mismatched import Mismatched
from aa_jax.data.tokens import Encoded
from aa_jax.errors import DataError


class Data(list):
    """Encoded examples that count how often each is read."""

    def __init__(self, items):
        super().__init__(items)
        self.report, self.reads = Report(len(items), len(items)), []

    def __getitem__(self, index):
        self.reads.append(index)
        return super().__getitem__(index)

    @property
    def sizes(self):
        return [item.sizes for item in list.__iter__(self)]


def encoded(prompt, response, label):
    prompt, response = np.array(prompt, np.int32), np.array(response, np.int32)
    return Encoded(
        prompt, (response,), (True,), np.full(len(prompt), -1), np.zeros(len(prompt), bool), 0, {},
        meta={"label": label},
    )  # fmt: skip


def data():
    """Two responses to each of three prompts, neighbours as a template gives them."""
    return Data(
        [encoded([10 + i // 2] * (i // 2 + 1), [20 + i] * (6 - i), (i + 1) % 2) for i in range(6)]
    )


def test_twins_have_the_prompt_of_one_and_the_response_of_another_prompt():
    source = data()
    twins = Mismatched(source)
    assert len(twins) == 6 and twins.report.kept == 6
    seen = []
    for i in range(6):
        item = twins[i]
        twin = item.meta["mismatched"]
        np.testing.assert_array_equal(item.responses[0], source[i].responses[0])
        np.testing.assert_array_equal(twin.prompt, item.prompt)
        partner = int(twin.responses[0][0]) - 20
        assert partner // 2 != i // 2  # not the other response to the same prompt
        seen.append(partner)
    assert sorted(seen) == [*range(6)]
    source.reads.clear()
    twins[0]
    assert source.reads == [0]  # its partner's response is remembered


def test_shapes_hold_every_twin():
    twins = Mismatched(data())
    shapes = twins.twin_shapes("supervised")
    items = [twins[i].meta["mismatched"] for i in range(6)]
    longest = max(len(item.prompt) + len(item.responses[0]) for item in items)
    assert shapes.length == -(-longest // 8) * 8 and shapes.response_length == 6
    batch = collate(items, shapes, "supervised", batch_rows=8)
    assert batch["sequence_mask"].sum() == 6
    column = WithColumn(twins, "ref_logps", np.arange(12.0).reshape(6, 2))
    np.testing.assert_array_equal(column[2].meta["ref_logps"], [4, 5])
    assert column[2].meta["mismatched"].meta == {}


def test_one_example_has_no_partner():
    with pytest.raises(DataError, match="at least two examples, the data has 1"):
        Mismatched(Data([encoded([1], [2], 1)]))
