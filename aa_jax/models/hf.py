"""Hugging Face checkpoint folders in and out: strict, tensor by tensor, bit exact."""

import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np

from aa_jax.errors import CheckpointError
from aa_jax.hosts import to_host
from aa_jax.models import safetensors
from aa_jax.models.adapt import Pending
from aa_jax.models.functional import Params, dtype_named
from aa_jax.models.names import Names, Rule, flatten, unflatten
from aa_jax.models.quantized import quantize_on_device
from aa_jax.models.variants import Variant

logger = logging.getLogger(__name__)

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
# Threads that read the layers of one leaf: one more than can compute, as one may wait for the disk.
READERS = min((os.cpu_count() or 1) + 1, 8)

# What a processor is made of; weights and the model's own config are written, never copied.
EXTRA_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "preprocessor_config.json",
    "processor_config.json",
    "image_processor_config.json",
    "video_preprocessor_config.json",
    "chat_template*",
    "generation_config.json",
)


@runtime_checkable
class Stored(Protocol):
    """What reading and writing need to know: a `Model`, or a part that has a folder of its own."""

    family: str
    hf_config: dict[str, Any]
    names: Names
    abstract: Callable[[], Params]


def read_config(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The decoded config.json of a checkpoint folder.

    Raises:
        CheckpointError: there is no such folder or file, or it is not JSON.
    """
    folder = Path(path)
    file = folder / "config.json"
    if not folder.is_dir():
        raise CheckpointError(
            f"{folder} is not a folder; give the local folder of a checkpoint (config.json and "
            "*.safetensors), e.g. one fetched with `hf download`."
        )
    try:
        config = json.loads(file.read_text())
    except FileNotFoundError:
        raise CheckpointError(
            f"{folder} has no config.json, so the architecture is unknown; copy it from the "
            "checkpoint's origin."
        ) from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} is not valid JSON ({error}); fetch it again.") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{file} does not hold a JSON object; fetch it again.")
    return config


def read_params(
    path: str | os.PathLike[str],
    model: Stored,
    shardings: Any = None,
    variant: Variant | None = None,
) -> Params:
    """The parameters of a checkpoint folder, checked against the model before any is read.

    Each leaf is assembled on the host, moved to its devices and forgotten, so the host never
    holds more than one leaf beside the finished ones.

    Args:
        path: folder with model.safetensors, or shards with model.safetensors.index.json.
        model: what the tensors must fill, a plain model; gives names, shapes and the stored type.
        shardings: tree of `jax.sharding.Sharding` like the parameters returned; None leaves
            placement to jax.
        variant: says which kernels to quantise as they are read.

    Raises:
        CheckpointError: one message with every unmapped tensor, unfilled parameter, wrong shape
            and unreadable file.
    """
    folder = Path(path)
    problems: list[str] = []
    found = _find(folder, model, problems)
    leaves = flatten(model.abstract())
    rules = model.names.for_leaves(leaves)
    # Files that cannot be read would make all of their tensors missing ones.
    tied = None if problems else _match(found, leaves, rules, model, problems)
    if problems:
        raise CheckpointError(
            f"{folder} does not match its config.json ({model.family}):\n  - "
            + "\n  - ".join(problems)
            + "\nNothing was loaded. Check that config.json belongs to these weights and that "
            "every file arrived whole."
        )
    if tied is not None:
        _check_tied(found, *tied)
    placed = flatten(shardings) if shardings is not None else {}
    few_bits = {f"{layer}/kernel" for layer in variant.quantized} if variant else set()
    params: dict[str, jax.Array] = {}
    for name, leaf in leaves.items():
        if name in few_bits:
            parts = _quantized_leaf(found, rules[name], leaf, variant)
            made = {f"{name}/{part}": array for part, array in parts.items()}
        else:
            made = {name: _host_leaf(found, rules[name], leaf)}
        params |= {path: _place(host, placed.get(path)) for path, host in made.items()}
    return unflatten(params)


def _find(folder: Path, model: Stored, problems: list[str]) -> dict[str, safetensors.Entry]:
    """Every stored tensor under its canonical name, buffers left out."""
    index: dict[str, str] = {}
    names = [WEIGHTS]
    if not (folder / WEIGHTS).exists():
        if not (folder / INDEX).exists():
            kept = sorted(p.name for p in folder.iterdir())
            problems.append(
                f"neither {WEIGHTS} nor {INDEX} is there, only {', '.join(kept)}; weights in "
                "another format must be converted to safetensors first"
            )
            return {}
        try:
            index = json.loads((folder / INDEX).read_text())["weight_map"]
            names = sorted(set(index.values()))
            if not names or not all(isinstance(name, str) for name in names):
                raise ValueError("its weight_map does not map tensors to files")
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            problems.append(f"{INDEX} is damaged ({error!r})")
            return {}
    found: dict[str, safetensors.Entry] = {}
    for name in names:
        file = folder / name
        if not file.is_file():
            where = f"named in {INDEX} but missing" if index else "no file"
            problems.append(f"{name or 'a file without a name'} is {where}")
            continue
        try:
            entries = safetensors.read_header(file)
        except safetensors.BadFile as error:
            problems.append(f"{name} {error}")
            continue
        problems += [
            f"{tensor} is in {name} says {INDEX}, but it is not"
            for tensor, file in index.items()
            if file == name and tensor not in entries
        ]
        for stored, entry in entries.items():
            canonical = model.names.canonical(stored)
            if model.names.is_buffer(canonical):
                continue
            if canonical in found:
                problems.append(f"{stored} in {name} is stored twice (in {found[canonical].file})")
            found[canonical] = entry
    return found


def _match(
    found: dict[str, safetensors.Entry],
    leaves: dict[str, Any],
    rules: dict[str, Rule],
    model: Stored,
    problems: list[str],
) -> tuple[str, str] | None:
    """Notes every difference between the stored and the expected tensors.

    Returns:
        The (head, embedding) names when a tied model's file also stores its head.
    """
    expected = {
        hf: (path, rule.hf_shape(leaves[path].shape))
        for path, rule in rules.items()
        for hf in rule.hf_names(leaves[path].shape)
    }
    unmapped = set(found) - set(expected)
    tied = model.names.tied
    tied = tied if tied is not None and tied[0] in unmapped and tied[1] in found else None
    for name in sorted(unmapped - set(tied or ())):
        entry = found[name]
        problems.append(
            f"{name} {list(entry.shape)} in {entry.file.name} belongs to no parameter of the model"
        )
    for name in sorted(set(expected) - set(found)):
        path, shape = expected[name]
        problems.append(f"{name} {list(shape)} (our {path}) is in no file")
    for name in sorted(set(expected) & set(found)):
        entry, (path, shape) = found[name], expected[name]
        if entry.shape != shape:
            problems.append(
                f"{name} in {entry.file.name} has shape {list(entry.shape)}, the config asks for "
                f"{list(shape)} (our {path})"
            )
        if entry.dtype not in safetensors.FLOATS:
            problems.append(
                f"{name} in {entry.file.name} is stored as {entry.dtype}; only unquantised "
                f"weights ({', '.join(safetensors.FLOATS)}) are read"
            )
    return tied


def _check_tied(found: dict[str, safetensors.Entry], head: str, embedding: str) -> None:
    if not np.array_equal(found[head].read(), found[embedding].read()):
        raise CheckpointError(
            f"config.json ties the output head to the embedding, but {head} in "
            f"{found[head].file.name} differs from {embedding}; set tie_word_embeddings to false "
            "to keep both, or remove the stored head."
        )


def _host_leaf(found: dict[str, safetensors.Entry], rule: Rule, leaf: Any) -> np.ndarray:
    names = rule.hf_names(leaf.shape)
    host = safetensors.aligned(leaf.shape, leaf.dtype)
    layers = host if rule.stacked else host[None]

    def read(layer: int) -> None:
        safetensors.fill(layers[layer], rule.transform.to_ours(found[names[layer]].read()))

    # Copies let go of the interpreter's lock, and reads wait for the disk.
    with ThreadPoolExecutor(min(len(names), READERS)) as pool:
        list(pool.map(read, range(len(names))))
    return host


def _quantized_leaf(
    found: dict[str, safetensors.Entry], rule: Rule, leaf: Any, variant: Variant
) -> dict[str, np.ndarray]:
    """Codes and scales of a kernel, one layer at a time, from the values as stored."""
    parts = [
        quantize_on_device(np.asarray(rule.transform.to_ours(found[name].read())),
                           variant.quantization)
        for name in rule.hf_names(leaf.shape)
    ]  # fmt: skip
    codes, scales = (np.stack(list(map(np.asarray, side))) for side in zip(*parts, strict=True))
    made = {"codes": codes, "scales": scales}
    return made if rule.stacked else {part: array[0] for part, array in made.items()}


def _place(host: np.ndarray, sharding: Any) -> jax.Array:
    if sharding is None:
        return jax.device_put(host)
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])


def whole(leaf: Any) -> np.ndarray:
    """A leaf as a host array; one that waits to be made is made now."""
    return to_host(leaf.make() if isinstance(leaf, Pending) else leaf)


def write_checkpoint(
    path: str | os.PathLike[str],
    model: Stored,
    params: Params,
    *,
    extra_files_from: str | os.PathLike[str] | None = None,
    dtype: str | None = None,
    overwrite: bool = False,
    finish: Callable[[Path], None] | None = None,
) -> None:
    """See `aa_jax.models.save`; ``finish(folder)`` may add files before the folder appears."""
    leaves, expected = flatten(params), flatten(model.abstract())
    wrong = sorted(leaves.keys() ^ expected.keys()) + [
        f"{name} {list(leaves[name].shape)}, expected {list(leaf.shape)}"
        for name, leaf in expected.items()
        if name in leaves and leaves[name].shape != leaf.shape
    ]
    if wrong:
        raise CheckpointError(
            f"These parameters are not those of the {model.family} model being saved; they differ "
            f"in: {'; '.join(wrong)}."
        )
    check_target(path, overwrite)
    rules = model.names.for_leaves(expected)
    stored = None if dtype is None else np.dtype(dtype_named("dtype", dtype))
    specs = {
        hf: (stored or np.dtype(leaves[name].dtype), rule.hf_shape(leaves[name].shape))
        for name, rule in rules.items()
        for hf in rule.hf_names(leaves[name].shape)
    }

    def tensors() -> Iterator[tuple[str, np.ndarray]]:
        for name, rule in rules.items():
            host = whole(leaves[name])
            host = host if stored is None else host.astype(stored)
            layers = host if rule.stacked else [host]
            for hf, layer in zip(rule.hf_names(host.shape), layers, strict=True):
                yield hf, rule.transform.to_hf(layer)

    def write(folder: Path) -> None:
        safetensors.write(folder / WEIGHTS, specs, tensors())
        kinds = {np.dtype(d).name for d, _ in specs.values()}
        config = dict(model.hf_config)
        config.pop("torch_dtype", None)
        config["dtype"] = kinds.pop() if len(kinds) == 1 else "float32"
        (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        if extra_files_from is not None:
            copy_extra_files(Path(extra_files_from), folder)
        if finish is not None:
            finish(folder)

    if jax.process_index() != 0:
        for _ in tensors():  # takes part in the gathers, writes nothing
            pass
        return
    write_folder(path, write)
    logger.info("wrote %d tensors to %s", len(specs), path)


def check_target(path: str | os.PathLike[str], overwrite: bool) -> None:
    """Raises CheckpointError where a folder must not be replaced."""
    target = Path(path)
    if target.exists() and not overwrite and (not target.is_dir() or any(target.iterdir())):
        raise CheckpointError(
            f"{target} exists and is not empty; choose a new folder, or pass overwrite=True to "
            "replace it as a whole."
        )


def write_folder(path: str | os.PathLike[str], write: Callable[[Path], None]) -> None:
    """Fills a folder with ``write(folder)``; it appears under its name only when it is complete."""
    # What is copied is read before anything is replaced: it may lie in the folder being replaced.
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}-"))
    try:
        made.chmod(0o755)
        write(made)
        _replace(made, target)
    except BaseException:
        shutil.rmtree(made, ignore_errors=True)
        raise


def copy_extra_files(source: Path, target: Path) -> None:
    """Copies tokenizer and processor files between checkpoint folders.

    Raises:
        CheckpointError: the source holds none.
    """
    files = sorted({f for pattern in EXTRA_FILES for f in source.glob(pattern) if f.is_file()})
    if not files:
        raise CheckpointError(
            f"{source} holds no tokenizer or processor files to copy; give the folder the model "
            "was loaded from, or leave extra_files_from out."
        )
    for file in files:
        shutil.copyfile(file, target / file.name)


def _replace(made: Path, target: Path) -> None:
    """Puts a finished folder in place; an interruption leaves the old or the new one whole."""
    old = None
    if target.exists():
        old = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}-old-"))
        os.replace(target, old / target.name)
    os.replace(made, target)
    if old is not None:
        shutil.rmtree(old)
