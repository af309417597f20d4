"""The rule table: logical axis names of arrays to mesh axes, for parameters, their optimizer
state and activations alike."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from aa_jax.errors import ConfigError

Rules = Mapping[str, str | tuple[str, ...] | None]

# A mesh axis cuts an array once: where two dimensions ask for the same one (a projector from
# "vision_embed" to "embed"), the first keeps it.
RULES: Rules = {
    # parameters
    "vocab": "tensor",
    "embed": "fsdp",
    "mlp": "tensor",
    "heads": "tensor",
    "kv_heads": "tensor",
    "expert": "expert",
    "layers": None,
    "patch": None,
    "vision_embed": "fsdp",
    "vision_mlp": "tensor",
    "vision_heads": "tensor",
    # activations
    "batch": ("data", "fsdp"),
    "seq": "seq",
    "act_embed": None,
}


def shardings(axes_tree: Any, abstract_tree: Any, mesh: Mesh, rules: Rules = RULES) -> Any:
    """The sharding of every array of a tree.

    Args:
      axes_tree: The tree with a tuple of logical axis names (or None) per array, one per
        dimension, as ``model.axes()`` gives it.
      abstract_tree: The same tree with arrays or ``jax.ShapeDtypeStruct``.
      mesh: Device mesh.
      rules: Logical axis name -> mesh axis, several, or None for not divided.

    Returns:
      The tree with a ``NamedSharding`` per array.

    Raises:
      ConfigError: The trees differ, a logical axis has no rule, or a dimension does not divide.
    """
    axes = dict(_leaves(axes_tree, is_leaf=lambda node: isinstance(node, tuple)))
    arrays, treedef = jax.tree_util.tree_flatten_with_path(abstract_tree)
    paths = [path_name(path) for path, _ in arrays]
    if differing := sorted(set(axes) ^ set(paths)):
        raise ConfigError(
            f"the axis names and the arrays are not the same tree; they differ at "
            f"{', '.join(differing[:5])}. Give every array a tuple of axis names."
        )
    found = [
        NamedSharding(mesh, _spec(path, axes[path], leaf.shape, mesh, rules))
        for path, (_, leaf) in zip(paths, arrays, strict=True)
    ]
    return jax.tree.unflatten(treedef, found)


def optimizer_shardings(opt_state: Any, params: Any, param_shardings: Any) -> Any:
    """The sharding of every array of an optimizer state.

    A leaf whose path ends in a parameter's path and whose shape is that parameter's (a moment, a
    master copy) lies where the parameter lies; everything else (counts, factored moments) is on
    every device.

    Args:
      opt_state: Abstract optax state, ``jax.eval_shape(tx.init, params)``.
      params: Abstract parameters the state was made for.
      param_shardings: Their shardings, same tree.
    """
    places = dict(_leaves(param_shardings))
    if not places:
        raise ConfigError("an optimizer state needs at least one parameter")
    known = {path: (leaf.shape, places[path]) for path, leaf in _leaves(params)}
    everywhere = NamedSharding(next(iter(places.values())).mesh, P())

    def place(path: Any, leaf: Any) -> NamedSharding:
        parts = path_name(path).split("/")
        for start in range(len(parts)):  # the longest suffix first
            shape, sharding = known.get("/".join(parts[start:]), (None, None))
            if shape == leaf.shape:
                return sharding
        return everywhere

    return jax.tree_util.tree_map_with_path(place, opt_state)


HOST = "pinned_host"  # JAX's name of host memory that devices can read


def on_host(places: Any, tree: Any) -> Any:
    """The same shardings in the memory of the devices' host, but for scalars.

    Args:
      places: sharding per array.
      tree: the arrays, or their shapes.

    Raises:
      ConfigError: the platform has no host memory its devices can read, or does not tell (GPUs
        that are only compiled for: their plan would count the state as theirs).
    """
    leaves = jax.tree.leaves(places)
    device = leaves[0].mesh.devices.flat[0] if leaves else None
    if HOST not in (offered := _memories(device)):
        raise ConfigError(
            f"offload: these {device.platform} devices offer the memories {offered}, but no "
            f"{HOST!r} to hold optimizer state. Leave offload out; to save device memory use more "
            "fsdp, optim.moment_dtype='bfloat16' or LoRA."
        )
    return jax.tree.map(
        lambda place, x: place.with_memory_kind(HOST) if x.ndim else place, places, tree
    )


def on_device(tree: Any) -> Any:
    """Inside jit: arrays that lie in the host's memory, brought to where they are computed with."""

    def fetch(x: Any) -> Any:
        return jax.device_put(x, jax.memory.Space.Device) if in_host_memory(x) else x

    return jax.tree.map(fetch, tree)


def in_host_memory(x: Any) -> bool:
    """Whether an array, traced or not, lies in the host's memory."""
    return jax.typeof(x).memory_space != jax.memory.Space.Device


def _memories(device: Any) -> list[str]:
    try:
        return [memory.kind for memory in device.addressable_memories()]
    except (AttributeError, NotImplementedError, jax.errors.JaxRuntimeError):
        return []


def replicated(tree: Any, mesh: Mesh) -> Any:
    """The tree with the sharding "a copy on every device" per array."""
    return jax.tree.map(lambda _: NamedSharding(mesh, P()), tree)


def constrain(x: jax.Array, *axes: str | None, rules: Rules = RULES) -> jax.Array:
    """Pins an activation to the mesh the step runs on; without a mesh, does nothing.

    Args:
      x: Any array inside a jitted function.
      *axes: One logical axis name (or None) per dimension, e.g. "batch", "seq", "act_embed". A
        dimension the mesh does not divide (one row being sampled) is left to the compiler.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    spec = _spec("activation", axes, x.shape, mesh, rules, strict=False)
    return jax.lax.with_sharding_constraint(x, spec)


def whole(x: jax.Array, *axes: str | None, rules: Rules = RULES) -> jax.Array:
    """Gathers a parameter over the axis that only stores it, inside a jitted function.

    What is computed from it afterwards is computed on every device: for codes of a few bits that
    is less to send than the wide weights made of them.

    Args:
      x: The parameter.
      *axes: One logical axis name (or None) per dimension.
    """
    kept = (None if axis is not None and rules[axis] == "fsdp" else axis for axis in axes)
    return constrain(x, *kept, rules=rules)


def path_name(path: Sequence[Any]) -> str:
    """A tree path as text: keys, attributes and indices joined by "/"."""
    return jax.tree_util.keystr(tuple(path), simple=True, separator="/")


def _leaves(tree: Any, is_leaf: Any = None) -> list[tuple[str, Any]]:
    flat, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_leaf)
    return [(path_name(path), leaf) for path, leaf in flat]


def _spec(
    path: str,
    axes: Sequence[str | None],
    shape: Sequence[int],
    mesh: Any,
    rules: Rules,
    strict: bool = True,
) -> P:
    if len(axes) != len(shape):
        raise ConfigError(
            f"{path} has shape {tuple(shape)} but axis names {tuple(axes)}: "
            "give one name, or None, per dimension"
        )
    taken: set[str] = set()
    spec = []
    for dim, (name, size) in enumerate(zip(axes, shape, strict=True)):
        if name is not None and name not in rules:
            raise ConfigError(
                f"{path} names the logical axis {name!r}, for which there is no sharding rule; "
                f"rules exist for {', '.join(rules)}"
            )
        target = rules[name] if name is not None else None
        wanted = (target,) if isinstance(target, str) else target or ()
        if unknown := [axis for axis in wanted if axis not in mesh.shape]:
            raise ConfigError(
                f"the rule for {name!r} names the mesh axis {unknown[0]!r}; "
                f"the mesh has {', '.join(mesh.shape)}"
            )
        wanted = tuple(axis for axis in wanted if axis not in taken)
        pieces = math.prod(mesh.shape[axis] for axis in wanted)
        if size % pieces:
            if strict:
                raise ConfigError(_misfit(path, dim, name, size, wanted, pieces))
            spec.append(P.UNCONSTRAINED)
            continue
        taken.update(wanted)
        spec.append(wanted[0] if len(wanted) == 1 else wanted or None)
    return P(*spec)


def _misfit(path: str, dim: int, name: str, size: int, wanted: tuple, pieces: int) -> str:
    divisors = [n for n in range(1, size + 1) if size % n == 0]
    below = max(n for n in divisors if n <= pieces)
    above = [n for n in divisors if n > pieces][:1]
    fits = " or ".join(str(n) for n in [below, *above])
    down, up = size // pieces * pieces, -(-size // pieces) * pieces
    sizes = f"{down} or {up}" if down else f"{up}"
    return (
        f"{path}: dimension {dim} ({name!r}) has size {size}, which the mesh axis "
        f"{' x '.join(wanted)} = {pieces} does not divide. Nearest mesh sizes that work: {fits}; "
        f"nearest dimensions that work with {pieces}: {sizes}. "
        f"Or give {name!r} another rule."
    )
