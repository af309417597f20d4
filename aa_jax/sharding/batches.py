"""Batches on a mesh: rows padded to what the devices need, host arrays made global."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from aa_jax.errors import DataError
from aa_jax.sharding.mesh import BATCH_AXES
from aa_jax.sharding.rules import path_name

# Zero is what an absent row holds everywhere except here, where -1 means "not a media token".
_FILL = {"feature_index": -1}


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
        fill = np.full((extra, *array.shape[1:]), _FILL.get(path_name(path), 0), array.dtype)
        return np.concatenate([array, fill])

    return jax.tree_util.tree_map_with_path(pad, dict(batch))


def batch_shardings(batch: Mapping[str, Any], mesh: Mesh) -> dict[str, Any]:
    """Rows over the data and fsdp axes; scalars on every device."""
    by_row, everywhere = NamedSharding(mesh, P(BATCH_AXES)), NamedSharding(mesh, P())
    return jax.tree.map(lambda x: by_row if np.ndim(x) else everywhere, dict(batch))


def put_batch(batch: Mapping[str, Any], mesh: Mesh) -> dict[str, Any]:
    """Host arrays -> global arrays. In a multi-host run every process gives its own rows.

    Raises:
      DataError: The rows do not divide over the devices; see `pad_rows`.
    """
    pieces = mesh.shape[BATCH_AXES[0]] * mesh.shape[BATCH_AXES[1]]
    total = rows(batch) * jax.process_count()
    if total % pieces:
        raise DataError(
            f"{total} rows cannot be divided over {pieces} devices "
            f"({' x '.join(f'{axis}={mesh.shape[axis]}' for axis in BATCH_AXES)}): "
            "pad the batch with pad_rows first"
        )
    places = batch_shardings(batch, mesh)
    if jax.process_count() == 1:
        return jax.device_put(dict(batch), places)
    return jax.tree.map(
        lambda x, place: jax.make_array_from_process_local_data(place, np.asarray(x)),
        dict(batch),
        places,
    )
