"""Variants of a model: adapters beside its linear layers, their kernels in few bits.

The family's class is built as ever and its `Linear` modules are changed afterwards, so no family
knows of it. New leaves stand below the layer they belong to: ``.../lora/a`` [L, in, r] and
``.../lora/b`` [L, r, out]; ``.../kernel/codes`` and ``.../kernel/scales`` in place of the kernel.
"""

import dataclasses
from typing import Any

from flax import nnx

from aa_jax.models.layers import Linear
from aa_jax.models.lora import Adapter, Lora
from aa_jax.models.names import TRANSPOSE, Axes, Names, Rule
from aa_jax.models.quantized import Quantization, QuantizedKernel

ADAPTER = ("/lora/a", "/lora/b")
QUANTIZED = ("/kernel/codes", "/kernel/scales")


@dataclasses.dataclass(frozen=True)
class Variant:
    """How a model differs from the plain one.

    Attributes:
        lora: its adapters.
        quantization: how the kernels of ``quantized`` are stored.
        quantized: paths of the linear layers stored so.
    """

    lora: Lora | None = None
    quantization: Quantization = Quantization()
    quantized: tuple[str, ...] = ()

    def apply(self, module: nnx.Module, rngs: nnx.Rngs, names: Names) -> None:
        """Changes the linear layers of a freshly built family with this name map."""
        found = {
            "/".join(map(str, path)): layer
            for path, layer in nnx.iter_modules(module)
            if isinstance(layer, Linear)
        }
        for path in self.lora.layers if self.lora else ():
            found[path].lora = nnx.data(Adapter(found[path].kernel.shape, self.lora, rngs))
        kernels = linear_layers({rule.path: rule for rule in names.rules})
        for path in self.quantized:
            kernel, axes = found[path].kernel[...], kernels[path].axes
            found[path].kernel = nnx.data(QuantizedKernel(kernel, self.quantization, axes))

    def without_adapters(self) -> "Variant":
        """The base under the adapters."""
        return dataclasses.replace(self, lora=None)

    def frozen(self, leaves: dict[str, Any]) -> tuple[str, ...]:
        """Paths of the leaves that do not train."""
        if self.lora is None:
            return tuple(path for path in leaves if path.endswith(QUANTIZED))
        trained = set(self.lora.full)
        return tuple(p for p in leaves if p not in trained and not p.endswith(ADAPTER))


def linear_layers(rules: dict[str, Rule]) -> dict[str, Rule]:
    """The rule of every linear layer's kernel, by the layer's path.

    Convolutions that are computed as products are left out: other tools do not call them linear.

    Args:
        rules: of every leaf of the plain model, by path.
    """
    return {
        path.removesuffix("/kernel"): rule
        for path, rule in rules.items()
        if path.endswith("/kernel") and rule.transform is TRANSPOSE
    }


def axes(names: Names, plain: dict[str, Any], leaves: dict[str, Any]) -> dict[str, Axes]:
    """Logical axis names of every leaf of a variant.

    Args:
        names: the family's name map.
        plain: leaves of the plain model, by path.
        leaves: those of the variant.
    """
    rules = names.for_leaves(plain)
    kernels = linear_layers(rules)

    def one(path: str, leaf: Any) -> Axes:
        if path in rules:
            return rules[path].all_axes
        layer, branch, name = path.rsplit("/", 2)
        *stack, n_in, n_out = kernels[layer].all_axes
        if branch == "lora":
            return (*stack, n_in, None) if name == "a" else (*stack, None, n_out)
        # One scale for all input features has nothing to be divided.
        return (*stack, None if leaf.shape[-2] == 1 else n_in, n_out)

    return {path: one(path, leaf) for path, leaf in leaves.items()}
