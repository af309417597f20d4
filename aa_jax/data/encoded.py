"""Examples made by a program (not read from a file) as encoded data for the loader."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from typing import Any

import numpy as np

from aa_jax.data.collate import Shapes, plan_shapes
from aa_jax.data.example import Example, InvalidRow, Report
from aa_jax.data.processor import Processor
from aa_jax.data.tokens import NO_LIMITS, Encoded, Limits, Sizes, encode_example
from aa_jax.errors import DataError

log = logging.getLogger(__name__)


class EncodedExamples(Sequence):
    """Encodes a random-access sequence of Examples once and keeps the result in memory.

    Meant for sets that fit: pixels are kept too. Files are read through
    `aa_jax.data.dataset.Dataset`, which decodes media when their turn comes.

    Args:
      examples: with decoded media.
      processor: of the checkpoint.
      limits: lengths; too long examples are dropped and counted.
      strict: raise at the first invalid example instead.

    Raises:
      InvalidRow: `strict` and an example is invalid.
      DataError: nothing is left.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        processor: Processor,
        limits: Limits = NO_LIMITS,
        *,
        strict: bool = False,
    ):
        self.processor = processor
        self.report = Report()
        self._examples, self._kept = examples, []
        self._encoded: list[Encoded] = []
        for index in range(len(examples)):
            self.report.rows += 1
            try:
                self._encoded.append(encode_example(examples[index], processor, limits))
                self._kept.append(index)
            except InvalidRow as error:
                if strict:
                    raise
                self.report.drop(error)
        self.report.kept = len(self._encoded)
        if not self._encoded:
            raise DataError(f"No example is left: {self.report}.")

    def __len__(self) -> int:
        return len(self._encoded)

    def __getitem__(self, index: int) -> Encoded:
        return self._encoded[index]

    def bare(self, index: int) -> Encoded:
        """As an item, without the arrays of its media."""
        return dataclasses.replace(self._encoded[index], media={})

    def example(self, index: int, *, decoded: bool = True) -> Example:
        """The Example that was encoded; its media are decoded in any case."""
        return self._examples[self._kept[index]]

    @property
    def sizes(self) -> list[Sizes]:
        """Lengths of every example, for packing."""
        return [item.sizes for item in self._encoded]

    def shapes(self, layout: str, *, multiple_of: int = 8) -> Shapes:
        """The smallest batch shapes that hold every example."""
        return plan_shapes(self._encoded, layout, multiple_of=multiple_of)


class WithColumn(Sequence):
    """Encoded data with one more number (or row of numbers) per example in `meta`.

    Args:
      data: encoded examples, by random access.
      name: key in `Encoded.meta`, for `collate(extras=...)`.
      values: [N, ...], in the order of `data`.
    """

    def __init__(self, data: Any, name: str, values: np.ndarray):
        if len(values) != len(data):
            raise DataError(f"{len(values)} values of {name!r} for {len(data)} examples.")
        self._data, self._name, self._values = data, name, values
        self.report = data.report

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, index: int) -> Encoded:
        item = self._data[index]
        return dataclasses.replace(item, meta={**item.meta, self._name: self._values[index]})

    def shapes(self, layout: str, *, multiple_of: int = 8) -> Shapes:
        """See the data's own."""
        return self._data.shapes(layout, multiple_of=multiple_of)
