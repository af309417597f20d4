"""Where every packed patch stands, from the table of grids alone.

A row's images and videos lie end to end as patches [P]; `grid_thw` [I, 3] says how many frames,
rows and columns of patches each has. Within a frame, patches come square by square: the merge_size²
patches of one feature are neighbours, squares run along rows. All of it is integer arithmetic on
fixed shapes, so it is part of the compiled step.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int


class Layout(NamedTuple):
    """Of each patch: is it real, its place in its frame, and the patches of its frame."""

    real: Bool[Array, "B P"]
    row: Int[Array, "B P"]
    column: Int[Array, "B P"]
    start: Int[Array, "B P"]
    stop: Int[Array, "B P"]
    height: Int[Array, "B P"]
    width: Int[Array, "B P"]


def layout(grid: Int[Array, "B I 3"], patches: int, merge: int) -> Layout:
    """Places ``patches`` slots by the table.

    Args:
        grid: frames, rows and columns of patches of each item; rows of zeros are absent items.
        patches: P; slots past the last item's patches are padding, and see nothing.
        merge: edge of the square of patches that makes a feature.
    """
    frames, rows, columns = (grid[..., i] for i in range(3))
    ends = jnp.cumsum(frames * rows * columns, axis=1)
    slot = jnp.arange(patches, dtype=jnp.int32)[None, :]
    slots = jnp.broadcast_to(slot, (grid.shape[0], patches))
    item = (slots[:, :, None] >= ends[:, None, :]).sum(-1)
    real = item < grid.shape[1]
    item = jnp.minimum(item, grid.shape[1] - 1)

    def of_item(values: Array) -> Array:
        return jnp.take_along_axis(values, item, axis=1)

    first = of_item(ends - frames * rows * columns)
    height, width = (jnp.maximum(of_item(x), 1) for x in (rows, columns))
    frame, within = jnp.divmod(slots - first, height * width)
    square, inner = jnp.divmod(within, merge * merge)
    down, right = jnp.divmod(square, jnp.maximum(width // merge, 1))
    start = first + frame * height * width
    zero = jnp.zeros_like(start)
    return Layout(
        real,
        jnp.where(real, down * merge + inner // merge, zero),
        jnp.where(real, right * merge + inner % merge, zero),
        jnp.where(real, start, zero),
        jnp.where(real, start + height * width, zero),
        height,
        width,
    )


def intervals(start: Int[Array, "B P"], stop: Int[Array, "B P"]) -> Int[Array, "B P 4"]:
    """Each patch sees the patches [start, stop)."""
    zero = jnp.zeros_like(start)
    return jnp.stack([zero, zero, start, stop], axis=-1)


class Windows(NamedTuple):
    """The order in which a window's patches are neighbours.

    Attributes:
        order: [B, P] which patch stands at a slot of that order.
        place: [B, P] the slot of each patch; the inverse of ``order``.
        start: [B, P] first slot of the slot's window.
        stop: [B, P] one past its last.
    """

    order: Int[Array, "B P"]
    place: Int[Array, "B P"]
    start: Int[Array, "B P"]
    stop: Int[Array, "B P"]


def windows(at: Layout, merge: int, window: int) -> Windows:
    """Cuts every frame into windows of ``window`` x ``window`` features, from its top left corner;
    those at the right and bottom edges are smaller (Qwen2.5-VL report, section 2.1.1).

    The windows of a frame stay within the frame's own slots, so frames are contiguous in this
    order too.
    """
    unit = merge * merge
    down, right = at.row // merge, at.column // merge
    high, wide = at.height // merge, at.width // merge
    window_down, window_right = down // window, right // window
    rows = jnp.minimum(window, high - window_down * window)
    columns = jnp.minimum(window, wide - window_right * window)
    # Features before this window in its frame: whole bands of windows above, then those left of it.
    before = window_down * window * wide + window_right * window * rows
    start = at.start + before * unit
    inside = (down - window_down * window) * columns + right - window_right * window
    inner = (at.row % merge) * merge + at.column % merge
    slot = jnp.broadcast_to(jnp.arange(start.shape[1], dtype=start.dtype)[None, :], start.shape)
    place = jnp.where(at.real, start + inside * unit + inner, slot)
    order = jnp.argsort(place, axis=1)

    def ordered(values: Array) -> Array:
        return jnp.take_along_axis(jnp.where(at.real, values, 0), order, axis=1)

    return Windows(order, place, ordered(start), ordered(start + rows * columns * unit))
