"""Where rows come from: local files and folders, saved datasets, the Hugging Face hub.

Every source is a random-access sequence of ``Row`` (a dict that knows its ``file:row``). Image and
audio columns stay encoded; decoding is ``aa_jax.data.media``'s work.
"""

from __future__ import annotations

import bisect
import csv
import difflib
import glob
import json
import logging
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from aa_jax.data.example import Row
from aa_jax.errors import DataError

log = logging.getLogger(__name__)

EXTENSIONS = (".parquet", ".jsonl", ".ndjson", ".json", ".csv")
SPLIT_WORDS = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "dev", "eval"),
    "test": ("test", "testing"),
}
# Larger parquet sets are turned once into memory-mapped arrow files by `datasets`.
IN_MEMORY_BYTES = 256 * 2**20


class Source(Sequence):
    """Random-access rows.

    Args:
      read: index -> values of the row.
      length: number of rows.
      parts: ``(first row, name, folder)`` of each file, ascending, for ``file:row``.
      columns: column names, where the format has them.
    """

    def __init__(
        self,
        read: Callable[[int], dict[str, Any]],
        length: int,
        parts: Sequence[tuple[int, str, str | None]],
        columns: Sequence[str] = (),
    ):
        self._read, self._length, self._parts = read, length, list(parts)
        self._starts = [part[0] for part in self._parts]
        self.columns = tuple(columns)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Row:
        if not -self._length <= index < self._length:
            raise IndexError(index)
        index %= self._length
        start, name, folder = self._parts[bisect.bisect_right(self._starts, index) - 1]
        return Row.of(self._read(index), where=f"{name}:{index - start}", root=folder)


def open_source(
    path: str | os.PathLike,
    *,
    split: str = "train",
    subset: str | None = None,
    media_root: str | os.PathLike | None = None,
) -> Source:
    """Opens a dataset.

    Args:
      path: a parquet, JSONL, JSON or CSV file, a folder of them, a glob, a folder written by
        ``datasets.save_to_disk``, or a hub id such as ``PKU-Alignment/align-anything``.
      split: ``train``, ``val`` (also called validation, dev), ``test``, or a name of the hub set.
      subset: folder of that name below ``path``, or the hub configuration.
      media_root: folder that relative media paths start at; default: the folder of each file.

    Raises:
      DataError: nothing there, empty, unreadable, or no such split or subset.
    """
    name = os.fspath(path)
    local = Path(name).expanduser()
    if local.is_dir():
        source = _open_folder(local, split, subset)
    elif local.is_file():
        source = _open_files([local])
    elif glob.has_magic(name):
        files = sorted(Path(p) for p in glob.glob(name, recursive=True))
        if not files:
            raise DataError(f"No file matches {name!r}. Check the pattern and its folder.")
        source = _open_files(_of_split(files, split, name))
    elif re.fullmatch(r"[\w.-]+/[\w.-]+", name) and local.suffix not in EXTENSIONS:
        source = _open_hub(name, split, subset)
    else:
        raise DataError(f"No dataset at {name!r}.{_neighbours(local)}")
    if len(source) == 0:
        raise DataError(f"{name} (split {split}) holds no rows. Check how the file was written.")
    if media_root is not None:
        source._parts = [(start, n, os.fspath(media_root)) for start, n, _ in source._parts]
    log.info("opened %s: %d rows", name, len(source))
    return source


def rows_source(rows: Sequence[dict[str, Any]], name: str = "rows") -> Source:
    """Rows that are already in memory, e.g. a generated world."""
    columns = tuple(rows[0]) if len(rows) else ()
    return Source(lambda i: dict(rows[i]), len(rows), [(0, name, None)], columns)


def _neighbours(path: Path) -> str:
    folder = path.parent
    if not folder.is_dir():
        return f" The folder {folder} does not exist either."
    names = sorted(p.name for p in folder.iterdir())
    close = difflib.get_close_matches(path.name, names, n=3, cutoff=0.5) or names[:8]
    return f" In {folder} there is: {', '.join(close) or 'nothing'}."


def _split_of(file: Path) -> str | None:
    """The split a file belongs to, told by the words of its name, else of its folder."""
    for text in (file.stem, file.parent.name):
        words = re.split(r"[^a-z]+", text.lower())
        for split, aliases in SPLIT_WORDS.items():
            if any(word in aliases for word in words):
                return split
    return None


def _of_split(files: list[Path], split: str, name: str) -> list[Path]:
    files = [f for f in files if f.is_file() and f.suffix in EXTENSIONS]
    if not files:
        raise DataError(f"{name} holds no dataset file; expected {', '.join(EXTENSIONS)}.")
    found = {f: _split_of(f) or "train" for f in files}
    wanted = next((s for s, aliases in SPLIT_WORDS.items() if split in (s, *aliases)), split)
    chosen = [f for f in files if found[f] == wanted]
    if not chosen:
        raise DataError(
            f"{name} has no split {split!r}; it has {', '.join(sorted(set(found.values())))}."
        )
    if len({f.suffix for f in chosen}) > 1:
        raise DataError(
            f"{name} (split {split}) mixes formats: {', '.join(f.name for f in chosen[:6])}. "
            "Give one file, or a glob such as 'folder/*.parquet'."
        )
    return chosen


def _open_folder(folder: Path, split: str, subset: str | None) -> Source:
    if subset is not None:
        if not (folder / subset).is_dir():
            have = sorted(p.name for p in folder.iterdir() if p.is_dir())
            raise DataError(
                f"{folder} has no subset {subset!r}; it has {', '.join(have) or 'no folders'}."
            )
        folder = folder / subset
    if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
        return _open_saved(folder, split)
    files = sorted(p for p in folder.glob("*") if p.suffix in EXTENSIONS)
    files = files or sorted(p for p in folder.glob("data/*") if p.suffix in EXTENSIONS)
    if not files:
        below = sorted({p.parent.name for p in folder.glob("*/*") if p.suffix in EXTENSIONS})
        hint = f" Its sub-folders have: pass subset= one of {', '.join(below)}." if below else ""
        raise DataError(f"{folder} holds no dataset file ({', '.join(EXTENSIONS)}).{hint}")
    return _open_files(_of_split(files, split, str(folder)))


def _open_files(files: list[Path]) -> Source:
    suffix = files[0].suffix
    if suffix not in EXTENSIONS:
        raise DataError(
            f"{files[0]} has an unknown format {suffix!r}; expected {', '.join(EXTENSIONS)}."
        )
    if suffix == ".parquet":
        return _open_parquet(files)
    readers = {".csv": _csv_rows, ".json": _json_rows}
    tables = [readers.get(suffix, _jsonl_rows)(file) for file in files]
    return _concatenate(files, tables)


def _concatenate(files: list[Path], tables: list[Any]) -> Source:
    parts, starts, total = [], [], 0
    for file, table in zip(files, tables, strict=True):
        parts.append((total, str(file), str(file.parent)))
        starts.append(total)
        total += len(table)

    def read(index: int) -> dict[str, Any]:
        part = bisect.bisect_right(starts, index) - 1
        return dict(tables[part][index - starts[part]])

    columns = tuple(tables[0][0]) if tables and len(tables[0]) else ()
    return Source(read, total, parts, columns)


def _csv_rows(file: Path) -> list[dict[str, Any]]:
    with open(file, newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def _json_rows(file: Path) -> Sequence[dict[str, Any]]:
    try:
        with open(file, encoding="utf-8") as stream:
            value = json.load(stream)
    except ValueError as error:
        if "Extra data" in str(error):  # JSON lines under a .json name, as the hub often has it
            return _jsonl_rows(file)
        raise DataError(f"{file} is not valid JSON: {error}. Repair or rewrite it.") from error
    if isinstance(value, dict):
        lists = [v for v in value.values() if isinstance(v, list)]
        value = lists[0] if len(lists) == 1 else [value]
    if not isinstance(value, list) or not all(isinstance(row, dict) for row in value):
        raise DataError(f"{file} must hold a list of objects, one per row.")
    return value


class _jsonl_rows(Sequence):  # noqa: N801 - a reader function in everything but state
    """JSON lines by byte offset: only the offsets are held in memory."""

    def __init__(self, file: Path):
        self._file, self._offsets = file, []
        offset = 0
        with open(file, "rb") as stream:
            for line in stream:
                if line.strip():
                    self._offsets.append(offset)
                offset += len(line)

    def __len__(self) -> int:
        return len(self._offsets)

    def __getitem__(self, index: int) -> dict[str, Any]:
        with open(self._file, "rb") as stream:
            stream.seek(self._offsets[index])
            line = stream.readline()
        try:
            value = json.loads(line)
        except ValueError as error:
            raise DataError(
                f"{self._file}:{index} is not valid JSON: {error}. Repair or remove the line."
            ) from error
        if not isinstance(value, dict):
            raise DataError(f"{self._file}:{index} holds a {type(value).__name__}, not an object.")
        return value


def _open_parquet(files: list[Path]) -> Source:
    import pyarrow
    import pyarrow.parquet as pq

    parts, total = [], 0
    for file in files:
        try:
            rows = pq.read_metadata(file).num_rows
        except (pyarrow.ArrowException, OSError) as error:
            raise DataError(
                f"{file} cannot be read as parquet: {error}. A file of a few hundred bytes that "
                "starts with 'version https://git-lfs' is a pointer: run `git lfs pull`; "
                "otherwise download it again."
            ) from error
        parts.append((total, str(file), str(file.parent)))
        total += rows
    if sum(file.stat().st_size for file in files) > IN_MEMORY_BYTES:
        import datasets

        names = [str(file) for file in files]
        data = datasets.load_dataset("parquet", data_files=names, split="train")
        return _from_datasets(data, parts)
    try:
        tables = [pq.read_table(file) for file in files]
        table = pyarrow.concat_tables(tables, promote_options="default")
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"Cannot read {', '.join(f.name for f in files)}: {error}.") from error

    def read(index: int) -> dict[str, Any]:
        return table.slice(index, 1).to_pylist()[0]

    return Source(read, total, parts, table.column_names)


def _from_datasets(data: Any, parts: Sequence[tuple[int, str, str | None]]) -> Source:
    """A ``datasets.Dataset`` with its media columns left encoded."""
    import datasets

    for name, feature in data.features.items():
        if isinstance(feature, (datasets.Image, datasets.Audio)):
            data = data.cast_column(name, type(feature)(decode=False))
        elif isinstance(feature, (datasets.Sequence, datasets.List)) and isinstance(
            feature.feature, (datasets.Image, datasets.Audio)
        ):
            inner = type(feature.feature)(decode=False)
            data = data.cast_column(name, type(feature)(inner))
    return Source(lambda i: data[i], len(data), parts, data.column_names)


def _open_saved(folder: Path, split: str) -> Source:
    import datasets

    try:
        data = datasets.load_from_disk(str(folder))
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{folder} is a damaged saved dataset: {error}.") from error
    if isinstance(data, datasets.DatasetDict):
        data = data[_named_split(list(data), split, str(folder))]
    return _from_datasets(data, [(0, str(folder), str(folder))])


def _named_split(have: list[str], split: str, name: str) -> str:
    words = next((aliases for s, aliases in SPLIT_WORDS.items() if split in (s, *aliases)), ())
    for candidate in (split, *words):
        if candidate in have:
            return candidate
    raise DataError(f"{name} has no split {split!r}; it has {', '.join(have)}.")


def _open_hub(name: str, split: str, subset: str | None) -> Source:
    import datasets

    try:
        data = datasets.load_dataset(name, name=subset)
    except Exception as error:  # the hub's own exceptions have no common base
        raise DataError(
            f"Cannot open the hub dataset {name!r} (subset {subset}): {type(error).__name__}: "
            f"{str(error).splitlines()[0]} There is no local file or folder of that name either. "
            f"Without a network: run `hf download --repo-type dataset {name} --local-dir DIR` on "
            "a machine that has one, copy DIR here and pass its path (with subset= if it has "
            "sub-folders). If HF_HUB_OFFLINE=1 is set, unset it to download."
        ) from error
    data = data[_named_split(list(data), split, name)]
    label = f"{name}/{subset}[{split}]" if subset else f"{name}[{split}]"
    return _from_datasets(data, [(0, label, None)])
