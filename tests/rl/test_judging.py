"""Rewards asked about the first responses while the last are written."""

import threading
import time

import numpy as np
import pytest

from aa_jax.rewards.base import Clipped, Request, RewardError, Weighted, evaluate, overlaps
from aa_jax.rl.judging import Judge

ROWS = {2: ["a", "bb"], 0: ["ccc", ""], 1: ["d", "ee"]}  # in the order they are done


class Lengths:
    """Pays for length; remembers in how many parts and by which threads it was asked."""

    overlaps = True

    def __init__(self, seconds=0.0):
        self.asked, self.threads, self.seconds = [], set(), seconds

    def __call__(self, requests):
        self.asked.append([request.response for request in requests])
        self.threads.add(threading.current_thread())
        time.sleep(self.seconds)
        return [len(r.response) if r.response else None for r in requests]


def judged(reward, pause=0.0):
    judge = Judge(reward)
    for row, texts in ROWS.items():
        judge.put(row, [Request("?", text) for text in texts])
        time.sleep(pause)
    try:
        return judge.scores()
    finally:
        judge.close()


@pytest.mark.parametrize("ahead", [False, True])
def test_the_scores_are_those_of_all_at_once(ahead):
    reward = Lengths(0.002)
    reward.overlaps = ahead
    requests = [Request("?", text) for row in range(3) for text in ROWS[row]]
    found, expected = judged(reward), evaluate(Lengths(), requests)
    np.testing.assert_array_equal(found.values, [3, 0, 1, 2, 1, 2])
    np.testing.assert_array_equal(found.valid, expected.valid)
    assert found.counts == expected.counts and found.reasons == expected.reasons
    assert (threading.current_thread() in reward.threads) != ahead
    assert sorted(sum(reward.asked, [])) == sorted(r.response for r in requests)
    if not ahead:
        assert len(reward.asked) == 1


def test_a_slow_reward_is_done_when_the_last_response_is():
    """0.3 s of generation and three times 0.1 s of judging, of which only the last part is left."""
    began = time.perf_counter()
    judged(Lengths(0.1), pause=0.1)
    spent = time.perf_counter() - began
    assert 0.3 <= spent < 0.55


def test_its_error_is_the_runs():
    def reward(requests):
        raise RewardError("the server is not there")

    reward.overlaps = True
    with pytest.raises(RewardError, match="not there"):
        judged(reward)


def test_a_sum_overlaps_if_all_its_parts_do():
    slow, own = Lengths(), lambda requests: [0.0 for _ in requests]
    assert overlaps(Weighted({"a": slow})) and overlaps(Clipped(slow, low=0))
    assert not overlaps(own) and not overlaps(Weighted({"a": slow, "b": own}))
