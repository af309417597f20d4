"""An algorithm: which advantages × which loss × which roles."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from aa_jax.errors import ConfigError
from aa_jax.losses.controllers import adaptive_kl, fixed_kl


@dataclasses.dataclass(frozen=True)
class Algorithm:
    """One row of `ALGORITHMS`.

    Attributes:
      loss: key of `aa_jax.losses.policy.POLICY_LOSSES`.
      estimator: key of `aa_jax.rl.estimators.ESTIMATORS`.
      critic: trains one beside the policy.
      kl: where the distance to the reference is paid: "reward" or "loss".
      samples: responses per prompt it needs at least.
      estimator_options: its own defaults.
    """

    loss: str
    estimator: str
    critic: bool = False
    kl: str = "loss"
    samples: int = 2
    estimator_options: Mapping[str, Any] = dataclasses.field(default_factory=dict)


ALGORITHMS: dict[str, Algorithm] = {
    "ppo": Algorithm("ppo", "gae", critic=True, kl="reward", samples=1),
    "grpo": Algorithm("grpo", "group"),
    "dr_grpo": Algorithm("dr_grpo", "group", estimator_options={"scale": "none"}),
    "dapo": Algorithm("dapo", "group"),
    "gspo": Algorithm("gspo", "group"),
    "cispo": Algorithm("cispo", "group"),
    "rloo": Algorithm("rloo", "leave_one_out", kl="reward"),
    "reinforce_pp": Algorithm("reinforce_pp", "reinforce_plus_plus", kl="reward", samples=1),
}


def find_algorithm(name: str) -> Algorithm:
    """An algorithm by name.

    Raises:
      ConfigError: there is none of that name.
    """
    if name not in ALGORITHMS:
        raise ConfigError(f"There is no algorithm {name!r}; there are {', '.join(ALGORITHMS)}.")
    return ALGORITHMS[name]


class Controller:
    """The price of the KL to the reference over a run.

    Args:
      coef: price, or the first one.
      target: KL per response, in nats, that the price is steered to; None keeps it as it is.
      gain: of the proportional controller, see `aa_jax.losses.controllers.adaptive_kl`.
    """

    def __init__(self, coef: float = 0.05, target: float | None = None, gain: float = 0.1):
        if coef < 0 or (target is not None and target <= 0):
            raise ConfigError(
                f"kl.coef must not be negative and kl.target positive; got {coef} and {target}."
            )
        self.coef, self._target, self._gain = float(coef), target, gain

    def update(self, kl: float, tokens: int) -> None:
        """Takes the mean KL per response of an iteration; without tokens nothing changes."""
        if not tokens:
            return
        if self._target is None:
            self.coef = float(fixed_kl(self.coef, kl))
        else:
            self.coef = float(adaptive_kl(self.coef, kl, target=self._target, gain=self._gain))
