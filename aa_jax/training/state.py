"""The train state: ``{"step", "params", "opt_state", "rng"}``, and which part of it trains.

Only the trainable part has gradients and optimizer state, and only it is donated to the step: the
frozen part may share its memory with the parameters of a reference model.
"""

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from aa_jax.errors import ConfigError
from aa_jax.sharding.rules import on_host, optimizer_shardings, path_name, replicated

Params = Mapping[str, Any]
TrainState = dict[str, Any]


def frozen_paths(params: Params, frozen: Sequence[str]) -> frozenset[str]:
    """The paths of the parameters that do not train.

    Args:
      params: Parameters, arrays or abstract.
      frozen: Globs over paths "a/b/c"; "*" also matches "/", so "vision_tower/*" is the tower.

    Raises:
      ConfigError: A glob matches nothing, or nothing is left to train.
    """
    paths = [path_name(path) for path, _ in jax.tree_util.tree_flatten_with_path(params)[0]]
    top = ", ".join(sorted({path.split("/")[0] for path in paths}))
    found: set[str] = set()
    for glob in frozen:
        matches = {path for path in paths if fnmatchcase(path, glob)}
        if not matches:
            raise ConfigError(
                f"frozen glob {glob!r} matches no parameter. Paths look like {paths[0]!r} and "
                f"start with: {top}. To freeze a whole branch write 'branch/*'."
            )
        found |= matches
    if len(found) == len(paths):
        raise ConfigError(
            f"every parameter is frozen by {list(frozen)}: nothing is left to train. "
            f"Paths start with: {top}."
        )
    return frozenset(found)


def split(params: Params, frozen: frozenset[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(trainable, frozen) nested dicts; a branch with nothing in it is left out."""

    def pick(node: Params, prefix: str, keep_frozen: bool) -> dict[str, Any]:
        out = {}
        for key, child in node.items():
            path = f"{prefix}{key}"
            if isinstance(child, Mapping):
                if branch := pick(child, path + "/", keep_frozen):
                    out[key] = branch
            elif (path in frozen) == keep_frozen:
                out[key] = child
        return out

    return pick(params, "", False), pick(params, "", True)


def merge(first: Params, second: Params) -> dict[str, Any]:
    """Puts back together what `split` took apart."""
    out = dict(first)
    for key, child in second.items():
        both = key in out and isinstance(child, Mapping)
        out[key] = merge(out[key], child) if both else child
    return out


def init_state(
    params: Params,
    tx: optax.GradientTransformation,
    *,
    mesh: Mesh,
    shardings: Any = None,
    frozen: Sequence[str] = (),
    seed: int = 0,
    copy: bool = True,
    offload: bool = False,
) -> TrainState:
    """A state at step 0, every array placed on the mesh.

    The trainable parameters are copied, so that `params` can go on serving as the reference;
    without the copy they are gone after the first step.

    Args:
      params: Nested dict of arrays (host or device).
      tx: Optimizer.
      mesh: Device mesh.
      shardings: Sharding per parameter, from ``sharding.shardings``; default: replicated.
      frozen: Globs of parameters that do not train, the same as the step's.
      seed: Seed of ``state["rng"]``, the key objectives with randomness draw from.
      copy: False saves the memory of a second set of trainable parameters.
      offload: keep the optimizer state in the host's memory; the step fetches it.
    """
    shardings = replicated(params, mesh) if shardings is None else shardings
    placed = jax.tree.map(lambda p, place: jax.device_put(p, place), dict(params), shardings)
    trainable, held = split(placed, frozen_paths(params, frozen))
    if copy:
        trainable = jax.tree.map(jnp.copy, trainable)
    places, _ = split(shardings, frozen_paths(params, frozen))
    opt_places = _optimizer_places(tx, trainable, places, offload)[1]
    everywhere = NamedSharding(mesh, P())
    return {
        "step": jax.device_put(np.int32(0), everywhere),
        "params": merge(trainable, held),
        "opt_state": jax.jit(tx.init, out_shardings=opt_places)(trainable),
        "rng": jax.device_put(np.asarray(jax.random.key_data(jax.random.key(seed))), everywhere),
    }


def abstract_state(
    params: Params,
    tx: optax.GradientTransformation,
    *,
    mesh: Mesh,
    shardings: Any = None,
    frozen: Sequence[str] = (),
    offload: bool = False,
) -> TrainState:
    """`init_state` in shapes only: what a checkpoint is restored into without making a state."""
    shardings = replicated(params, mesh) if shardings is None else shardings
    whole = jax.tree.map(_struct, dict(params), shardings)
    globs = frozen_paths(params, frozen)
    trainable, _ = split(whole, globs)
    opt, opt_places = _optimizer_places(tx, trainable, split(shardings, globs)[0], offload)
    everywhere = NamedSharding(mesh, P())
    key = jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0)))
    return {
        "step": jax.ShapeDtypeStruct((), jnp.int32, sharding=everywhere),
        "params": whole,
        "opt_state": jax.tree.map(_struct, opt, opt_places),
        "rng": _struct(key, everywhere),
    }


def _optimizer_places(tx: Any, trainable: Any, places: Any, offload: bool) -> tuple[Any, Any]:
    """(shapes, shardings) of the optimizer state."""
    state = jax.eval_shape(tx.init, trainable)
    found = optimizer_shardings(state, trainable, places)
    return state, on_host(found, state) if offload else found


def as_abstract(state: Any) -> Any:
    """Shapes, dtypes and shardings of a tree of device arrays."""
    return jax.tree.map(lambda x: _struct(x, x.sharding), state)


def _struct(x: Any, sharding: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
