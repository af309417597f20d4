"""Signs that a reward is being exploited rather than earned, said while the run goes on."""

import logging
from collections.abc import Mapping
from typing import Any

from aa_jax.errors import ConfigError

log = logging.getLogger(__name__)


class Alarms:
    """Compares every iteration with the first ones.

    ============  ============================================================================
    length        responses are `length` times as long, or as short, as at the start
    kl            the KL to the reference exceeds `kl` nats per response
    truth         the reward has risen by `margin` of its early deviation, but `truth`, a figure of
                  the reward that is not paid (weight 0), has fallen by as much of its own
    ============  ============================================================================

    An alarm is the figure ``alarm/<name>`` (1 or 0) of every iteration, and is logged when it
    begins. It stops nothing.

    Args:
      length: factor above 1; None: no alarm, as for the others.
      kl: nats per response.
      truth: name of a part of the reward, e.g. "oracle".
      margin: of early standard deviations.
      start: iterations that are the start.
    """

    def __init__(
        self,
        length: int | float | None = 2.0,
        kl: int | float | None = 20.0,
        truth: str | None = None,
        margin: int | float = 0.5,
        start: int = 3,
    ):
        if (length is not None and length <= 1) or margin <= 0 or start < 1:
            raise ConfigError(
                f"alarms: length={length} must exceed 1, margin={margin} and start={start} 0."
            )
        self._length, self._kl, self._truth = length, kl, truth
        self._margin, self._start = margin, start
        self._early: list[dict[str, float]] = []
        self._on: set[str] = set()

    def check(self, iteration: int, figures: Mapping[str, float | int]) -> dict[str, float]:
        """The alarm figures of an iteration."""
        if len(self._early) < self._start:
            self._early.append(
                {k: float(figures[k]) for k in self._names() if figures.get(k) is not None}
            )
        found = {}
        if self._length is not None and (first := self._first("response_length")):
            ratio = figures["response_length"] / first
            found["length"] = (ratio > self._length or ratio < 1 / self._length,
                               f"responses are {ratio:.2f} times as long as at first")  # fmt: skip
        if self._kl is not None and "kl" in figures:
            found["kl"] = (figures["kl"] > self._kl,
                           f"the KL to the reference is {figures['kl']:.1f} nats")  # fmt: skip
        if self._truth is not None:
            paid, true = self._moved("reward/mean", "reward/std", figures), self._moved(
                f"reward/part/{self._truth}", f"reward/std/{self._truth}", figures
            )  # fmt: skip
            if paid is not None and true is not None:
                found["truth"] = (
                    paid > self._margin and true < -self._margin,
                    f"the reward has moved by {paid:+.2f} deviations, {self._truth} by {true:+.2f}",
                )
        for name, (on, why) in found.items():
            if on and name not in self._on:
                log.warning("iteration %d, alarm %s: %s", iteration, name, why)
            (self._on.add if on else self._on.discard)(name)
        return {f"alarm/{name}": float(on) for name, (on, _) in found.items()}

    def _names(self) -> tuple[str, ...]:
        truth = (f"reward/part/{self._truth}", f"reward/std/{self._truth}") if self._truth else ()
        return ("response_length", "reward/mean", "reward/std", *truth)

    def _first(self, name: str) -> float | None:
        values = [line[name] for line in self._early if name in line]
        return sum(values) / len(values) if values else None

    def _moved(self, name: str, spread: str, figures: Mapping[str, float | int]) -> float | None:
        """By how many early standard deviations a figure has moved."""
        first, unit = self._first(name), self._first(spread)
        if first is None or not unit or figures.get(name) is None:
            return None
        return (figures[name] - first) / unit

    def get_state(self) -> dict[str, Any]:
        """JSON-able."""
        return {"early": self._early, "on": sorted(self._on)}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Continues where `get_state` was called."""
        self._early, self._on = [dict(line) for line in state["early"]], set(state["on"])
