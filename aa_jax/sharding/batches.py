"""Batches on a mesh: rows padded to what the devices need, host arrays made global."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from aa_jax.errors import DataError
from aa_jax.sharding.mesh import BATCH_AXES, batch_devices
from aa_jax.sharding.rules import path_name

# Zero is what an absent row holds everywhere except here, where -1 means "not a media token".
_FILL = {"feature_index": -1}


@dataclasses.dataclass(frozen=True)
class Share:
    """The rows of a batch that one process makes, so that each reads and decodes only its own.

    A batch is cut into equal pieces of consecutive rows, one per position on the data and fsdp
    axes. Devices that split tensors or sequences hold the same rows, also those of two processes.

    Attributes:
      pieces: how many.
      own: those this process holds, ascending.
      counted: those of them that no process of a lower number holds as well: over all processes,
        every piece once.
    """

    pieces: int = 1
    own: tuple[int, ...] = (0,)
    counted: tuple[int, ...] = (0,)

    def rows(self, total: int) -> np.ndarray:
        """Which of `total` rows, a multiple of the pieces, are this process's own: ascending."""
        if total % self.pieces:
            raise DataError(
                f"{total} rows cannot be cut into {self.pieces} equal pieces; use a multiple."
            )
        per = total // self.pieces
        return np.concatenate([np.arange(i * per, (i + 1) * per) for i in self.own])

    def total(self, local: int) -> int:
        """Rows of the whole batch of which this process has `local`."""
        if local % len(self.own):
            raise DataError(
                f"{local} rows are no equal share of {len(self.own)} of {self.pieces} pieces of a "
                "batch: make them with a Loader that is given this share."
            )
        return local // len(self.own) * self.pieces

    def counts(self, local: int) -> np.ndarray:
        """[local] bool: rows of this process that it, and no other, is to count."""
        per = local // len(self.own)
        return np.repeat(np.isin(self.own, self.counted), per)


def rows(batch: Mapping[str, Any]) -> int:
    """Number of rows, the length every array of the batch has on its first axis.

    Raises:
      DataError: The arrays disagree, or there are none.
    """
    found = {x.shape[0] for x in jax.tree.leaves(dict(batch)) if np.ndim(x)}
    if len(found) != 1:
        flat, _ = jax.tree_util.tree_flatten_with_path(dict(batch))
        sizes = {path_name(path): x.shape[0] for path, x in flat if np.ndim(x)}
        found = ", ".join(f"{name}: {size}" for name, size in sizes.items()) or "no arrays"
        raise DataError(
            f"every array of a batch needs the same number of rows on its first axis; got {found}"
        )
    return found.pop()


def pad_rows(batch: Mapping[str, Any], multiple: int) -> dict[str, Any]:
    """Adds empty rows, with sequence_mask 0, until the row count is a multiple.

    Exact: an empty row has no targets, so it adds nothing to any sum or count.

    Args:
      batch: Host batch, arrays of [B, ...].
      multiple: The row count becomes a multiple of this.

    Raises:
      DataError: Rows would have to be added but the batch has no sequence_mask to mark them.
    """
    present = rows(batch)
    extra = -present % multiple
    if not extra:
        return dict(batch)
    if "sequence_mask" not in batch:
        raise DataError(
            f"the batch has {present} rows and needs a multiple of {multiple} (devices the rows "
            "are divided over x accumulation), but no 'sequence_mask' that could mark added rows "
            "as empty. Add a sequence_mask of ones, [B, S] float32, or use another batch size."
        )

    def pad(path: Any, array: Any) -> np.ndarray:
        array = np.asarray(array)
        if not array.ndim:
            return array
        value = _FILL.get(path_name(path[-1:]), 0)
        fill = np.full((extra, *array.shape[1:]), value, array.dtype)
        return np.concatenate([array, fill])

    return jax.tree_util.tree_map_with_path(pad, dict(batch))


def batch_shardings(batch: Mapping[str, Any], mesh: Mesh) -> dict[str, Any]:
    """Rows over the data and fsdp axes; scalars on every device."""
    by_row, everywhere = NamedSharding(mesh, P(BATCH_AXES)), NamedSharding(mesh, P())
    return jax.tree.map(lambda x: by_row if np.ndim(x) else everywhere, dict(batch))


def share(mesh: Mesh, process: int | None = None) -> Share:
    """The rows that a process has to make.

    Args:
      mesh: Device mesh.
      process: Default: this one.
    """
    process = jax.process_index() if process is None else process
    devices = mesh.devices.reshape(batch_devices(mesh), -1)
    holders = [{device.process_index for device in piece} for piece in devices]
    own = tuple(i for i, found in enumerate(holders) if process in found)
    return Share(len(holders), own, tuple(i for i in own if min(holders[i]) == process))


def put_batch(batch: Mapping[str, Any], mesh: Mesh, share: Share | None = None) -> dict[str, Any]:
    """Host arrays -> global arrays.

    Args:
      batch: Arrays of [B, ...].
      mesh: Device mesh.
      share: Given if the batch holds only this process's rows, in order; otherwise every process
        gives the same whole batch, and each device takes its rows of it.

    Raises:
      DataError: The rows do not divide over the devices; see `pad_rows`.
    """
    pieces, local = batch_devices(mesh), rows(batch)
    total = local if share is None else share.total(local)
    if total % pieces:
        raise DataError(
            f"{total} rows cannot be divided over {pieces} devices "
            f"({' x '.join(f'{axis}={mesh.shape[axis]}' for axis in BATCH_AXES)}): "
            "pad the batch with pad_rows first"
        )
    places = batch_shardings(batch, mesh)
    if jax.process_count() == 1:
        return jax.device_put(dict(batch), places)

    # Not make_array_from_process_local_data: it refuses meshes on which the rows of two processes
    # overlap in part, as those of three processes with two devices each on data=2, tensor=3.
    per = total // pieces

    def make(x: Any, place: NamedSharding) -> jax.Array:
        x = np.asarray(x)

        def piece(index: tuple[slice, ...]) -> np.ndarray:
            if share is None or not x.ndim:
                return x[index]
            at = share.own.index((index[0].start or 0) // per) * per
            return x[at : at + per]

        shape = (total, *x.shape[1:]) if x.ndim else ()
        return jax.make_array_from_callback(shape, place, piece)

    return jax.tree.map(make, dict(batch), places)
