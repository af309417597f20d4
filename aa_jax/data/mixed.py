"""Several datasets as one, in given proportions."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np

from aa_jax.data.collate import Shapes, plan_shapes
from aa_jax.data.example import Example, Report
from aa_jax.data.tokens import Encoded, Sizes
from aa_jax.errors import ConfigError

log = logging.getLogger(__name__)


class Mixed(Sequence):
    """Datasets read as one.

    Without weights every example of every part is there once. With weights the parts' shares are
    the weights', and the part that would run out first is there once: its size decides how many
    of the others are taken, drawn without replacement (a random subset, fixed by the seed).

    Args:
      parts: datasets with a processor, see `aa_jax.data.dataset.Dataset`.
      weights: one per part, of any scale; None: their sizes.
      seed: of the subsets.

    Raises:
      ConfigError: no parts, or not one positive weight each.
    """

    def __init__(
        self, parts: Sequence[Any], weights: Sequence[float | int] | None = None, *, seed: int = 0
    ):
        lengths = np.array([len(part) for part in parts])
        if not len(parts) or (weights is not None and len(weights) != len(parts)):
            raise ConfigError(
                f"a mix needs datasets and one weight each: got {len(parts)} datasets and "
                f"{'no' if weights is None else len(weights)} weights."
            )
        if weights is not None and not all(np.isfinite(w) and w > 0 for w in weights):
            raise ConfigError(f"the weights of a mix must be positive, got {list(weights)}.")
        shares = lengths if weights is None else np.asarray(weights, np.float64)
        most = np.min(lengths / shares)
        taken = np.minimum(np.rint(shares * most).astype(np.int64), lengths)
        self._parts = list(parts)
        self._index: list[tuple[int, int]] = []
        for number, (count, length) in enumerate(zip(taken, lengths, strict=True)):
            rows = np.arange(length)
            if count < length:
                rows = np.random.default_rng((61, seed, number)).permutation(length)[:count]
            self._index += [(number, int(row)) for row in np.sort(rows)]
        self.report = _summed([part.report for part in parts], len(self._index))
        log.info("a mix of %s examples", " + ".join(map(str, taken.tolist())))

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, index: int) -> Encoded | Example:
        part, row = self._index[index]
        return self._parts[part][row]

    def bare(self, index: int) -> Encoded:
        """An item without the arrays of its media, see the part's own."""
        part, row = self._index[index]
        return self._parts[part].bare(row)

    def example(self, index: int, **options: Any) -> Example:
        """The Example behind an item, see the part's own."""
        part, row = self._index[index]
        return self._parts[part].example(row, **options)

    @property
    def sizes(self) -> list[Sizes]:
        """Lengths of every example."""
        return [self._parts[part].sizes[row] for part, row in self._index]

    def shapes(self, layout: str, *, multiple_of: int = 8) -> Shapes:
        """The smallest batch shapes that hold every example of the mix."""
        return plan_shapes(self.sizes, layout, multiple_of=multiple_of)


def _summed(reports: Sequence[Report], kept: int) -> Report:
    total = Report(sum(report.rows for report in reports), kept)
    for report in reports:
        for reason, count in report.dropped.items():
            total.dropped[reason] = total.dropped.get(reason, 0) + count
            total.first.setdefault(reason, report.first.get(reason, ""))
    return total
