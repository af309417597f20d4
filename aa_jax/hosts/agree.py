"""What processes say to each other outside the train step; with one process all of it is free.

Every function here but `count` and `index` is called by all processes, in the same order.
"""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np


def count() -> int:
    """Number of processes of the job."""
    import jax

    return jax.process_count()


def index() -> int:
    """This process; 0 is the one that writes."""
    import jax

    return jax.process_index()


def first(value: Any) -> Any:
    """Process 0's value on every process; JSON values (arrays: as ``.tolist()``)."""
    if count() == 1:
        return value
    from jax.experimental import multihost_utils

    text = np.frombuffer(json.dumps(value if index() == 0 else None).encode(), np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.int32(text.size)))
    padded = np.zeros(size, np.uint8)
    if index() == 0:
        padded[:] = text
    return json.loads(np.asarray(multihost_utils.broadcast_one_to_all(padded)).tobytes())


def gather(value: Any) -> list[Any]:
    """Every process's JSON value, in process order, on every process."""
    if count() == 1:
        return [value]
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = _all(np.asarray([text.size], np.int32))[:, 0]
    padded = np.zeros(int(sizes.max()), np.uint8)
    padded[: text.size] = text
    texts = _all(padded)
    return [json.loads(row[:n].tobytes()) for row, n in zip(texts, sizes, strict=True)]


def same(number: int) -> bool:
    """Whether every process has the same number (0 <= number < 2**32, e.g. a checksum)."""
    if count() == 1:
        return True
    return len(set(_all(np.asarray([number], np.uint32))[:, 0].tolist())) == 1


def total(values: Sequence[int | float]) -> list[float]:
    """Sums over the processes, exact for whole numbers below 2**53."""
    if count() == 1:
        return [float(x) for x in values]
    # As bytes: without x64, JAX would make float32 of them.
    data = np.frombuffer(np.asarray(values, np.float64).tobytes(), np.uint8)
    rows = np.ascontiguousarray(_all(data)).view(np.float64)
    return rows.sum(axis=0).tolist()


def barrier(name: str) -> None:
    """Waits for every process."""
    if count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(name)


def to_host(array: Any) -> np.ndarray:
    """An array as a whole on this host, gathered from the processes it is spread over."""
    import jax

    spread = isinstance(array, jax.Array) and not array.is_fully_addressable
    if spread and not array.is_fully_replicated:
        from jax.experimental import multihost_utils

        array = multihost_utils.process_allgather(array, tiled=True)
    return np.asarray(array)


def _all(array: np.ndarray) -> np.ndarray:
    """[processes, ...]."""
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(array))
