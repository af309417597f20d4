"""The protocol: what a batch gives, and what every kind of failure gives."""

import logging
import math

import numpy as np
import pytest

from aa_jax.errors import ConfigError, DataError
from aa_jax.rewards.base import (
    Clipped,
    Request,
    Result,
    RewardError,
    Weighted,
    close,
    evaluate,
    guard,
)


def length(requests):
    return [float(len(request.response)) for request in requests]


def test_numbers_become_results_in_the_order_of_the_requests(ask):
    scores = evaluate(length, [ask("abc"), ask(""), ask("x")])
    np.testing.assert_array_equal(scores.values, np.float32([3, 0, 1]))
    assert scores.values.dtype == np.float32 and scores.valid.all()
    assert scores.counts == {"requests": 3, "valid": 3, "empty": 1}
    assert scores.reasons == (None, None, None)
    assert scores.figures()["reward/mean"] == pytest.approx(4 / 3)


def test_an_empty_batch_asks_nobody():
    def never(requests):
        raise AssertionError

    assert evaluate(never, []).values.shape == (0,)


@pytest.mark.parametrize(
    ("answer", "reason"),
    [(math.nan, "not finite"), (math.inf, "not finite"), (-math.inf, "not finite"),
     (Result(math.nan), "not finite"), (None, "skipped"), ("3", "not a number"),
     ([1, 2], "not a number"), (Result(0.5, False), "unknown reason"),
     (Result.invalid("unreadable gold"), "unreadable gold")],
)  # fmt: skip
def test_what_is_no_number_masks_its_own_sample_alone(ask, caplog, answer, reason):
    with caplog.at_level(logging.WARNING):
        scores = evaluate(lambda requests: [1, answer, np.float32(2)], [ask("a")] * 3)
    np.testing.assert_array_equal(scores.values, np.float32([1, 0, 2]))
    assert scores.valid.tolist() == [True, False, True]
    assert scores.reasons[1] == reason and scores.counts[f"invalid: {reason}"] == 1
    assert "1 of 3 rewards are invalid" in caplog.text and reason in caplog.text


def test_an_exception_masks_the_sample_that_raises_and_no_other(ask, caplog):
    def fragile(requests):
        return [1 / len(request.response) for request in requests]

    with caplog.at_level(logging.WARNING):
        scores = evaluate(fragile, [ask("a"), ask(""), ask("ab"), ask("")])
    np.testing.assert_array_equal(scores.values, np.float32([1, 0, 0.5, 0]))
    assert scores.counts == {"requests": 4, "valid": 2, "empty": 2,
                             "invalid: exception ZeroDivisionError": 2}  # fmt: skip
    assert caplog.text.count("ZeroDivisionError") == 2  # the reason and its first case: one line
    assert scores.figures()["reward/invalid/exception ZeroDivisionError"] == 2


def test_a_wrong_setup_is_raised_not_masked(ask):
    def unusable(requests):
        raise DataError("no column")

    with pytest.raises(DataError, match="no column"):
        evaluate(unusable, [ask("a")])
    with pytest.raises(RewardError, match="short returned 1 results for 2 requests"):

        def short(requests):
            return [1.0]

        evaluate(short, [ask("a")] * 2)


def test_requests_read_as_text_and_as_conversation():
    from aa_jax.data.example import Example, message

    plain = Request("2 + 2", "4")
    assert plain.text == "2 + 2" and plain.example.messages[-1].role == "user"
    example = Example((message("system", "s"), message("user", "u")))
    assert Request(example, "r").text == "u" and Request(example, "r").example is example


def test_weighted_sum_by_hand(ask):
    reward = Weighted({"a": length, "b": lambda r: [0.5] * len(r)}, {"a": 2, "b": -1.0})
    (result,) = reward([ask("abc")])
    assert result.value == 2 * 3 - 0.5
    assert result.parts == {"a": 3.0, "b": 0.5}
    scores = evaluate(reward, [ask("abc"), ask("x")])
    assert scores.figures()["reward/part/a"] == 2.0


def test_an_invalid_part_masks_the_sum_unless_it_is_a_monitor(ask):
    parts = {"good": length, "bad": lambda r: [math.nan] * len(r)}
    (result,) = Weighted(parts)([ask("abc")])
    assert not result.valid and result.reason == "bad: not finite"
    (result,) = Weighted(parts, {"bad": 0.0})([ask("abc")])
    assert result.valid and result.value == 3.0 and "bad" not in result.parts


def test_nested_parts_keep_their_way(ask):
    inner = Clipped(length, high=2.0)
    (result,) = Weighted({"len": inner})([ask("abc")])
    assert result.value == 2.0 and result.parts == {"len": 2.0, "len/unclipped": 3.0}
    scores = evaluate(Weighted({"len": inner, "x": lambda r: [Result(0.0, parts={"p": 1.0})]}),
                      [ask("abc")])  # fmt: skip
    assert set(scores.parts) == {"len", "len/unclipped", "x", "x/p"}


def test_clipping(ask):
    reward = Clipped(lambda r: [-60.0, 60.0, 1.0, math.nan], low=-50.0, high=50.0)
    results = guard(reward, [ask("a")] * 4)
    assert [result.value for result in results] == [-50.0, 50.0, 1.0, 0.0]
    assert not results[3].valid


def test_parts_that_some_results_lack_are_nan(ask):
    scores = evaluate(lambda r: [Result(1.0, parts={"p": 2.0}), Result(1.0)], [ask("a")] * 2)
    np.testing.assert_array_equal(scores.parts["p"], np.float32([2, np.nan]))
    assert scores.figures()["reward/part/p"] == 2.0


def test_close_reaches_every_reward():
    class Open:
        closed = 0

        def __call__(self, requests):
            return []

        def close(self):
            self.closed += 1

    first, second = Open(), Open()
    close(Weighted({"a": Clipped(first, low=0.0), "b": second, "c": length}))
    assert (first.closed, second.closed) == (1, 1)


def test_combinations_that_cannot_be_meant():
    with pytest.raises(ConfigError, match="given for b, but the rewards are a"):
        Weighted({"a": length}, {"b": 1.0})
    with pytest.raises(ConfigError, match="weights are given for nothing"):
        Weighted({})
    with pytest.raises(ConfigError, match="weight of reward 'a' is nan"):
        Weighted({"a": length}, {"a": math.nan})
    with pytest.raises(ConfigError, match="low is above high"):
        Clipped(length, 1.0, 0.0)
    with pytest.raises(ConfigError, match="low, high, or both"):
        Clipped(length)
