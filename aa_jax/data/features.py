"""Features of a frozen tower on disk, one file per image, film or clip, and data that read them.

A file's name is the hash of what the tower would be given, so that a medium of many examples, runs
or datasets is computed and stored once.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import os
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes  # noqa: F401  numpy knows "bfloat16" by it
import numpy as np

from aa_jax.data.collate import Shapes, plan_shapes
from aa_jax.data.example import Example
from aa_jax.data.tokens import Encoded, Sizes
from aa_jax.errors import CheckpointError

Item = dict[str, np.ndarray]
FEATURES = "tower_features"  # what models read in the place of pixels or log-mel features
_ABANDONED = 600.0  # seconds after which nobody is still writing a partial file


def split_media(media: Mapping[str, np.ndarray], width: Callable[[int], int]) -> list[Item]:
    """An example's media one by one: all that decides the features of each, and nothing else.

    Args:
      media: of an `Encoded`.
      width: of a clip of so many frames, the frames that decide its features.

    Returns:
      "pixel_values" [3, H, W] each; with "grid_thw" [3] patches [N, K]; or "input_features"
      [mels, frames] with "feature_lengths" [].
    """
    if "input_features" in media:
        clips = zip(media["input_features"], media["feature_lengths"], strict=True)
        return [
            {"input_features": clip[:, : width(int(frames))], "feature_lengths": np.asarray(frames)}
            for clip, frames in clips
        ]
    if "grid_thw" in media:
        grids = media["grid_thw"]
        ends = np.cumsum([0, *(int(np.prod(grid)) for grid in grids)])
        return [
            {"pixel_values": media["pixel_values"][start:end], "grid_thw": grid}
            for grid, (start, end) in zip(grids, itertools.pairwise(ends), strict=True)
        ]
    return [{"pixel_values": image} for image in media.get("pixel_values", ())]


def content_key(item: Item) -> str:
    """The hash of a medium as the processor made it."""
    digest = hashlib.sha256()
    for name in sorted(item):
        array = np.asarray(item[name])
        digest.update(f"{name} {array.dtype.name} {array.shape} ".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


class FeatureStore:
    """Arrays in a folder under keys; a file is whole or it is not there.

    Each file is a line of JSON (shape, type, hash of the values) and the values. They appear under
    their names when they are complete, so a killed run leaves nothing but partial files, which the
    next one removes.

    Args:
      folder: of one tower's features.
      kind: what the files hold, the end of their names.

    Raises:
      CheckpointError: the folder cannot be written.
    """

    def __init__(self, folder: str | Path, kind: str = "features"):
        self.folder, self._kind = Path(folder), kind
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for partial in self.folder.glob("*/*.partial"):
                if time.time() - partial.stat().st_mtime > _ABANDONED:
                    partial.unlink(missing_ok=True)
        except OSError as error:
            raise self._unwritable(error) from error

    def path(self, key: str) -> Path:
        """Where a key's file is, or would be."""
        return self.folder / key[:2] / f"{key}.{self._kind}"

    def get(self, key: str) -> np.ndarray:
        """The stored array, checked against its hash.

        Raises:
          FileNotFoundError: it is not there.
          CheckpointError: it is not what was written.
        """
        file = self.path(key)
        data = file.read_bytes()
        line, _, values = data.partition(b"\n")
        try:
            head = json.loads(line)
            if head["sha256"] != hashlib.sha256(values).hexdigest() or head["key"] != key:
                raise ValueError("its values are not those that were written")
            return np.frombuffer(values, head["dtype"]).reshape(head["shape"])
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"{file} holds damaged features of a tower ({error}). Start the run again: it "
                "computes them anew before it trains. If that happens often, look at the disk."
            ) from error

    def put(self, key: str, features: np.ndarray) -> None:
        """Stores an array.

        Raises:
          CheckpointError: it cannot be written, e.g. the disk is full.
        """
        features = np.ascontiguousarray(features)
        values = features.tobytes()
        head = {
            "key": key,
            "shape": features.shape,
            "dtype": features.dtype.name,
            "sha256": hashlib.sha256(values).hexdigest(),
        }
        file = self.path(key)
        partial = file.with_name(f"{key}.{socket.gethostname()}.{os.getpid()}.partial")
        try:
            file.parent.mkdir(exist_ok=True)
            partial.write_bytes(json.dumps(head).encode() + b"\n" + values)
            partial.replace(file)
        except OSError as error:
            raise self._unwritable(error) from error

    def _unwritable(self, error: OSError) -> CheckpointError:
        return CheckpointError(
            f"the tower's features cannot be written to {self.folder} ({error}). Give "
            "train.tower_cache a folder with enough space, or leave it out."
        )


class Decoded:
    """What the media of examples were when they were last decoded, by the hash of their files.

    It spares a restart the decoding: of an example whose files it knows it has the content keys of
    its media, and the counts that say how their features are put together.

    Args:
      folder: of any number of data sets.
      data: encoded examples; without ``origin(index)`` nothing is known, and nothing kept.
      maker: all that decides what a file becomes.

    Raises:
      CheckpointError: the folder cannot be written.
    """

    def __init__(self, folder: str | Path, data: Any, maker: str):
        self._origin = getattr(data, "origin", None)
        self._store = None if self._origin is None else FeatureStore(folder, "json")
        self._maker = maker

    def origin(self, index: int) -> str | None:
        """The name of an example's media; None: it has none, or the data cannot say."""
        found = None if self._origin is None else self._origin(index)
        return found and hashlib.sha256(f"{self._maker} {found}".encode()).hexdigest()

    def get(self, origin: str | None) -> tuple[list[str], list[Item]] | None:
        """Content keys and counts of media; None where they must be decoded."""
        if origin is None:
            return None if self._origin is None else ([], [])
        try:
            entry = json.loads(bytes(self._store.get(origin)))
        except (FileNotFoundError, CheckpointError):  # all of it is in the files themselves
            return None
        counts = [
            {name: np.asarray(x, np.int32) for name, x in item.items()} for item in entry["counts"]
        ]
        return entry["keys"], counts

    def put(self, origin: str | None, keys: Sequence[str], counts: Sequence[Item]) -> None:
        """Keeps what media were."""
        if origin:
            plain = [{name: x.tolist() for name, x in item.items()} for item in counts]
            entry = json.dumps({"keys": list(keys), "counts": plain}).encode()
            self._store.put(origin, np.frombuffer(entry, np.uint8))


class Stored(NamedTuple):
    """An example's media in a store.

    Attributes:
      keys: of its media, in order.
      shapes: of the arrays `join` makes of them.
      frames: [A] of its clips, those that are not padding; None where media are no clips.
      patches: features stand end to end, as those of images of any size do.
    """

    keys: tuple[str, ...] = ()
    shapes: Mapping[str, tuple[int, ...]] = {}
    frames: np.ndarray | None = None
    patches: bool = False


class WithFeatures(Sequence):
    """Encoded data whose media are a tower's features instead of what the tower reads.

    Nothing is decoded: text and lengths come from the data, features from the store.

    Args:
      data: encoded examples by random access, with ``sizes`` and ``report``. ``bare(index)``, where
        there is one, is the example without its media.
      store: holds the features.
      stored: every example's media.
    """

    def __init__(self, data: Any, store: FeatureStore, stored: Sequence[Stored]):
        self._data, self._store, self._stored = data, store, stored
        self._bare = getattr(data, "bare", data.__getitem__)
        self.report = data.report

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, index: int) -> Encoded:
        item, stored = self._bare(index), self._stored[index]
        features = [self._store.get(key) for key in stored.keys]
        return dataclasses.replace(
            item,
            media=join(features, stored.frames, patches=stored.patches),
            media_shapes=stored.shapes,
            images=0, image_size=None, patches=0, patch_numbers=0,
        )  # fmt: skip

    def example(self, index: int, **options: Any) -> Example:
        """The Example behind an item, see the data's own."""
        return self._data.example(index, **options)

    @property
    def sizes(self) -> list[Sizes]:
        """Lengths of every example."""
        return [
            dataclasses.replace(
                size, media=stored.shapes, axes=3 if size.patches else size.axes,
                images=0, image_size=None, patches=0, patch_numbers=0,
            )
            for size, stored in zip(self._data.sizes, self._stored, strict=True)
        ]  # fmt: skip

    def shapes(self, layout: str, *, multiple_of: int = 8) -> Shapes:
        """The smallest batch shapes that hold every example."""
        return plan_shapes(self.sizes, layout, multiple_of=multiple_of)


def join(
    features: Sequence[np.ndarray], frames: np.ndarray | None, *, patches: bool
) -> dict[str, np.ndarray]:
    """An example's media arrays, fp32: of images [I, P, D], of patches [N, D] end to end, of clips
    [A, F, D], the shorter ones padded, with their ``frames`` [A]."""
    if not features:
        return {}
    if patches:
        return {FEATURES: np.concatenate(features).astype(np.float32)}
    most = max(len(x) for x in features)
    out = np.zeros((len(features), most, features[0].shape[1]), np.float32)
    for i, x in enumerate(features):
        out[i, : len(x)] = x
    return {FEATURES: out} if frames is None else {FEATURES: out, "feature_lengths": frames}
