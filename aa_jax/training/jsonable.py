"""JSON for what a data iterator remembers: positions, bytes and small arrays, bit for bit."""

import base64
import json
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from aa_jax.errors import CheckpointError

_BYTES, _ARRAY = "__bytes__", "__array__"


def to_json(value: Any, where: str = "") -> Any:
    """A JSON value that `from_json` turns back into `value`; tuples come back as lists.

    Args:
      value: Dicts with string keys, lists, numbers, strings, None, bytes, numpy arrays.
      where: Name of the value, for the error.

    Raises:
      CheckpointError: Something else is in it.
    """
    if isinstance(value, Mapping):
        if odd := [key for key in value if not isinstance(key, str)]:
            raise CheckpointError(
                f"{where or 'the value'} has the key {odd[0]!r} ({type(odd[0]).__name__}); "
                "a checkpoint keeps dictionaries with string keys only"
            )
        return {key: to_json(child, f"{where}/{key}") for key, child in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_json(child, f"{where}/{i}") for i, child in enumerate(value)]
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, bytes):
        return {_BYTES: base64.b64encode(value).decode()}
    if hasattr(value, "__array__"):
        array = np.asarray(value)
        data = base64.b64encode(array.tobytes()).decode()
        return {_ARRAY: data, "dtype": array.dtype.name, "shape": list(array.shape)}
    raise CheckpointError(
        f"{where or 'the value'} is a {type(value).__name__}, which a checkpoint cannot keep as "
        "JSON: use dicts, lists, numbers, strings, None, bytes or numpy arrays"
    )


def from_json(value: Any) -> Any:
    """The inverse of `to_json`."""
    if isinstance(value, list):
        return [from_json(child) for child in value]
    if not isinstance(value, dict):
        return value
    if _BYTES in value:
        return base64.b64decode(value[_BYTES])
    if _ARRAY in value:
        flat = np.frombuffer(base64.b64decode(value[_ARRAY]), np.dtype(value["dtype"]))
        return flat.reshape(value["shape"]).copy()
    return {key: from_json(child) for key, child in value.items()}


def digest(value: Any) -> int:
    """CRC-32 of a JSON value, independent of key order and white space."""
    return zlib.crc32(json.dumps(value, sort_keys=True).encode())


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested dicts -> {"a.b": value}; everything else is a value."""
    if not isinstance(value, Mapping) or not value:
        return {prefix: value} if prefix else {}
    out: dict[str, Any] = {}
    for key, child in value.items():
        out |= flatten(child, f"{prefix}.{key}" if prefix else str(key))
    return out
