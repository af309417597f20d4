"""Reads and writes .safetensors files tensor by tensor, checking every byte range first.

Format: u64 little-endian header size, a JSON header {name: {dtype, shape, data_offsets}}, then the
tensors back to back (https://github.com/huggingface/safetensors#format). The data is memory
mapped, so reading one tensor touches one tensor; writing streams, so a model is never held twice.
"""

import dataclasses
import json
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

DTYPES: dict[str, Any] = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U8": np.uint8,
    "BOOL": np.bool_,
}
NAMES = {np.dtype(dtype): name for name, dtype in DTYPES.items()}
FLOATS = ("F64", "F32", "F16", "BF16")


class BadFile(Exception):
    """The file is not a whole safetensors file; the message says what is wrong with it."""


@dataclasses.dataclass(frozen=True)
class Entry:
    """Where one tensor lies; `start` counts from the beginning of the file."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int

    @property
    def stop(self) -> int:
        """One past the last byte."""
        return self.start + math.prod(self.shape) * np.dtype(DTYPES[self.dtype]).itemsize

    def read(self) -> np.ndarray:
        """The tensor as a read-only view of the mapped file."""
        dtype = np.dtype(DTYPES[self.dtype])
        if not math.prod(self.shape):
            return np.zeros(self.shape, dtype)
        return np.memmap(
            self.file, dtype, mode="r", offset=self.start, shape=self.shape or (1,)
        ).reshape(self.shape)


ALIGNMENT = 64  # bytes; what lies so on a CPU becomes an array of jax without a copy
BLOCK = 128  # rows of a matrix transposed at a time: a block's cache lines stay in the caches


def aligned(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """An empty array that `jax.device_put` does not copy on a CPU, and that nobody may change
    afterwards."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    memory = np.empty(size + ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT
    return memory[start : start + size].view(dtype).reshape(shape)


def fill(target: np.ndarray, source: np.ndarray) -> None:
    """``target[...] = source``, quickly also where the source is a transposed matrix.

    numpy copies a transposed view element by element over strides that no cache holds, and its
    added types (bfloat16) by a function call each; whole blocks of plain integers are several times
    as fast.
    """
    turned = source.T
    if source.ndim != 2 or source.flags.c_contiguous or not turned.flags.c_contiguous:
        target[...] = source
        return
    bits = np.dtype(f"u{target.dtype.itemsize}")
    out = target.view(bits)
    for start in range(0, turned.shape[0], BLOCK):
        rows = turned[start : start + BLOCK].astype(target.dtype, copy=False)
        out[:, start : start + BLOCK] = np.asarray(rows).view(bits).T


def read_header(file: Path) -> dict[str, Entry]:
    """Every tensor of a file, after checking that together they are the file.

    Raises:
        BadFile: the file or its header is unreadable, a byte range does not fit its shape, or the
            tensors do not lie back to back from the header to the end of the file.
    """
    try:
        size = file.stat().st_size
        with open(file, "rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > size - 8:
                raise BadFile(
                    f"holds {size} bytes, fewer than its header announces; it is truncated or not "
                    "a safetensors file"
                )
            header = json.loads(stream.read(length))
    except OSError as error:
        raise BadFile(f"cannot be read ({error})") from error
    except ValueError as error:
        raise BadFile(f"has a damaged header ({error})") from error
    if not isinstance(header, dict):
        raise BadFile(f"has a damaged header (it is a JSON {type(header).__name__})")
    header.pop("__metadata__", None)
    entries = {name: _entry(file, 8 + length, name, raw) for name, raw in header.items()}
    _check_ranges(entries, 8 + length, size)
    return entries


def _entry(file: Path, data: int, name: str, raw: Any) -> Entry:
    try:
        (start, stop), shape, dtype = raw["data_offsets"], tuple(raw["shape"]), str(raw["dtype"])
    except (ValueError, KeyError, TypeError) as error:
        raise BadFile(f"has a damaged header (the entry of {name} is {raw!r})") from error
    if dtype not in DTYPES:
        raise BadFile(f"stores {name} as {dtype}, which is not one of {', '.join(DTYPES)}")
    if any(type(number) is not int or number < 0 for number in (start, stop, *shape)):
        raise BadFile(f"has a damaged header (the entry of {name} is {raw!r})")
    if stop - start != math.prod(shape) * np.dtype(DTYPES[dtype]).itemsize:
        raise BadFile(f"gives {stop - start} bytes to a {dtype} tensor of shape {shape}, {name}")
    return Entry(file, dtype, shape, data + start)


def _check_ranges(entries: dict[str, Entry], data: int, size: int) -> None:
    end, before = data, "the header"
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop)):
        if entry.start != end:
            what = "overlaps" if entry.start < end else "does not begin at the end of"
            raise BadFile(f"has a damaged header ({name} {what} {before})")
        end, before = entry.stop, name
    if end > size:
        raise BadFile(f"is truncated: its tensors need {end} bytes, it holds {size}")
    if end < size:
        raise BadFile(f"holds {size} bytes, but its tensors need only {end}; it is damaged")


def write(
    file: Path,
    specs: dict[str, tuple[np.dtype, tuple[int, ...]]],
    tensors: Iterable[tuple[str, np.ndarray]] | Iterator[tuple[str, np.ndarray]],
) -> None:
    """Writes tensors as they come, in the order of ``specs``.

    Args:
        file: where to.
        specs: name -> (dtype, shape) of every tensor, in writing order.
        tensors: (name, value) pairs in that same order.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, (dtype, shape) in specs.items():
        stop = offset + math.prod(shape) * dtype.itemsize
        header[name] = {
            "dtype": NAMES[dtype],
            "shape": list(shape),
            "data_offsets": [offset, stop],
        }
        offset = stop
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)  # tensors start aligned, as the format asks
    with open(file, "wb") as stream:
        stream.write(len(encoded).to_bytes(8, "little"))
        stream.write(encoded)
        for (name, tensor), (expected, (dtype, shape)) in zip(tensors, specs.items(), strict=True):
            if (name, tensor.dtype, tensor.shape) != (expected, dtype, shape):
                raise ValueError(f"{name} {tensor.dtype}{tensor.shape} is not the {expected} due")
            if not tensor.flags.c_contiguous:
                whole = np.empty(tensor.shape, tensor.dtype)
                fill(whole, tensor)
                tensor = whole
            stream.write(tensor.reshape(-1).view(np.uint8).data)
