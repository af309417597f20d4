"""Rewards of one iteration's responses, asked about the first while the last are still written."""

import dataclasses
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from aa_jax import hosts
from aa_jax.rewards.base import Request, Result, Reward, Scores, collected, guard, overlaps


class Judge:
    """Asks a reward about the responses of one iteration.

    A reward that `overlaps` is asked in a thread about every prompt that is done; what is done
    meanwhile is asked about together. Generation and scoring go on beside it. Any other reward is
    asked about everything at once, when the scores are wanted: a learned one needs the device
    itself, and under several processes all of them in the same order.

    Args:
      reward: see `aa_jax.rewards`.
    """

    def __init__(self, reward: Reward):
        self._reward = reward
        self._requests: dict[int, Sequence[Request]] = {}
        self._results: dict[int, list[Result]] = {}
        self._waiting: list[int] = []
        self._lock, self._busy = threading.Lock(), False
        self._work: Future | None = None
        self._thread = ThreadPoolExecutor(1, "judge") if overlaps(reward) else None

    def put(self, row: int, requests: Sequence[Request]) -> None:
        """The responses to a prompt, number ``row`` of the iteration, are there."""
        self._requests[row] = requests
        if self._thread is None:
            return
        with self._lock:
            self._waiting.append(row)
            if not self._busy:
                self._work, self._busy = self._thread.submit(self._ask), True

    def _ask(self) -> None:
        while True:
            with self._lock:
                rows, self._waiting = self._waiting, []
                self._busy = bool(rows)
            if not rows:
                return
            results = iter(guard(self._reward, sum((list(self._requests[r]) for r in rows), [])))
            for row in rows:
                self._results[row] = [next(results) for _ in self._requests[row]]

    def scores(self) -> Scores:
        """What the reward says, in the order of the rows, and the same on every process.

        Raises:
          AaJaxError: from the reward.
        """
        rows = sorted(self._requests)
        requests = [request for row in rows for request in self._requests[row]]
        if self._thread is None:
            results = guard(self._reward, requests)
        else:
            if self._work is not None:
                self._work.result()
            results = [result for row in rows for result in self._results[row]]
        scores = collected(requests, results)
        if hosts.count() == 1:
            return scores
        # Every process asks, as a learned reward needs all of them; a judge that times out or
        # draws may tell each something else, but what is trained on must be the same.
        values, valid = hosts.first([scores.values.tolist(), scores.valid.tolist()])
        return dataclasses.replace(
            scores, values=np.array(values, np.float32), valid=np.array(valid, bool)
        )

    def close(self) -> None:
        """Ends the thread."""
        if self._thread is not None:
            self._thread.shutdown(cancel_futures=True)
