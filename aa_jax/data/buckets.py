"""Batches of similar lengths, so that short examples are not padded to the longest of the data."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

WINDOW = 32  # batches among which examples change places


def bucket_lengths(lengths: Sequence[int], count: int, *, multiple_of: int = 8) -> tuple[int, ...]:
    """Row lengths that batches are padded to: the upper edges of ``count`` equal shares.

    Each length is one more compilation of the step, so a few do. Edges that fall together after
    rounding up are one.

    Args:
      lengths: of the examples' rows.
      count: most buckets.
      multiple_of: every edge is rounded up to it.
    """
    edges = np.quantile(lengths, np.arange(1, count + 1) / count, method="higher")
    return tuple(sorted({-(-int(edge) // multiple_of) * multiple_of for edge in edges}))


class ByLength:
    """An order in which the examples of a batch have similar lengths.

    The shuffled order is cut into windows of `WINDOW` batches; within a window examples are sorted
    by length and cut into batches, and the batches are shuffled. Every example still comes once an
    epoch, and which one stands where depends on (seed, place) alone. The last, partial batch of an
    epoch is left as the shuffle has it.

    Args:
      order: place -> row, epoch after epoch, see `Loader`.
      lengths: of the rows.
      batch_rows: rows of a batch.
      seed: of the order of the batches.
    """

    def __init__(self, order: Any, lengths: Sequence[int], batch_rows: int, seed: int):
        self._order, self._lengths = order, np.asarray(lengths)
        self._batch_rows, self._seed = batch_rows, seed
        self._window = functools.lru_cache(maxsize=4)(self._sorted)

    def __getitem__(self, place: int) -> int:
        epoch, at = divmod(place, len(self._lengths))
        window, offset = divmod(at, WINDOW * self._batch_rows)
        return self._window(epoch, window)[offset]

    def _sorted(self, epoch: int, window: int) -> list[int]:
        rows, size = len(self._lengths), WINDOW * self._batch_rows
        first = window * size
        count = min(size, rows - first)
        found = np.array([int(self._order[epoch * rows + first + i]) for i in range(count)])
        whole = count // self._batch_rows * self._batch_rows
        sortable, rest = found[:whole], found[whole:]
        batches = sortable[np.argsort(self._lengths[sortable], kind="stable")]
        batches = batches.reshape(-1, self._batch_rows)
        # Non-negative words: a seed may be any int.
        key = np.random.SeedSequence((62, self._seed % 2**63, epoch, window))
        shuffled = np.random.default_rng(key).permutation(batches, axis=0)
        return [*shuffled.reshape(-1).tolist(), *rest.tolist()]
