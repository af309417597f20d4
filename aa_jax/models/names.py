"""One table per family says how a checkpoint's tensors and our parameter tree correspond.

The same `Rule` rows serve import, export and the logical axes of `Model.axes`.
"""

import dataclasses
import re
from typing import Any, Protocol

import numpy as np

from aa_jax.errors import ModelError

Axes = tuple[str | None, ...]


class Transform(Protocol):
    """A bit-exact, invertible change of layout of one layer's tensor."""

    def to_ours(self, tensor: np.ndarray) -> np.ndarray: ...

    def to_hf(self, leaf: np.ndarray) -> np.ndarray: ...

    def hf_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]: ...


class Same:
    """The tensor as it is."""

    def to_ours(self, tensor: np.ndarray) -> np.ndarray:
        return tensor

    def to_hf(self, leaf: np.ndarray) -> np.ndarray:
        return leaf

    def hf_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return shape


class Transpose:
    """torch's Linear weight [out, in] and our kernel [in, out]."""

    def to_ours(self, tensor: np.ndarray) -> np.ndarray:
        return tensor.T

    def to_hf(self, leaf: np.ndarray) -> np.ndarray:
        return leaf.T

    def hf_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return shape[::-1]


@dataclasses.dataclass(frozen=True)
class PatchConv:
    """A stride = kernel convolution [D, C, p, p] and our matmul kernel [C*p*p, D].

    With ``frames`` the convolution spans that many frames too: [D, C, frames, p, p].
    """

    channels: int
    patch: int
    frames: int | None = None

    def to_ours(self, tensor: np.ndarray) -> np.ndarray:
        return tensor.reshape(tensor.shape[0], -1).T

    def to_hf(self, leaf: np.ndarray) -> np.ndarray:
        return leaf.T.reshape(self.hf_shape(leaf.shape))

    def hf_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        frames = () if self.frames is None else (self.frames,)
        return (shape[-1], self.channels, *frames, self.patch, self.patch)


SAME, TRANSPOSE = Same(), Transpose()


@dataclasses.dataclass(frozen=True)
class Rule:
    """One tensor, or one per layer.

    Attributes:
        hf: name in the checkpoint; "{layer}" marks tensors stacked on our leading axis.
        path: our leaf, keys joined by "/".
        transform: change of layout, per layer.
        axes: logical axis names of one layer's leaf ("layers" is added for a stack).
    """

    hf: str
    path: str
    transform: Any
    axes: Axes

    def under(self, hf: str, path: str) -> "Rule":
        """The same rule below a prefix on both sides."""
        return dataclasses.replace(self, hf=hf + self.hf, path=path + self.path)

    @property
    def stacked(self) -> bool:
        """Whether each layer has its own tensor."""
        return "{layer}" in self.hf

    @property
    def all_axes(self) -> Axes:
        """Axes of the whole leaf."""
        return ("layers", *self.axes) if self.stacked else self.axes

    def hf_names(self, shape: tuple[int, ...]) -> list[str]:
        """Checkpoint names that make up a leaf of ``shape``, in layer order."""
        if not self.stacked:
            return [self.hf]
        return [self.hf.format(layer=layer) for layer in range(shape[0])]

    def hf_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of each of those tensors."""
        return self.transform.hf_shape(shape[1:] if self.stacked else shape)


@dataclasses.dataclass(frozen=True)
class Names:
    """A family's table.

    Attributes:
        rules: every tensor the architecture may have; those whose leaf the config leaves out
            (biases, a tied head) do not apply.
        layouts: (pattern, replacement) pairs that turn other known layouts into the rules' names.
        buffers: patterns of stored tensors that are computed here and may be skipped.
        tied: (head, embedding) names: a stored head of a tied model must equal the embedding.
        modules: (pattern, replacement) pairs that turn the rules' names into those of the modules
            of transformers' class in memory, where these differ; adapters are stored under them.
    """

    rules: tuple[Rule, ...]
    layouts: tuple[tuple[str, str], ...] = ()
    buffers: tuple[str, ...] = ()
    tied: tuple[str, str] | None = None
    modules: tuple[tuple[str, str], ...] = ()

    def under(self, hf: str, path: str) -> "Names":
        """The same table below a prefix on both sides (layouts stay with their own root)."""
        return Names(
            rules=tuple(rule.under(hf, path) for rule in self.rules),
            buffers=tuple(re.escape(hf) + pattern for pattern in self.buffers),
            tied=None if self.tied is None else (hf + self.tied[0], hf + self.tied[1]),
        )

    def canonical(self, name: str) -> str:
        """A stored name in the layout the rules use."""
        for pattern, replacement in self.layouts:
            name = re.sub("^" + pattern, replacement, name)
        return name

    def in_memory(self, name: str) -> str:
        """A rule's name as transformers' class in memory has it."""
        for pattern, replacement in self.modules:
            name, changed = re.subn("^" + pattern, replacement, name)
            if changed:
                break
        return name

    def is_buffer(self, name: str) -> bool:
        """Whether a canonical name is a computed buffer."""
        return any(re.fullmatch(pattern, name) for pattern in self.buffers)

    def for_leaves(self, leaves: dict[str, Any]) -> dict[str, Rule]:
        """The rule of every leaf, by path.

        Raises:
            ModelError: a leaf has no rule or an axis count that differs from its rank.
        """
        rules = {rule.path: rule for rule in self.rules}
        missing = [path for path in leaves if path not in rules]
        wrong = [
            path
            for path, leaf in leaves.items()
            if path in rules and len(rules[path].all_axes) != len(leaf.shape)
        ]
        if missing or wrong:
            raise ModelError(
                f"The family's name map has no row for {missing} and a wrong axis count for "
                f"{wrong}; add the rows to its params.py."
            )
        return {path: rules[path] for path in leaves}


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested dict as {"a/b/c": leaf}."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat.update(
            flatten(value, f"{prefix}{key}/") if isinstance(value, dict) else {prefix + key: value}
        )
    return flat


def unflatten(flat: dict[str, Any]) -> dict[str, Any]:
    """The inverse of `flatten`."""
    tree: dict[str, Any] = {}
    for path, leaf in flat.items():
        *parents, last = path.split("/")
        node = tree
        for key in parents:
            node = node.setdefault(key, {})
        node[last] = leaf
    return tree
