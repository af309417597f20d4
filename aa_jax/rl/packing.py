"""Which prompts with their responses share a row of a batch.

A row for every prompt, long enough for the longest responses there may be, is mostly padding:
most responses are far shorter. Rows are therefore as long as this run has needed so far, and short
prompts stand side by side in one row, each seeing only itself.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

_PARTS = 8  # lengths and numbers of rows are rounded up to eighths: few shapes, few compilations


@dataclasses.dataclass(frozen=True)
class Packing:
    """N prompts with G responses each, in rows.

    Attributes:
      rows: the prompts of each row, by their place among the N.
      size: B, number of rows, empty ones included.
      groups: K, prompts that a row has room for.
    """

    rows: tuple[tuple[int, ...], ...]
    size: int
    groups: int

    def place(self, array: np.ndarray) -> np.ndarray:
        """[N, G, ...] -> [B, K * G, ...], 0 where there is no response."""
        out = np.zeros((self.size, self.groups, *array.shape[1:]), array.dtype)
        for b, row in enumerate(self.rows):
            out[b, : len(row)] = array[list(row)]
        return out.reshape(self.size, -1, *array.shape[2:])

    def take(self, array: np.ndarray) -> np.ndarray:
        """[B, K * G, ...] -> [N, G, ...]."""
        apart = array.reshape(len(array), self.groups, -1, *array.shape[2:])
        out = np.zeros((sum(map(len, self.rows)), *apart.shape[2:]), array.dtype)
        for b, row in enumerate(self.rows):
            out[list(row)] = apart[b, : len(row)]
        return out


class Packer:
    """Plans rows. Their shape never shrinks, so that a step is compiled a few times, not for ever.

    Args:
      longest: tokens of the longest row there may be.
      share: whether prompts may share a row.
    """

    def __init__(self, longest: int, *, share: bool):
        self._longest, self._share = longest, share
        self.length, self.groups = 0, 1
        self._sizes: dict[int, int] = {}

    def fit(self, needs: Sequence[int]) -> None:
        """Makes rows long enough for one iteration's prompts with their responses, in tokens."""
        longest = max(needs)
        if longest <= self.length:
            return
        step = -(-self._longest // (8 * _PARTS)) * 8
        self.length = min(-(-longest // step) * step, self._longest)
        self._sizes = {}
        if self._share:
            # A bound keeps the slots of all rows near the number of responses.
            self.groups = -(-self.length * len(needs) // sum(needs))

    def pack(self, needs: Sequence[int]) -> Packing:
        """Rows for prompts of an iteration that `fit` has seen, longest first, first fit."""
        rows: list[list[int]] = []
        room: list[int] = []
        for i in sorted(range(len(needs)), key=lambda i: (-needs[i], i)):
            fits = (
                b for b, left in enumerate(room)
                if self._share and left >= needs[i] and len(rows[b]) < self.groups
            )  # fmt: skip
            if (b := next(fits, None)) is None:
                b = len(rows)
                rows.append([])
                room.append(self.length)
            rows[b].append(i)
            room[b] -= needs[i]
        if not self._share:  # in the order they came
            rows.sort()
        step = -(-len(needs) // _PARTS)
        size = min(-(-len(rows) // step) * step, len(needs))
        # Of this many prompts: an iteration's, and a minibatch's.
        size = self._sizes[len(needs)] = max(size, self._sizes.get(len(needs), 0))
        return Packing(tuple(map(tuple, rows)), size, self.groups)

    def get_state(self) -> dict[str, Any]:
        """JSON-able."""
        sizes = {str(n): size for n, size in self._sizes.items()}
        return {"length": self.length, "groups": self.groups, "sizes": sizes}

    def set_state(self, state: dict[str, Any]) -> None:
        """Continues where `get_state` was called."""
        self.length, self.groups = state["length"], state["groups"]
        self._sizes = {int(n): size for n, size in state["sizes"].items()}
