"""Prompts with the responses of other prompts, for losses that estimate a KL divergence on them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from aa_jax.data.collate import Shapes, plan_shapes
from aa_jax.data.tokens import Encoded, Sizes
from aa_jax.errors import DataError


class Mismatched(Sequence):
    """Encoded examples of one response, each with a mismatched twin in ``meta["mismatched"]``.

    The twin has the example's prompt and media, and the response of the example half the data set
    away: neighbours are often two responses to one prompt. Which one that is depends on nothing
    else, so reference log-probs of the twins can be kept with the data.

    Args:
      data: encoded examples by random access, with ``sizes``, ``shapes`` and ``report``.

    Raises:
      DataError: there is only one example.
    """

    def __init__(self, data: Any):
        if len(data) < 2:
            raise DataError(
                "A KL estimate on mismatched pairs of prompt and response needs at least two "
                f"examples, the data has {len(data)}."
            )
        self._data, self.report = data, data.report
        self._responses: dict[int, tuple[np.ndarray, bool]] = {}

    def __len__(self) -> int:
        return len(self._data)

    def partner(self, index: int) -> int:
        """The example whose response the twin of this one has."""
        return (index + len(self) // 2) % len(self)

    def __getitem__(self, index: int) -> Encoded:
        item = self._load(index)
        partner = self.partner(index)
        if partner not in self._responses:
            self._load(partner)
        response, ended = self._responses[partner]
        twin = dataclasses.replace(item, responses=(response,), ended=(ended,), meta={})
        return dataclasses.replace(item, meta={**item.meta, "mismatched": twin})

    def _load(self, index: int) -> Encoded:
        # Responses are kept: they are short, and reading one again would decode its media.
        item = self._data[index]
        self._responses[index] = item.responses[0], item.ended[0]
        return item

    def shapes(self, layout: str, *, multiple_of: int = 8) -> Shapes:
        """See the data's own; without the twins."""
        return self._data.shapes(layout, multiple_of=multiple_of)

    def twin_shapes(self, layout: str, *, multiple_of: int = 8) -> Shapes:
        """The smallest batch shapes that hold every twin."""
        sizes: list[Sizes] = self._data.sizes
        twins = [
            dataclasses.replace(size, responses=sizes[self.partner(i)].responses)
            for i, size in enumerate(sizes)
        ]
        return plan_shapes(twins, layout, multiple_of=multiple_of)
