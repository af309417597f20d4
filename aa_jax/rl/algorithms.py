"""An algorithm: which advantages × which loss × which roles."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from aa_jax.errors import ConfigError
from aa_jax.losses.controllers import adaptive_kl, fixed_kl
from aa_jax.losses.lagrangian import Lagrangian, lagrangian, observe_costs, update_multiplier


@dataclasses.dataclass(frozen=True)
class Algorithm:
    """One row of `ALGORITHMS`.

    Attributes:
      loss: key of `aa_jax.losses.policy.POLICY_LOSSES`, or of `aa_jax.rl.objectives.OF_GROUPS`.
      estimator: key of `aa_jax.rl.estimators.ESTIMATORS`.
      critic: trains one beside the policy.
      kl: where the distance to the reference is paid: "reward", "loss", or "none".
      samples: responses per prompt it needs at least.
      costs: keeps a cost below a limit, and trains a second critic for it.
      estimator_options: its own defaults.
    """

    loss: str
    estimator: str
    critic: bool = False
    kl: str = "loss"
    samples: int = 2
    costs: bool = False
    estimator_options: Mapping[str, Any] = dataclasses.field(default_factory=dict)


ALGORITHMS: dict[str, Algorithm] = {
    "ppo": Algorithm("ppo", "gae", critic=True, kl="reward", samples=1),
    "grpo": Algorithm("grpo", "group"),
    "dr_grpo": Algorithm("dr_grpo", "group", estimator_options={"scale": "none"}),
    "dapo": Algorithm("dapo", "group"),
    "gspo": Algorithm("gspo", "group"),
    "cispo": Algorithm("cispo", "group"),
    "rloo": Algorithm("rloo", "leave_one_out", kl="reward"),
    "ppo_lagrangian": Algorithm(
        "ppo", "lagrangian", critic=True, kl="reward", samples=1, costs=True
    ),
    "online_dpo": Algorithm("online_dpo", "best_and_worst"),
    "raft": Algorithm("raft", "best", kl="none"),
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


class CostLimit:
    """The price of the cost in PPO-Lagrangian over a run (`aa_jax.losses.lagrangian`).

    Args:
      threshold: d, the mean cost allowed; a cost model's border between safe and unsafe is 0.
      initial: λ at the start.
      lr: of its ascent.
      maximum: λ_max, or None.
      window: responses that the mean cost is taken over.
      delay: iterations before λ first moves.
    """

    def __init__(
        self,
        threshold: int | float = -0.5,
        initial: int | float = 10.0,
        lr: int | float = 0.1,
        maximum: int | float | None = 20.0,
        window: int = 128,
        delay: int = 1,
    ):
        self._options = dict(threshold=threshold, lr=lr, maximum=maximum)
        self._state, self._delay = lagrangian(initial, window), delay

    @property
    def multiplier(self) -> float:
        """λ."""
        return float(self._state.multiplier)

    @property
    def mean_cost(self) -> float:
        """J_c over the window."""
        return float(self._state.mean_cost)

    def update(self, costs: np.ndarray, valid: np.ndarray) -> None:
        """Takes the costs of an iteration's responses; those not valid do not count."""
        self._state = observe_costs(
            self._state, jnp.asarray(costs, jnp.float32).reshape(-1), jnp.asarray(valid).reshape(-1)
        )
        if self._delay > 0:
            self._delay -= 1
        elif np.any(valid):
            self._state = update_multiplier(self._state, **self._options)

    def get_state(self) -> dict[str, Any]:
        """JSON-able."""
        return {"delay": self._delay, "state": [np.asarray(x) for x in self._state]}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Continues where `get_state` was called."""
        self._delay = state["delay"]
        self._state = Lagrangian(*(jnp.asarray(x, jnp.float32) for x in state["state"]))
