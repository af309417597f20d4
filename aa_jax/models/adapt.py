"""Adapters put on a model and merged into it, and models with quantised kernels."""

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from aa_jax.errors import ConfigError, ModelError
from aa_jax.models.functional import Model, Params
from aa_jax.models.lora import Lora, bound
from aa_jax.models.names import flatten, unflatten
from aa_jax.models.quantized import Quantization, dequantize
from aa_jax.models.variants import ADAPTER, Variant, linear_layers


def attach(
    model: Model,
    params: Params,
    *,
    rank: int | None = None,
    alpha: float | None = None,
    targets: Sequence[str] | None = None,
    rslora: bool = False,
    dropout: float = 0.0,
    full: Sequence[str] = (),
    path: str | os.PathLike[str] | None = None,
    seed: int = 0,
    shardings: Callable[[Model], Any] | None = None,
) -> tuple[Model, Params]:
    """The model with low-rank adapters (Hu et al., 2021), which alone train.

    The returned parameters hold the given arrays, not copies, and beside them the adapters in fp32:
    A uniform in ±1/sqrt(in), B zero, as PEFT draws them, so that at first the model is its base.

    Args:
        model: without adapters; its kernels may be quantised.
        params: its parameters.
        rank: r; default 8.
        alpha: the adapter's output is scaled by alpha / r; default 16.
        targets: linear layers that get an adapter: path globs such as "language_model/layers/*",
            or names as transformers and PEFT know them, such as "q_proj" (in every tower that has
            one). None: all of the language model's layers.
        rslora: scale by alpha / sqrt(r) (Kalajdzievski, 2023).
        dropout: must be 0.
        full: path globs of base parameters that train in full beside the adapters, e.g.
            "projector/*".
        path: a PEFT folder to continue from; it gives rank, alpha, targets, rslora and full, and
            what of them is also given must be the same.
        seed: of A.
        shardings: function of the model that gives the placement of its parameters.

    Raises:
        ConfigError: an option out of range, or targets that name no linear layer.
        CheckpointError: the PEFT folder is damaged, of another model, or of a kind of adapter that
            is not handled.
    """
    if model.variant.lora is not None:
        raise ConfigError("This model has adapters already; merge them first (adapt.dense).")
    if dropout:
        raise ConfigError(
            f"lora.dropout is {dropout}; only 0 is handled: a model here is a function of "
            "parameters and batch alone, so that results do not depend on micro-batches or on how "
            "often a layer is computed again. Use weight decay, a lower rank, or fewer steps."
        )
    if path is not None:
        from aa_jax.models import peft  # it needs this module to write a folder

        lora, fresh = peft.read(path, model)
        asked = {"rank": rank, "alpha": alpha, "rslora": rslora or None}
        if targets is not None:
            asked["targets"] = find_layers(model, targets, "lora.targets")
        if full:
            asked["full"] = _in_full(model, lora.layers, full)
        _check_stored(path, lora, asked)
    else:
        rank, alpha = 8 if rank is None else rank, 16.0 if alpha is None else alpha
        if rank < 1 or alpha <= 0:
            raise ConfigError(
                f"lora.rank is {rank} and lora.alpha {alpha}; rank must be at least 1 and alpha "
                "greater than 0."
            )
        layers = find_layers(model, targets, "lora.targets")
        lora, fresh = Lora(rank, float(alpha), layers, _in_full(model, layers, full), rslora), {}
    adapted = model.edit(dataclasses.replace(model.variant, lora=lora))
    if path is None:
        fresh = _first(flatten(adapted.abstract()), seed)
    places = flatten(shardings(adapted)) if shardings is not None else {}
    fresh = {name: jax.device_put(x, places.get(name)) for name, x in fresh.items()}
    return adapted, unflatten({**flatten(params), **fresh})


def _check_stored(path: Any, lora: Lora, asked: Mapping[str, Any]) -> None:
    stored = {**dataclasses.asdict(lora), "targets": lora.layers}
    for name, value in asked.items():
        if value is not None and value != stored[name]:
            raise ConfigError(
                f"lora.{name} is {value!r}, but the adapter in {path} has {stored[name]!r}; leave "
                "it out, or give the same, to continue that adapter."
            )


def _first(leaves: Mapping[str, Any], seed: int) -> dict[str, np.ndarray]:
    """Fresh adapters, drawn on the host: the same on every process, and nothing to compile."""
    fresh, rng = {}, np.random.default_rng(seed)
    for path, leaf in leaves.items():
        if path.endswith(ADAPTER):
            edge = bound(leaf.shape[-2]) if path.endswith(ADAPTER[0]) else 0.0
            fresh[path] = rng.uniform(-edge, edge, leaf.shape).astype(np.float32)
    return fresh


def base(params: Params) -> Params:
    """The parameters under the adapters, the same arrays: a reference that costs no memory.

    A model with adapters takes them as they are.
    """
    return unflatten({k: x for k, x in flatten(params).items() if not k.endswith(ADAPTER)})


def quantized(
    model: Model,
    *,
    kind: str = "nf4",
    block: int = 64,
    targets: Sequence[str] | None = None,
) -> Model:
    """The model with kernels stored in 4 or 8 bits; they do not train, adapters on them do.

    Args:
        model: a plain model.
        kind: "nf4" (Dettmers et al., 2023), "int8", or "none", which changes nothing.
        block: input features per scale, for nf4.
        targets: linear layers, as for `attach`. None: all of the language model's layers.

    Raises:
        ConfigError: an unknown kind, or targets that name no linear layer.
    """
    if kind == "none":
        return model
    layers = find_layers(model, targets, "quantize.targets")
    return model.edit(Variant(None, Quantization(kind, block), layers))


def plain(model: Model) -> Model:
    """The model without adapters and quantised kernels."""
    return model if model.variant == Variant() else model.edit(Variant())


def find_layers(model: Model, targets: Sequence[str] | None, what: str) -> tuple[str, ...]:
    """Paths of the linear layers that targets name, see `attach`.

    Raises:
        ConfigError: a target names none; lists them.
    """
    rules = linear_layers(model.names.for_leaves(flatten(plain(model).abstract())))
    if targets is None:
        return tuple(path for path in rules if _in_decoder(path))
    if isinstance(targets, str):
        targets = (targets,)
    chosen: set[str] = set()
    for target in targets:
        if "/" in target or "*" in target:
            found = {path for path in rules if fnmatchcase(path, target)}
        else:
            found = {
                path
                for path, rule in rules.items()
                if f".{rule.hf}".removesuffix(".weight").endswith(f".{target}")
            }
        if not found:
            known = sorted({r.hf.removesuffix(".weight").split(".")[-1] for r in rules.values()})
            raise ConfigError(
                f"{what} names {target!r}, which is no linear layer of this {model.family} model. "
                f"By path there are {', '.join(rules)}; by name {', '.join(known)}."
            )
        chosen |= found
    return tuple(path for path in rules if path in chosen)


def _in_decoder(path: str) -> bool:
    return path.removeprefix("language_model/").startswith("layers/")


def layer_of(path: str) -> str:
    """The path of the layer a leaf belongs to."""
    return path.removesuffix("/codes").removesuffix("/scales").rpartition("/")[0]


def _in_full(model: Model, layers: Sequence[str], globs: Sequence[str]) -> tuple[str, ...]:
    paths = flatten(model.abstract())
    chosen: set[str] = set()
    for glob in globs:
        found = {path for path in paths if fnmatchcase(path, glob)}
        if not found:
            raise ConfigError(
                f"lora.full names {glob!r}, which matches no parameter; write paths such as "
                f"{next(iter(paths))!r}, or a branch as 'branch/*'."
            )
        chosen |= found
    # PEFT stores a layer as adapted or as a whole, so its bias cannot train beside an adapter.
    taken = {*layers, *model.variant.quantized}
    if both := sorted(path for path in chosen if layer_of(path) in taken):
        raise ConfigError(
            f"lora.full names {', '.join(both[:3])}, whose layer has an adapter or is quantised; "
            "leave it out of lora.full, or its layer out of lora.targets and quantize.targets."
        )
    return tuple(path for path in paths if path in chosen)


@dataclasses.dataclass(frozen=True)
class Pending:
    """A leaf that is computed when it is needed, so that not all are in memory at once."""

    shape: tuple[int, ...]
    dtype: Any
    make: Callable[[], Array]


def dense(model: Model, params: Params) -> tuple[Model, Params]:
    """The plain model that computes the same: kernels dequantised, adapters merged in.

    Merged in fp32, layer by layer, and stored in the model's parameter type. A plain model is
    returned as it is.
    """
    target, lazy = pending(model, params)
    made = {k: x.make() if isinstance(x, Pending) else x for k, x in flatten(lazy).items()}
    return target, unflatten(made)


def pending(model: Model, params: Params) -> tuple[Model, Params]:
    """As `dense`, with `Pending` for every leaf that is to be computed."""
    target = plain(model)
    if target is model:
        return model, params
    flat, out = flatten(params), {}
    if unknown := sorted(flat.keys() ^ flatten(model.abstract()).keys()):
        raise ModelError(
            f"These are not the parameters of this {model.family} model with its adapters or "
            f"quantised kernels: they differ at {', '.join(unknown[:5])}."
        )
    for path, leaf in flatten(target.abstract()).items():
        layer = path.removesuffix("/kernel")
        parts = {
            name: flat[at]
            for name, at in {
                "kernel": path,
                "codes": f"{path}/codes",
                "scales": f"{path}/scales",
                "a": f"{layer}/lora/a",
                "b": f"{layer}/lora/b",
            }.items()
            if at in flat
        }
        if parts.keys() == {"kernel"}:
            out[path] = parts["kernel"]
            continue
        scale = model.variant.lora.scale if "a" in parts else 0.0
        out[path] = Pending(leaf.shape, leaf.dtype, _merger(parts, scale, leaf))
    return target, unflatten(out)


def _merger(parts: Mapping[str, Array], scale: float, leaf: Any) -> Callable[[], Array]:
    def one(parts: Mapping[str, Array]) -> Array:
        if "codes" in parts:
            wide = dequantize(parts["codes"], parts["scales"])
        else:
            wide = parts["kernel"].astype(jnp.float32)
        if "a" in parts:
            wide = wide + scale * jnp.matmul(parts["a"], parts["b"], precision="highest")
        return wide.astype(leaf.dtype)

    stacked = len(leaf.shape) == 3
    compute = jax.jit(lambda parts: jax.lax.map(one, parts) if stacked else one(parts))
    return lambda: compute(parts)
