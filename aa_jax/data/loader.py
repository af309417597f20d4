"""The iterator of batches: shuffled anew each epoch, sharded over processes, exactly resumable.

Which examples stand in batch ``step``, and in which rows, is a pure function of (seed, step),
whatever the number of processes. So the state of the iterator is one number, the same on every
process, and a resumed run sees bit for bit the batches it would have seen, also when it is resumed
by more or fewer processes.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from aa_jax.data.buckets import ByLength
from aa_jax.data.collate import Batch, Shapes
from aa_jax.data.example import Report
from aa_jax.data.tokens import Sizes
from aa_jax.errors import DataError

log = logging.getLogger(__name__)


class Loader:
    """Batches of a random-access dataset.

    Args:
      data: random-access sequence of examples (``aa_jax.data.dataset.Dataset`` with a processor).
      collate: called as ``collate(rows, batch_rows=n)``; pads a short batch to n rows, e.g.
        ``functools.partial(aa_jax.data.collate.collate, shapes=..., layout=...)``.
      batch_rows: examples of the global batch, of all processes together.
      epochs: passes over the data; None never ends.
      seed: of the order.
      shuffle: a new order each epoch; otherwise the order of the data.
      drop_remainder: leave out the last, partial batch of an epoch.
      groups: rows made of several examples (packing), as from ``pack``; default one each.
      share: which rows of a batch this process makes (``aa_jax.sharding.share(mesh)``); None: all.
        The processes together make exactly the batches of one process, and a row that two of them
        hold (their devices split tensors) is made by both.
      multiple_of: batches are filled up with empty rows to a multiple of this; at least the pieces
        of the share, and of ``step.rows_multiple`` for a train step.
      lengths: of the rows; with them a batch holds rows of similar lengths (`ByLength`).
      buckets: with ``lengths``: ascending row lengths, the last at least the longest row. A batch
        is collated with ``length=`` the shortest that holds all its rows.
      threads: batches made in parallel; 0 makes each when it is asked for.
      prefetch: batches made ahead when threads > 0.

    Raises:
      DataError: no data, or the rows do not fit the share.
    """

    def __init__(
        self,
        data: Sequence[Any],
        collate: Callable[..., Batch],
        batch_rows: int,
        *,
        epochs: int | None = 1,
        seed: int = 0,
        shuffle: bool = True,
        drop_remainder: bool = False,
        groups: Sequence[Sequence[int]] | None = None,
        share: Any = None,
        multiple_of: int = 1,
        lengths: Sequence[int] | None = None,
        buckets: Sequence[int] = (),
        threads: int = 0,
        prefetch: int = 2,
    ):
        pieces = 1 if share is None else share.pieces
        if batch_rows < 1 or multiple_of < 1 or multiple_of % pieces:
            raise DataError(
                f"batch_rows={batch_rows} must be positive and multiple_of={multiple_of} a "
                f"multiple of the {pieces} pieces that the mesh cuts a batch into."
            )
        self.data, self.batch_rows, self.epochs, self.seed = data, batch_rows, epochs, seed
        self._collate, self._groups = collate, groups
        self.share = share
        padded = -(-batch_rows // multiple_of) * multiple_of
        self._own = list(range(padded)) if share is None else share.rows(padded).tolist()
        self._rows = len(data) if groups is None else len(groups)
        whole, rest = divmod(self._rows, batch_rows)
        self.steps_per_epoch = whole + bool(rest and not drop_remainder)
        if self.steps_per_epoch == 0:
            raise DataError(
                f"{self._rows} rows make no batch of {batch_rows}: lower batch_rows or set "
                "drop_remainder=False."
            )
        self.report: Report = getattr(data, "report", None) or Report(len(data), len(data))
        self._threads, self._prefetch = threads, prefetch
        self._lengths, self._buckets = lengths, tuple(buckets)
        if lengths is not None and len(lengths) != self._rows:
            raise DataError(f"{len(lengths)} lengths for {self._rows} rows.")
        if buckets and (lengths is None or max(lengths) > buckets[-1]):
            raise DataError(
                f"the longest bucket, {buckets[-1]} tokens, must hold the longest row: give the "
                "rows' lengths, and a last bucket that is no shorter."
            )
        self._order = self._make_order(shuffle)
        log.info("%d steps per epoch of %d rows; %s", self.steps_per_epoch, self._rows, self.report)

    def _make_order(self, shuffle: bool) -> Any:
        import grain

        order = grain.MapDataset.range(self._rows)
        if not shuffle:
            return order
        order = order.seed(self.seed).shuffle()
        if self._lengths is None:
            return order
        return ByLength(order, self._lengths, self.batch_rows, self.seed)

    def __len__(self) -> int:
        """Number of batches of all epochs."""
        if self.epochs is None:
            raise DataError("This loader never ends (epochs=None); it has no length.")
        return self.steps_per_epoch * self.epochs

    def rows(self, step: int) -> list[int]:
        """The rows of this process's share of batch ``step``; fewer at the end of an epoch."""
        places = self._places(step)
        return [int(self._order[places[i]]) for i in self._own if i < len(places)]

    def _places(self, step: int) -> range:
        """The places of the global batch in the order of all epochs."""
        epoch, at = divmod(step, self.steps_per_epoch)
        first = at * self.batch_rows
        # Beyond one length of data grain continues with the next epoch's order.
        start = epoch * self._rows + first
        return range(start, start + min(self.batch_rows, self._rows - first))

    def _bucket(self, step: int) -> dict[str, int]:
        """The row length of the global batch, the same for every process."""
        if not self._buckets:
            return {}
        longest = max(self._lengths[int(self._order[place])] for place in self._places(step))
        return {"length": next(length for length in self._buckets if length >= longest)}

    def batch(self, step: int) -> Batch:
        """Batch number ``step``, counted from the start of training."""
        form = functools.partial(self._collate, batch_rows=len(self._own), **self._bucket(step))
        if rows := self.rows(step):
            return form([self._item(row) for row in rows])
        # Only empty rows are left for this process: their columns are those of any row of this
        # batch, emptied.
        return _emptied(form([self._item(int(self._order[self._places(step)[0]]))]))

    def _item(self, row: int) -> Any:
        if self._groups is None:
            return self.data[row]
        return [self.data[i] for i in self._groups[row]]

    def __iter__(self) -> BatchIterator:
        import grain

        total = len(self) if self.epochs is not None else 2**60
        steps = grain.MapDataset.range(total).map(self.batch)
        buffer = self._prefetch if self._threads else 0
        options = grain.ReadOptions(num_threads=self._threads, prefetch_buffer_size=buffer)
        batches = iter(steps.to_iter_dataset(options))
        return BatchIterator(batches, self._fingerprint(), self.share)

    def _fingerprint(self) -> dict[str, int]:
        plain = {"rows": self._rows, "batch_rows": self.batch_rows, "seed": self.seed}
        return plain if self._lengths is None else plain | {"by_length": 1}


class BatchIterator(Iterator[Batch]):
    """Batches, and where in the data they are.

    Attributes:
      share: the rows of each global batch that these batches hold; None: all.
    """

    def __init__(self, batches: Any, fingerprint: dict[str, int], share: Any = None):
        self._batches, self._fingerprint, self.share = batches, fingerprint, share

    def __next__(self) -> Batch:
        return next(self._batches)

    def __iter__(self) -> BatchIterator:
        return self

    def get_state(self) -> dict[str, Any]:
        """The position as JSON-able values: what has been handed out, not what is prefetched."""
        return {"position": self._batches.get_state(), **self._fingerprint}

    def set_state(self, state: dict[str, Any]) -> None:
        """Continues at a saved position.

        Raises:
          DataError: the state belongs to other data, batch size or seed.
        """
        changed = [
            f"{name} {state.get(name)} -> {value}"
            for name, value in self._fingerprint.items()
            if state.get(name) != value
        ]
        if changed:
            raise DataError(
                f"The saved data position belongs to another run: {', '.join(changed)}. Resume "
                "with the same data, batch size and seed, or start a new run."
            )
        self._batches.set_state(state["position"])


def _emptied(batch: Batch) -> Batch:
    """The batch with nothing in it, as padding is: zeros, and no media at any token."""
    return {
        name: _emptied(x)
        if isinstance(x, dict)
        else np.full_like(x, -1 if name == "feature_index" else 0)
        for name, x in batch.items()
    }


def pack(sizes: Sequence[Sizes], shapes: Shapes, *, seed: int = 0) -> list[tuple[int, ...]]:
    """Groups short examples into rows: first fit over a shuffled order.

    The groups stay the same over the epochs (examples in a row do not see each other); the loader
    shuffles the rows.

    Args:
      sizes: of each supervised example.
      shapes: what a row holds; ``response_length``, ``images``, ``patches`` and the first axis of
        other media count for the row as a whole.
      seed: of the order in which rows are filled.

    Raises:
      DataError: an example that fits no row.
    """
    groups: list[list[int]] = []
    room: list[list[int]] = []
    open_rows: list[int] = []  # only these are searched, so packing stays linear
    for i in np.random.default_rng(seed).permutation(len(sizes)):
        size = sizes[i]
        responses = sum(size.responses)
        others = [size.media.get(name, (0,))[0] for name in shapes.media]
        need = (size.prompt + responses, responses + size.trained, size.images, size.patches)
        need += tuple(others)
        limits = (shapes.length, shapes.response_length, shapes.images, shapes.patches)
        limits += tuple(shape[0] for shape in shapes.media.values())
        if any(n > limit for n, limit in zip(need, limits, strict=True)):
            what = ("tokens", "response slots", "images", "patches", *shapes.media)
            needs = ", ".join(f"{n} {name}" for n, name in zip(need, what, strict=True))
            raise DataError(
                f"Example {i} needs {needs}; a row holds {limits}. Raise the shapes or lower the "
                "limits."
            )
        for row in open_rows:
            if all(n <= r for n, r in zip(need, room[row], strict=True)):
                break
        else:
            row = len(groups)
            groups.append([])
            room.append(list(limits))
            open_rows = [*open_rows[-63:], row]
        groups[row].append(int(i))
        room[row] = [r - n for n, r in zip(need, room[row], strict=True)]
    return [tuple(group) for group in groups]
