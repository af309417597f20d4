"""A frozen tower's features computed before training and kept on disk, see `aa_jax.data.features`.

During training the tower then neither runs nor are its pixels decoded.
"""

import hashlib
import json
import logging
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import numpy as np

from aa_jax import hosts
from aa_jax.data.features import (
    FEATURES,
    Decoded,
    FeatureStore,
    Item,
    Stored,
    WithFeatures,
    content_key,
    split_media,
)
from aa_jax.data.processor import Processor
from aa_jax.errors import CheckpointError, ConfigError
from aa_jax.models import Model
from aa_jax.models.names import flatten
from aa_jax.models.whisper.modeling import pooled_length
from aa_jax.sharding import batch_devices, put_batch
from aa_jax.training.state import frozen_paths

log = logging.getLogger(__name__)

FORMAT = 1  # of the features and keys; a change leaves what is stored unread
# What of a config.json says nothing about the tower.
_ELSEWHERE = ("text_config", "architectures", "dtype", "torch_dtype", "transformers_version",
              "_name_or_path")  # fmt: skip
_COUNTS = ("feature_lengths", "grid_thw")
_DECODERS = ("pillow", "av", "soundfile", "soxr", "numpy")


def computed_ahead(
    model: Model,
    params: Mapping[str, Any],
    data: Any,
    *,
    processor: Processor,
    frozen: Sequence[str],
    folder: str | Path,
    mesh: jax.sharding.Mesh,
    batch_rows: int,
    threads: int = 0,
) -> WithFeatures:
    """The data with its media encoded; what the folder does not hold is computed and stored.

    Every process reads all of the data once. What a killed run has stored is not computed again,
    and files that were decoded before are only read, to see that they are the same.

    Args:
      model: the architecture.
      params: its parameters, not a score model's.
      data: encoded examples.
      processor: the model's.
      frozen: globs of the parameters that do not train; the tower must be among them.
      folder: of any number of towers' features.
      mesh: device mesh.
      batch_rows: images, films or clips at a time.
      threads: that decode.

    Raises:
      ConfigError: the model has no tower, or it trains.
      CheckpointError: the folder cannot be written.
    """
    _check(model, params, frozen)
    key = tower_key(model, params)
    store = FeatureStore(Path(folder) / key[:16])
    started = time.perf_counter()
    encoder = _Encoder(model, params, store, mesh, batch_rows, processor)
    known = Decoded(Path(folder) / "decoded", data, _maker(processor))
    found, decoded = [], 0
    few = max(batch_rows, threads)
    with ThreadPoolExecutor(max(threads, 1)) as pool:
        for start in range(0, len(data), few):
            indices = range(start, min(start + few, len(data)))
            origins = dict(zip(indices, pool.map(known.origin, indices), strict=True))
            media = {i: known.get(origins[i]) for i in indices}
            fresh = [i for i in indices if media[i] is None or not encoder.has(media[i][0])]
            # Processes may have folders of their own, and run the tower together all the same.
            fresh = sorted(set().union(*map(set, hosts.gather(fresh))))
            for i in set(indices) - set(fresh):
                encoder.take(media[i][0])
            decoded += len(fresh)
            items = pool.map(lambda i: split_media(data[i].media, encoder.width), fresh)
            for i, made in zip(fresh, items, strict=True):
                keys = [content_key(item) for item in made]
                encoder.want(keys, made)
                # What says how features are put together, without the signals.
                counts = [{k: np.asarray(v) for k, v in x.items() if k in _COUNTS} for x in made]
                media[i] = (keys, counts)
                known.put(origins[i], keys, counts)
            encoder.compute()
            found += [media[i] for i in indices]
    encoder.compute(rest=True)
    log.info(
        "%d media of %d examples, %d of them decoded: features of %d computed in %.1f s, of %d "
        "found in %s",
        sum(len(keys) for keys, _ in found), len(data), decoded, encoder.computed,
        time.perf_counter() - started, len(encoder.shapes) - encoder.computed, store.folder,
    )  # fmt: skip
    return WithFeatures(data, store, [_stored(*media, encoder.shapes) for media in found])


def tower_key(model: Model, params: Mapping[str, Any]) -> str:
    """The hash of all that decides a tower's features but the media."""
    config = {k: v for k, v in model.hf_config.items() if k not in _ELSEWHERE}
    digest = hashlib.sha256(f"{FORMAT} {model.family} {model.dtype}".encode())
    digest.update(json.dumps(config, sort_keys=True, default=str).encode())
    for path, leaf in sorted(flatten(params[model.tower]).items()):
        array = hosts.to_host(leaf)
        digest.update(f"{path} {array.dtype} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def _check(model: Model, params: Mapping[str, Any], frozen: Sequence[str]) -> None:
    if model.tower is None:
        raise ConfigError(
            f"train.tower_cache keeps a tower's features, but a {model.family} model has no tower "
            "that runs in training (a Chameleon's images are tokens by then): leave it out."
        )
    held = frozen_paths(params, frozen)
    paths = [f"{model.tower}/{path}" for path in flatten(params[model.tower])]
    if trained := [path for path in paths if path not in held]:
        raise ConfigError(
            f"train.tower_cache keeps the features of {model.tower}, but {len(trained)} of its "
            f"{len(paths)} parameters train ({trained[0]}, ...), so they would be stale after the "
            f"first update. Freeze the tower, train.frozen=('{model.tower}/*',), and give adapters "
            "other targets, or leave train.tower_cache out."
        )


def _maker(processor: Processor) -> str:
    """All that decides what the tower is given of a file."""
    made = [x and x.to_dict() for x in (processor.image_processor, processor.audio_processor)]
    video = getattr(processor.image_processor, "video", None)
    versions = {name: metadata.version(name) for name in _DECODERS}
    return json.dumps([FORMAT, made, str(video), processor.patch_size, versions], sort_keys=True)


class _Encoder:
    """Collects media that are not stored, and runs the tower on full batches of one shape."""

    def __init__(
        self, model: Model, params: Any, store: FeatureStore, mesh: Any, rows: int, processor: Any
    ):
        self.store, self._mesh, self._params = store, mesh, params
        self._run = jax.jit(model.tower_features)
        self._rows = -(-rows // batch_devices(mesh)) * batch_devices(mesh)
        self._audio = processor.audio_processor
        self._new: dict[str, Item] = {}
        self._held: dict[str, tuple[int, ...]] = {}
        self._waiting: dict[tuple, dict[str, Item]] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.computed = 0

    def width(self, frames: int) -> int:
        """Frames of a clip that decide its features."""
        return self._audio.width(frames)

    def want(self, keys: Sequence[str], items: Sequence[Item]) -> None:
        """Asks for features of media."""
        for key, item in zip(keys, items, strict=True):
            if key not in self.shapes and key not in self._new:
                self._new[key] = item

    def has(self, keys: Sequence[str]) -> bool:
        """Whether this process finds the features of media."""
        for key in keys:
            if key not in self.shapes and key not in self._held:
                shape = self._find(key)
                if shape is None:
                    return False
                self._held[key] = shape
        return True

    def take(self, keys: Sequence[str]) -> None:
        """Media that every process found."""
        for key in keys:
            self.shapes.setdefault(key, self._held.get(key))

    def compute(self, *, rest: bool = False) -> None:
        """Looks for what was asked for, and computes what fills batches; all of the rest too."""
        found = {key: self._find(key) for key in self._new}
        self.shapes |= {key: shape for key, shape in found.items() if shape is not None}
        absent = [key for key, shape in found.items() if shape is None]
        # Processes may have folders of their own, and run the tower together all the same.
        absent = set().union(*map(set, hosts.gather(absent)))
        for key in [key for key in self._new if key in absent]:
            item = self._padded(self._new[key])
            shape = tuple((name, x.shape) for name, x in item.items())
            # Asked for again by none, whoever of the processes has it.
            self.shapes.setdefault(key, ())
            self._waiting.setdefault(shape, {})[key] = self._new[key]
        self._new = {}
        for waiting in self._waiting.values():
            while len(waiting) >= self._rows or (rest and waiting):
                some = {key: waiting.pop(key) for key in list(waiting)[: self._rows]}
                self._batch(some)

    def _find(self, key: str) -> tuple[int, ...] | None:
        try:
            return self.store.get(key).shape
        except FileNotFoundError:
            return None
        except CheckpointError as error:
            log.warning("%s; computing them again.", str(error).partition(". ")[0])
            self.store.path(key).unlink(missing_ok=True)
            return None

    def _padded(self, item: Item) -> Item:
        """Clips and patches of one of few sizes, so that few programs are compiled."""
        item = {name: np.asarray(x) for name, x in item.items()}
        if self._audio is not None:
            clip = item["input_features"]
            most = min(_round(clip.shape[1]), self._audio.frames)
            return item | {"input_features": np.pad(clip, ((0, 0), (0, most - clip.shape[1])))}
        if "grid_thw" in item:
            patches = item["pixel_values"]
            more = _round(len(patches)) - len(patches)
            return item | {"pixel_values": np.pad(patches, ((0, more), (0, 0)))}
        return item

    def _batch(self, items: Mapping[str, Item]) -> None:
        padded = [self._padded(item) for item in items.values()]
        media = {}
        for name in padded[0]:
            # Patches of an item are a row's; images and clips are one of a row's.
            stacked = np.stack([item[name] for item in padded])
            alone = name == "pixel_values" and "grid_thw" in padded[0]
            stacked = stacked if alone else stacked[:, None]
            room = np.zeros((self._rows - len(padded), *stacked.shape[1:]), stacked.dtype)
            media[name] = np.concatenate([stacked, room])
        made = hosts.to_host(self._run(self._params, put_batch(media, self._mesh)))
        counts = None
        if "feature_lengths" in media:
            counts = np.asarray(pooled_length(jax.numpy.asarray(media["feature_lengths"])))[:, 0]
        features = {}
        for row, (key, item) in enumerate(items.items()):
            if "grid_thw" in item:
                features[key] = made[row][: len(item["pixel_values"])]
            else:
                features[key] = made[row, 0] if counts is None else made[row, 0][: counts[row]]
        self.computed += len(features)
        # Processes that share a folder divide the writing; those that do not write all of it.
        for number, (key, array) in enumerate(features.items()):
            if number % hosts.count() == hosts.index():
                self.store.put(key, array)
        hosts.barrier("tower features")
        for key, array in features.items():
            self.shapes[key] = array.shape
            if not self.store.path(key).exists():
                self.store.put(key, array)


def _round(count: int) -> int:
    """The next of 8, 12, 16, 24, 32, 48, ...: at most half as much again."""
    size = 8
    while size < count:
        size = size * 3 // 2 if size & (size - 1) == 0 else size * 4 // 3
    return size


def _stored(
    keys: Sequence[str], items: Sequence[Item], shapes: Mapping[str, tuple[int, ...]]
) -> Stored:
    """What an example's media are, given the shapes of each one's features [n, D]."""
    if not keys:
        return Stored()
    sizes = [shapes[key] for key in keys]
    count, width = len(keys), sizes[0][1]
    most = max(size[0] for size in sizes)
    if "feature_lengths" in items[0]:
        frames = np.asarray([item["feature_lengths"] for item in items], np.int32)
        wide = {FEATURES: (count, most, width), "feature_lengths": (count,)}
        return Stored(tuple(keys), wide, frames)
    if "grid_thw" in items[0]:
        return Stored(tuple(keys), {FEATURES: (sum(n for n, _ in sizes), width)}, patches=True)
    return Stored(tuple(keys), {FEATURES: (count, most, width)})
