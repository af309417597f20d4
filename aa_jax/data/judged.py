"""Judged responses and, beside each, the same response without the judgment in its prompt."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from aa_jax.data.collate import Shapes
from aa_jax.data.processor import Processor
from aa_jax.data.tokens import Encoded, encode_example

_SAME = (
    "responses", "ended", "media", "media_shapes", "images", "image_size", "patches",
    "patch_numbers", "features",
)  # fmt: skip


class Judged(Sequence):
    """Encoded examples of the task ``judgment``, each with its twin in ``meta["plain"]``.

    The twin has the example's media and the very tokens of its response; its prompt is the shorter
    one, so that it fits wherever the example does.

    Args:
      data: such examples by random access, with ``example``, ``shapes`` and ``report``.
      processor: that encoded them.
    """

    def __init__(self, data: Any, processor: Processor):
        self._data, self._processor = data, processor
        self.report = data.report

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, index: int) -> Encoded:
        item = self._data[index]
        # An image that is tokens is part of the prompt; other media are the example's own arrays.
        whole = self._processor.image_tokens is not None
        example = self._data.example(index, decoded=whole)
        plain = example.replace(messages=example.meta["plain"])
        twin = encode_example(plain, self._processor, pixels=whole)
        same = {name: getattr(item, name) for name in _SAME}
        twin = dataclasses.replace(twin, **same, meta={})
        return dataclasses.replace(item, meta={**item.meta, "plain": twin})

    def shapes(self, layout: str, *, multiple_of: int = 8) -> Shapes:
        """See the data's own; without the twins."""
        return self._data.shapes(layout, multiple_of=multiple_of)

    def twin_shapes(self, layout: str, *, multiple_of: int = 8) -> Shapes:
        """Batch shapes that hold every twin: those of the examples, whose prompts are longer."""
        return self.shapes(layout, multiple_of=multiple_of)
