"""PEFT folders in and out: adapter_config.json and adapter_model.safetensors.

What Hugging Face's `peft` writes is read strictly; what is written here it loads on the base model
with the same logits.
"""

import dataclasses
import json
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from aa_jax.errors import CheckpointError, ModelError
from aa_jax.models import safetensors
from aa_jax.models.adapt import layer_of, plain
from aa_jax.models.functional import Model, Params
from aa_jax.models.hf import check_target, whole, write_folder
from aa_jax.models.lora import Lora
from aa_jax.models.names import TRANSPOSE, Rule, flatten
from aa_jax.models.variants import ADAPTER, linear_layers

log = logging.getLogger(__name__)

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
ROOT = "base_model.model."
ENDS = (".lora_A.weight", ".lora_B.weight")

# Options of `LoraConfig` that change what an adapter computes, with the values that do not.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "alora_invocation_tokens": (None,),
    "alpha_pattern": ({}, None),
    "arrow_config": (None,),
    "bias": ("none", None),
    "fan_in_fan_out": (False, None),
    "layer_replication": (None,),
    "lora_bias": (False, None),
    "megatron_config": (None,),
    "rank_pattern": ({}, None),
    "target_parameters": (None, []),
    "trainable_token_indices": (None,),
    "use_bdlora": (None, False),
    "use_dora": (False, None),
    "use_qalora": (False, None),
}
# These begin from other base weights than the checkpoint's.
CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


def save(
    path: str | os.PathLike[str],
    model: Model,
    params: Params,
    *,
    base: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    finish: Callable[[Path], None] | None = None,
) -> None:
    """Writes a model's adapters as a folder that `peft` loads on the base model.

    Args:
        path: the new folder; it appears under its name only when it is complete.
        model: with adapters.
        params: its parameters.
        base: the checkpoint folder of the base model, as a note for `peft`.
        overwrite: replace an existing folder as a whole.
        finish: ``finish(folder)`` may add files before the folder appears.

    Raises:
        CheckpointError: the folder exists.
        ModelError: the model has no adapters.
    """
    lora = model.variant.lora
    if lora is None:
        raise ModelError(
            "This model has no adapters, so there is nothing PEFT could load; save it whole with "
            "models.save."
        )
    check_target(path, overwrite)
    leaves, rules = flatten(params), _rules(model)
    pieces = _pieces(model, lora, rules, leaves)

    def tensors() -> Iterator[tuple[str, np.ndarray]]:
        leaf, host = "", np.empty(0)
        for name, piece in pieces.items():
            if piece.leaf != leaf:
                leaf, host = piece.leaf, whole(leaves[piece.leaf])
            yield name, piece.transform.to_hf(host if piece.layer is None else host[piece.layer])

    specs = {
        name: (np.dtype(leaves[piece.leaf].dtype), piece.hf_shape(leaves[piece.leaf].shape))
        for name, piece in pieces.items()
    }

    def write(folder: Path) -> None:
        safetensors.write(folder / WEIGHTS, specs, tensors())
        config = _config(model, lora, rules, base)
        (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        if finish is not None:
            finish(folder)

    if jax.process_index() == 0:
        write_folder(path, write)
    else:
        for _ in tensors():  # takes part in the gathers, writes nothing
            pass


def read(path: str | os.PathLike[str], model: Model) -> tuple[Lora, dict[str, np.ndarray]]:
    """The adapters of a PEFT folder.

    Args:
        path: the folder.
        model: the base they belong to.

    Returns:
        What kind they are, and their leaves by path (with those of modules saved whole).

    Raises:
        CheckpointError: the folder is damaged, holds another kind of adapter, or belongs to
            another model; all differences are listed.
    """
    folder = Path(path)
    config = _read_config(folder)
    try:
        found = safetensors.read_header(folder / WEIGHTS)
    except (OSError, safetensors.BadFile) as error:
        raise CheckpointError(
            f"{folder / WEIGHTS} cannot be read ({error}); copy the folder again, or save it with "
            "safe_serialization=True."
        ) from error
    names, rules = model.names, _rules(model)
    shapes = {k: x.shape for k, x in flatten(plain(model).abstract()).items()}
    leaf_of = {hf: path for path, rule in rules.items() for hf in rule.hf_names(shapes[path])}
    if tied := _tied(model, rules):
        head, table = tied
        leaf_of[head] = leaf_of[table]
    adapted_layers, whole, problems = set(), set(), []
    entries: dict[str, safetensors.Entry] = {}
    for stored, entry in found.items():
        name = names.canonical(stored.removeprefix(ROOT))
        end = next((end for end in ENDS if name.endswith(end)), "")
        hf = name.removesuffix(end) + ".weight" if end else name
        if hf not in leaf_of:
            problems.append(f"{stored} {list(entry.shape)} belongs to no layer of the model")
            continue
        (adapted_layers if end else whole).add(leaf_of[hf])
        entries[_stored_name(model, hf, end)] = entry
    lora = Lora(
        config["r"],
        float(config["lora_alpha"]),
        tuple(path.removesuffix("/kernel") for path in rules if path in adapted_layers),
        tuple(path for path in rules if path in whole),
        bool(config.get("use_rslora")),
    )
    if wrong := sorted(adapted_layers - {f"{layer}/kernel" for layer in linear_layers(rules)}):
        problems.append(f"{', '.join(wrong)} is no linear layer")
        lora = dataclasses.replace(lora, layers=())
    held = {path for path in lora.full if layer_of(path) in model.variant.quantized}
    if held:
        problems.append(f"it trains {', '.join(sorted(held))}, whose layer is quantised here")
        lora = dataclasses.replace(lora, full=())
    adapted = flatten(model.edit(dataclasses.replace(model.variant, lora=lora)).abstract())
    expected = _pieces(model, lora, rules, adapted)
    problems += [f"{name} is missing" for name in expected if name not in entries]
    if tied := _tied(model, rules, lora):
        both = [entries.get(_stored_name(model, name, "")) for name in tied]
        if None in both or not np.array_equal(*(entry.read() for entry in both)):
            problems.append(
                f"{' and '.join(tied)} are one here, but two in it (peft keeps them one with "
                "ensure_weight_tying)"
            )
    problems += [
        f"{name} has shape {list(entries[name].shape)}, the model and r = {lora.rank} ask for "
        f"{list(piece.hf_shape(adapted[piece.leaf].shape))}"
        for name, piece in expected.items()
        if name in entries and entries[name].shape != piece.hf_shape(adapted[piece.leaf].shape)
    ]
    if problems or not adapted_layers:
        listed = "; ".join(problems[:5]) or "it holds no adapter"
        raise CheckpointError(
            f"{folder} does not fit this {model.family} model: {listed}"
            f"{f'; and {len(problems) - 5} more' if len(problems) > 5 else ''}. An adapter must "
            "belong to this base model and cover every layer of a stack."
        )
    hosts = {piece.leaf: np.empty(adapted[piece.leaf].shape, adapted[piece.leaf].dtype)
             for piece in expected.values()}  # fmt: skip
    for name, piece in expected.items():
        tensor = piece.transform.to_ours(entries[name].read())
        hosts[piece.leaf][... if piece.layer is None else piece.layer] = tensor
    if config.get("lora_dropout"):
        log.warning("%s was trained with lora_dropout; training goes on without.", folder)
    return lora, hosts


@dataclasses.dataclass(frozen=True)
class _Piece:
    """One stored tensor: a leaf, or one layer of it."""

    leaf: str
    layer: int | None
    transform: Any

    def hf_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(self.transform.hf_shape(shape if self.layer is None else shape[1:]))


def _rules(model: Model) -> dict[str, Rule]:
    return model.names.for_leaves(flatten(plain(model).abstract()))


def _pieces(
    model: Model, lora: Lora, rules: dict[str, Rule], leaves: dict[str, Any]
) -> dict[str, _Piece]:
    """Every tensor of the folder by its name."""
    pieces: dict[str, _Piece] = {}

    def add(leaf: str, rule: Rule, transform: Any, end: str = "") -> None:
        for layer, hf in enumerate(rule.hf_names(leaves[leaf].shape)):
            name = _stored_name(model, hf, end)
            pieces[name] = _Piece(leaf, layer if rule.stacked else None, transform)

    for layer in lora.layers:
        rule = rules[f"{layer}/kernel"]
        for leaf, end in zip(ADAPTER, ENDS, strict=True):
            add(layer + leaf, rule, TRANSPOSE, end)
    for path in _saved_whole(lora, rules):
        add(path, rules[path], rules[path].transform)
    if tied := _tied(model, rules, lora):
        head, table = tied
        pieces[_stored_name(model, head, "")] = pieces[_stored_name(model, table, "")]
    return pieces


def _tied(model: Model, rules: dict[str, Rule], lora: Lora | None = None) -> tuple[str, str] | None:
    """(head, embedding) names of a model that ties them; with ``lora`` only where they train in
    full: peft holds a copy of each, so both are stored, or its head would stay the base's."""
    pair = model.names.tied
    if pair is None or pair[0] in {rule.hf for rule in rules.values()}:
        return None
    if lora is not None and pair[1] not in {rules[path].hf for path in lora.full}:
        return None
    return pair


def _stored_name(model: Model, hf: str, end: str) -> str:
    name = ROOT + model.names.in_memory(hf)
    return name.removesuffix(".weight") + end if end else name


def _saved_whole(lora: Lora, rules: dict[str, Rule]) -> list[str]:
    """Leaves of the modules of which any leaf trains in full."""
    modules = {rules[path].hf.rpartition(".")[0] for path in lora.full}
    return [path for path, rule in rules.items() if rule.hf.rpartition(".")[0] in modules]


def _config(model: Model, lora: Lora, rules: dict[str, Rule], base: Any) -> dict[str, Any]:
    def module(path: str) -> str:
        return model.names.in_memory(rules[path].hf).rpartition(".")[0]

    patterns = [
        module(f"{layer}/kernel").replace(".", r"\.").replace("{layer}", r"\d+")
        for layer in lora.layers
    ]
    leaves = flatten(plain(model).abstract())
    whole = {
        model.names.in_memory(hf).rpartition(".")[0]
        for path in lora.full
        for hf in rules[path].hf_names(leaves[path].shape)
    }
    if tied := _tied(model, rules, lora):
        whole.add(model.names.in_memory(tied[0]).rpartition(".")[0])
    return {
        "peft_type": "LORA",
        "task_type": None if hasattr(model.config, "text") else "CAUSAL_LM",
        "base_model_name_or_path": None if base is None else str(base),
        "r": lora.rank,
        "lora_alpha": int(lora.alpha) if lora.alpha == int(lora.alpha) else lora.alpha,
        "use_rslora": lora.rslora,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
        "target_modules": "|".join(patterns),
        "modules_to_save": sorted(whole) or None,
        **({"ensure_weight_tying": True} if tied else {}),
    }


def _read_config(folder: Path) -> dict[str, Any]:
    file = folder / CONFIG
    try:
        config = json.loads(file.read_text())
        rank, alpha = config["r"], config["lora_alpha"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{file} cannot be read as the configuration of a LoRA adapter ({error!r}); give the "
            "folder that peft's save_pretrained, or a run here, wrote."
        ) from error
    wrong = [
        f"{name} = {config[name]!r}"
        for name, neutral in NEUTRAL.items()
        if name in config and config[name] not in neutral
    ]
    if config.get("peft_type") != "LORA":
        wrong.append(f"peft_type = {config.get('peft_type')!r}")
    if str(config.get("init_lora_weights")).lower().startswith(CHANGES_BASE):
        wrong.append(f"init_lora_weights = {config['init_lora_weights']!r}")
    if not isinstance(rank, int) or rank < 1 or not isinstance(alpha, int | float) or alpha <= 0:
        wrong.append(f"r = {rank!r} and lora_alpha = {alpha!r}")
    if wrong:
        raise CheckpointError(
            f"{file} has {', '.join(wrong)}, which is not handled; merge the adapter into its base "
            "with peft's merge_and_unload and load the merged folder."
        )
    return config
