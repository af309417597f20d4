"""list[Encoded] -> Batch: static shapes, exact positions, key intervals and targets.

One row is a prompt followed by its responses. A preference pair shares its prompt
(``prompt | chosen | rejected``): both responses continue the positions from the prompt's end and
see the prompt and themselves, not each other.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from aa_jax.data.tokens import Encoded, Sizes
from aa_jax.errors import DataError

Batch = dict[str, Any]
LAYOUTS = ("supervised", "preference", "preference_rows", "group", "prompt")
WHOLE_NUMBERS = ("feature_lengths",)  # media arrays that are counts, not signals


@dataclasses.dataclass(frozen=True)
class Shapes:
    """Static sizes of a batch.

    Attributes:
      length: T, tokens per row.
      response_length: R, response slots per sequence (earlier trained turns included).
      images: I, images per row; 0 makes a text-only batch.
      image_size: (height, width) of the pixels, needed for rows without an image.
      patches: P, patches per row where images are of any size; then positions have three axes.
      patch_numbers: K, numbers in a patch.
      media: other media arrays of a row, name -> shape; items of a row stand one after the other
        on the first axis, smaller ones are padded with zeros on the others.
      sequences: S, responses per row of the layout ``group``.
      axes: numbers in a position: 3 where patches were encoded ahead; with patches it is always so.
    """

    length: int
    response_length: int
    images: int = 0
    image_size: tuple[int, int] | None = None
    patches: int = 0
    patch_numbers: int = 0
    media: Mapping[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    sequences: int = 1
    axes: int = 1


def row_length(prompt: int, responses: Sequence[int], layout: str) -> int:
    """T that a row of this layout needs."""
    if layout == "prompt":
        return prompt
    if layout in ("preference", "group"):
        return prompt + sum(responses)
    return prompt + max(responses, default=0)


def plan_shapes(items: Iterable[Encoded | Sizes], layout: str, *, multiple_of: int = 8) -> Shapes:
    """The smallest shapes that hold every example; the length is rounded up.

    Args:
      items: encoded examples, or their sizes alone.
      layout: of the batch.
      multiple_of: the row length is rounded up to it.

    Raises:
      DataError: no examples, images of different sizes, or an unknown layout.
    """
    _check_layout(layout)
    length = response = images = patches = numbers = sequences = 0
    axes = 1
    pixels: set[tuple[int, int]] = set()
    media: dict[str, tuple[int, ...]] = {}
    for item in items:
        if isinstance(item, Encoded):
            item = item.sizes
        length = max(length, row_length(item.prompt, item.responses, layout))
        trained = item.trained if layout == "supervised" else 0
        response = max(response, max(item.responses, default=0) + trained)
        images, patches = max(images, item.images), max(patches, item.patches)
        numbers = max(numbers, item.patch_numbers)
        sequences, axes = max(sequences, len(item.responses)), max(axes, item.axes)
        pixels |= {item.image_size} if item.image_size else set()
        for name, shape in item.media.items():
            media[name] = tuple(map(max, media.get(name, shape), shape))
    if not length:
        raise DataError("There are no examples to plan the batch shapes for.")
    if len(pixels) > 1:
        raise DataError(
            f"The images have different sizes after processing: {sorted(pixels)[:4]}. A batch "
            "needs one size: set do_center_crop, or a fixed height and width, in "
            "preprocessor_config.json."
        )
    length = -(-length // multiple_of) * multiple_of
    return Shapes(
        length=length,
        response_length=response,
        images=images,
        image_size=next(iter(pixels), None),
        patches=patches,
        patch_numbers=numbers,
        media=media,
        sequences=sequences if layout == "group" else 1,
        axes=axes,
    )


def grow(known: Shapes | None, needed: Shapes) -> Shapes:
    """Shapes that hold what both hold, for data that arrives batch by batch.

    They never shrink, so a function compiled for them is compiled anew only when a batch sets a
    record; of n batches in random order about ln(n) do.

    Args:
      known: shapes of the batches before; None at the first.
      needed: of this batch, from `plan_shapes`.
    """
    if known is None:
        return needed
    media = {**known.media}
    for name, shape in needed.media.items():
        media[name] = tuple(map(max, media.get(name, shape), shape))
    return Shapes(
        length=max(known.length, needed.length),
        response_length=max(known.response_length, needed.response_length),
        images=max(known.images, needed.images),
        image_size=needed.image_size or known.image_size,
        patches=max(known.patches, needed.patches),
        patch_numbers=max(known.patch_numbers, needed.patch_numbers),
        media=media,
        sequences=max(known.sequences, needed.sequences),
        axes=max(known.axes, needed.axes),
    )


def _check_layout(layout: str) -> None:
    if layout not in LAYOUTS:
        raise DataError(f"Unknown batch layout {layout!r}; there are {', '.join(LAYOUTS)}.")


def collate(
    rows: Sequence[Encoded | Sequence[Encoded]],
    shapes: Shapes,
    layout: str,
    *,
    batch_rows: int | None = None,
    pad_id: int = 0,
    extras: Sequence[str] = (),
) -> Batch:
    """Builds a batch.

    Args:
      rows: one example per row; for ``supervised`` and ``group`` a row may also be a list of
        examples that share it (packing). ``preference_rows`` makes two rows of each example.
      shapes: static sizes.
      layout: ``supervised`` (one response), ``preference`` (chosen and rejected behind one prompt),
        ``preference_rows`` (chosen and rejected as consecutive rows), ``group`` (up to S responses
        behind one prompt, or behind those that share a row, one after the other; absent ones have
        ``sequence_mask`` 0), ``prompt`` (for sampling).
      batch_rows: number of examples (packed rows) the batch is padded to; the rows added have
        ``sequence_mask`` 0.
      pad_id: id of padding tokens.
      extras: names in ``Encoded.meta`` copied to the batch as float32, [B] or [B, S].

    Raises:
      DataError: an example does not fit the shapes, or has the wrong number of responses.
    """
    _check_layout(layout)
    groups = [[row] if isinstance(row, Encoded) else list(row) for row in rows]
    if layout == "preference_rows":
        groups = [[_only(item, i)] for group in groups for item in group for i in (0, 1)]
    size = len(groups)
    if batch_rows is not None:
        size = batch_rows * (2 if layout == "preference_rows" else 1)
        if len(groups) > size:
            raise DataError(f"{len(groups)} rows do not fit a batch of {size}.")
    packed = max((len(group) for group in groups), default=1)
    if packed > 1 and layout not in ("supervised", "group"):
        raise DataError(
            f"Packing several examples in a row is for 'group' and 'supervised', not {layout!r}."
        )
    sequences = {"preference": 2, "group": shapes.sequences}.get(layout, 1)
    batch = _empty(size, sequences, shapes, pad_id, layout)
    for b, group in enumerate(groups):
        _fill_row(batch, b, group, shapes, layout)
    for name in extras:
        batch[name] = _extra(name, groups, size)
    return batch


def _only(item: Encoded, i: int) -> Encoded:
    if len(item.responses) != 2:
        raise DataError(f"{item.where}: {len(item.responses)} responses; a preference has two.")
    one = dict(responses=(item.responses[i],), ended=(item.ended[i],))
    return dataclasses.replace(item, **one, trained=np.zeros_like(item.trained))


def _empty(rows: int, sequences: int, shapes: Shapes, pad_id: int, layout: str) -> Batch:
    length = shapes.length
    axes = (3,) if shapes.patches or shapes.axes == 3 else ()
    batch: Batch = {
        "tokens": np.full((rows, length), pad_id, np.int32),
        "positions": np.zeros((rows, length, *axes), np.int32),
        "intervals": np.zeros((rows, length, 4), np.int32),
        "last_positions": np.zeros((rows, sequences), np.int32),
        "sequence_mask": np.zeros((rows, sequences), np.float32),
    }
    if layout != "prompt":
        slots = (rows, sequences, shapes.response_length)
        batch["target_positions"] = np.zeros(slots, np.int32)
        batch["targets"] = np.zeros(slots, np.int32)
        batch["loss_mask"] = np.zeros(slots, np.float32)
    if shapes.images or shapes.media:
        batch["feature_index"] = np.full((rows, length), -1, np.int32)
        batch["media"] = {
            name: np.zeros((rows, *shape), np.int32 if name in WHOLE_NUMBERS else np.float32)
            for name, shape in shapes.media.items()
        }
    if shapes.images:
        if shapes.image_size is None and not shapes.patches:
            raise DataError("Shapes with images need image_size=(height, width), or patches.")
        size = (rows, shapes.images, 3, *(shapes.image_size or ()))
        if shapes.patches:
            size = (rows, shapes.patches, shapes.patch_numbers)
            batch["media"]["grid_thw"] = np.zeros((rows, shapes.images, 3), np.int32)
        batch["media"]["pixel_values"] = np.zeros(size, np.float32)
    return batch


def _fill_row(batch: Batch, b: int, group: Sequence[Encoded], shapes: Shapes, layout: str) -> None:
    start = slot = first = images = features = patches = 0
    taken: dict[str, int] = {}
    for item in group:
        responses = [] if layout == "prompt" else list(item.responses)
        expected = {"prompt": 0, "preference": 2}.get(layout, 1)
        if layout == "group":
            expected = min(max(len(responses), 1), shapes.sequences - first)
        if len(responses) != expected:
            raise DataError(
                f"{item.where or 'An example'} has {len(responses)} responses; the layout "
                f"{layout!r} needs {expected}. Read the dataset with the matching task."
            )
        prompt = len(item.prompt)
        end = start + prompt + sum(map(len, responses))
        if end > shapes.length:
            raise DataError(
                f"{item.where or 'An example'} needs {end} tokens in its row, {shapes.length} fit. "
                "Give larger shapes, or Limits that drop such examples."
            )
        _write(batch, b, start, item.prompt, 0)
        if item.positions is not None:
            flat = batch["positions"].ndim == 2  # a text-only batch: the three are the same
            places = item.positions[:, 0] if flat else item.positions
            batch["positions"][b, start : start + prompt] = places
        batch["intervals"][b, start : start + prompt] = _causal(start, prompt)
        if images + item.images > shapes.images:
            raise DataError(
                f"{item.where or 'An example'}: row {b} holds {images + item.images} images, "
                f"{shapes.images} fit. Raise images in the shapes."
            )
        if item.images:
            _write_media(batch["media"], b, images, patches, item, shapes)
            images, patches = images + item.images, patches + item.patches
        for name in item.media_shapes:
            taken[name] = _place(batch, name, b, taken.get(name, 0), item, shapes)
        seen = item.feature_index >= 0
        if seen.any():
            index = np.where(seen, item.feature_index + features, -1)
            batch["feature_index"][b, start : start + prompt] = index
            features += int(seen.sum()) if item.features is None else item.features
        slot = _write_responses(batch, b, start, slot, first, item, responses, shapes)
        if layout == "prompt":
            batch["last_positions"][b, 0] = end - 1
        if layout == "group":
            last = first + len(responses)
            batch["sequence_mask"][b, first:last] = 1.0
            first, slot = last, 0
        else:
            batch["sequence_mask"][b] = 1.0
        start = end


def _write_media(
    media: dict[str, np.ndarray], b: int, images: int, patches: int, item: Encoded, shapes: Shapes
) -> None:
    """Puts an example's pixels behind those of the row's earlier examples."""
    pixels = item.media["pixel_values"]
    if not shapes.patches:
        if pixels.shape[-2:] != tuple(shapes.image_size):
            raise DataError(
                f"{item.where or 'An example'}: pixels {pixels.shape[-2:]}"
                f" do not fit shapes with image_size={tuple(shapes.image_size)}."
            )
        media["pixel_values"][b, images : images + item.images] = pixels
        return
    if patches + item.patches > shapes.patches or pixels.shape[1] != shapes.patch_numbers:
        raise DataError(
            f"{item.where or 'An example'}: its images have {item.patches} patches of "
            f"{pixels.shape[1]} numbers, the row holds {patches} already; {shapes.patches} of "
            f"{shapes.patch_numbers} fit. Raise patches in the shapes."
        )
    media["pixel_values"][b, patches : patches + item.patches] = pixels
    media["grid_thw"][b, images : images + item.images] = item.media["grid_thw"]


def _place(batch: Batch, name: str, b: int, at: int, item: Encoded, shapes: Shapes) -> int:
    """Writes one of an example's media arrays behind those of its row; returns the next place."""
    array, room = item.media[name], shapes.media.get(name, ())
    needed = (at + array.shape[0], *array.shape[1:])
    if len(needed) != len(room) or any(n > r for n, r in zip(needed, room, strict=True)):
        raise DataError(
            f"{item.where or 'An example'}: its row needs {name} of {list(needed)}, {list(room)} "
            "fit. Give shapes planned for this data (`plan_shapes`)."
        )
    place = (b, slice(at, needed[0]), *(slice(0, n) for n in needed[1:]))
    batch["media"][name][place] = array
    return needed[0]


def _write(batch: Batch, b: int, at: int, ids: np.ndarray, position: int) -> None:
    batch["tokens"][b, at : at + len(ids)] = ids
    positions = position + np.arange(len(ids), dtype=np.int32)
    if batch["positions"].ndim == 3:  # three axes: text has the same number on each
        positions = positions[:, None]
    batch["positions"][b, at : at + len(ids)] = positions


def _causal(start: int, length: int) -> np.ndarray:
    """[length, 4]: sees [start, itself]."""
    own = np.arange(start, start + length) + 1
    zero = np.zeros_like(own)
    return np.stack([zero, zero, np.full_like(own, start), own], axis=-1)


def _write_responses(
    batch: Batch,
    b: int,
    start: int,
    slot: int,
    first: int,
    item: Encoded,
    responses: Sequence[np.ndarray],
    shapes: Shapes,
) -> int:
    """Writes the responses behind the prompt, as sequences from ``first`` on; returns the next free
    slot of a packed row."""
    prompt_end = start + len(item.prompt)
    at = prompt_end
    for s, ids in enumerate(responses, first):
        after = len(item.prompt) if item.next_position is None else item.next_position
        _write(batch, b, at, ids, after)
        intervals = _causal(at, len(ids))
        if len(responses) > 1:  # the prompt, then itself, not the other response
            intervals[:, 0], intervals[:, 1] = start, prompt_end
        else:
            intervals[:, 2] = start
        batch["intervals"][b, at : at + len(ids)] = intervals
        # The first token is predicted by the prompt's last one, wherever the response stands.
        predictors = np.arange(at - 1, at + len(ids) - 1)
        predictors[0] = prompt_end - 1
        targets = ids
        if len(responses) == 1 and item.trained.any():
            earlier = np.flatnonzero(item.trained[1:])
            predictors = np.concatenate([start + earlier, predictors])
            targets = np.concatenate([item.prompt[earlier + 1], ids])
        begin = slot if len(responses) == 1 else 0
        slot = begin + len(targets)
        if slot > shapes.response_length:
            raise DataError(
                f"{item.where or 'An example'} needs {slot} response slots, "
                f"{shapes.response_length} fit. Raise response_length in the shapes."
            )
        batch["target_positions"][b, s, begin:slot] = predictors
        batch["targets"][b, s, begin:slot] = targets
        batch["loss_mask"][b, s, begin:slot] = 1.0
        at += len(ids)
        batch["last_positions"][b, s] = at - 1
    return slot


def _extra(name: str, groups: Sequence[Sequence[Encoded]], rows: int) -> np.ndarray:
    values = []
    for item, *_ in groups:
        if name not in item.meta:
            have = ", ".join(map(str, item.meta)) or "nothing"
            raise DataError(f"{item.where}: no {name!r} in the meta data, which holds {have}.")
        values.append(np.asarray(item.meta[name], np.float32))
    out = np.zeros((rows, *(values[0].shape if values else ())), np.float32)
    for b, value in enumerate(values):
        out[b] = value
    return out
