"""What the library wants to know about a platform."""

import dataclasses
from collections.abc import Collection, Mapping

from aa_jax.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Platform:
    """Defaults for one kind of device; every one of them can be overridden by the config.

    Attributes:
      name: The name used in configs and logs.
      backends: What ``jax.default_backend()`` or a plug-in calls this platform.
      param_dtype: Dtype of stored parameters and optimizer state.
      compute_dtype: Dtype of activations and matmuls; losses are always float32.
      kernels: Kernel implementations, best first.
      environment: Variables set at start-up unless the user has set them already.
      operations: StableHLO operations its compiler is known or expected to take; None: all.
      custom_calls: Targets of custom calls it may be given.
      note: One line of what a user should know, for logs and reports.
    """

    name: str
    backends: tuple[str, ...]
    param_dtype: str
    compute_dtype: str
    kernels: tuple[str, ...]
    environment: Mapping[str, str] = dataclasses.field(default_factory=dict)
    operations: frozenset[str] | None = None
    custom_calls: frozenset[str] = frozenset()
    note: str = ""

    def choose_kernel(self, available: Collection[str]) -> str:
        """The best implementation for this platform among those an operator has.

        Raises:
          ConfigError: None of them runs here.
        """
        for name in self.kernels:
            if name in available:
                return name
        raise ConfigError(
            f"no kernel implementation for platform {self.name!r}: the operator has "
            f"{', '.join(sorted(available)) or 'none'}, the platform runs "
            f"{', '.join(self.kernels)}. Choose one of these with impl=..."
        )
