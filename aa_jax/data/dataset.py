"""A source read through a template: random access to valid examples, invalid ones counted.

One pass over the rows, without decoding media, finds what is dropped and how long everything is;
so the number of steps is known before training and a batch never loses a row.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence

from aa_jax.data.collate import Shapes, plan_shapes
from aa_jax.data.example import Example, InvalidRow, Media, Report, Row
from aa_jax.data.media import decode, media_key, read_bytes
from aa_jax.data.processor import Processor
from aa_jax.data.templates import WORDED, Template, find_template, read
from aa_jax.data.tokens import NO_LIMITS, Encoded, Limits, Sizes, encode_example
from aa_jax.errors import DataError, MediaError

log = logging.getLogger(__name__)


class Dataset(Sequence):
    """Valid examples of a source.

    Args:
      source: rows, see ``aa_jax.data.sources``.
      template: name or Template.
      task: ``supervised``, ``preference``, ``prompt``, ``feedback``, ``unpaired``, ``judgment``
        or ``graded``.
      columns: your own column names instead of a template.
      processor: with it the items are ``Encoded``, without it ``Example``.
      limits: lengths; too long examples are dropped and counted.
      strict: raise at the first invalid row instead of dropping it.
      check_media: decode every image in the first pass and drop what is unreadable; by default
        an unreadable image raises when its turn comes.
      wording: of the feedback prompts.
      size: use only the first rows.
      keep: stop at this many examples.

    Raises:
      InvalidRow: ``strict`` and a row is invalid.
      DataError: a column is missing, or nothing is left.
    """

    def __init__(
        self,
        source: Sequence[Row],
        template: str | Template | None = None,
        task: str = "supervised",
        *,
        columns: Mapping[str, str] | None = None,
        processor: Processor | None = None,
        limits: Limits = NO_LIMITS,
        strict: bool = False,
        check_media: bool = False,
        wording: Mapping[str, str] | None = None,
        size: int | None = None,
        keep: int | None = None,
    ):
        self.source, self.task, self.processor, self.limits = source, task, processor, limits
        self.template = find_template(template, columns)
        self._options = {"wording": wording} if task in WORDED else {}
        self.report = Report()
        self.sizes: list[Sizes] = []
        self._index: list[tuple[int, int]] = []
        for row in range(len(source) if size is None else min(size, len(source))):
            if keep is not None and len(self._index) >= keep:
                break
            self.report.rows += 1
            try:
                self._scan(row, check_media, strict)
            except InvalidRow as error:
                if strict:
                    raise
                self.report.drop(error)
        if keep is not None:  # a row may give several
            del self._index[keep:], self.sizes[keep:]
        self.report.kept = len(self._index)
        log.info("%s: %s", task, self.report)
        if not self._index:
            raise DataError(f"No example is left: {self.report}.")

    def _scan(self, row: int, check_media: bool, strict: bool) -> None:
        examples, root = self._read(row)
        for k, example in enumerate(examples):
            try:
                if check_media:
                    self._decodable(example, root)
                if self.processor is not None:
                    encoded = encode_example(
                        example, self.processor, self.limits, pixels=False, root=root
                    )
                    self.sizes.append(encoded.sizes)
            except InvalidRow as error:
                if strict:
                    raise
                self.report.drop(error)  # another example of the row may still be fine
            else:
                self._index.append((row, k))

    @staticmethod
    def _decodable(example: Example, root: str | None) -> None:
        try:
            decode(example, root)
        except MediaError as error:
            raise InvalidRow("unreadable media", str(error)) from error

    def _read(self, row: int) -> tuple[list[Example], str | None]:
        values = self.source[row]
        examples = read(self.template, self.task, values, decode=False, **self._options)
        return examples, getattr(values, "root", None)

    def __len__(self) -> int:
        return len(self._index)

    def example(self, index: int, *, decoded: bool = True) -> Example:
        """The example with its media decoded, or as the bytes of their files."""
        row, k = self._index[index]
        examples, root = self._read(row)
        if decoded:
            return decode(examples[k], root)
        return examples[k].replace(
            media=tuple(
                dataclasses.replace(item, data=read_bytes(item, root, examples[k].where))
                if isinstance(item, Media) and item.array is None
                else item
                for item in examples[k].media
            )
        )

    def __getitem__(self, index: int) -> Example | Encoded:
        example = self.example(index)
        if self.processor is None:
            return example
        return encode_example(example, self.processor, self.limits)

    def bare(self, index: int) -> Encoded:
        """As an item, without the arrays of its media: nothing is decoded."""
        row, k = self._index[index]
        examples, root = self._read(row)
        return encode_example(examples[k], self.processor, self.limits, pixels=False, root=root)

    def origin(self, index: int) -> str | None:
        """The hash of the files of an example's media, in the order it shows them; they are read,
        not decoded. None where it has no media."""
        example = self.example(index, decoded=False)
        parts = [part for message in example.messages for part in message.media]
        return media_key([(part.type, example.media[part.index]) for part in parts])

    def shapes(self, layout: str, *, multiple_of: int = 8) -> Shapes:
        """The smallest batch shapes that hold every example, from the lengths of the first pass."""
        if self.processor is None:
            raise DataError("Shapes need token lengths: give the dataset a processor.")
        return plan_shapes(self.sizes, layout, multiple_of=multiple_of)
