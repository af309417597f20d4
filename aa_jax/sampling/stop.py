"""Texts that end a response."""

import bisect
import dataclasses
from collections.abc import Callable

import numpy as np

from aa_jax.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Stop:
    """Texts that end a response, found on the host while the device writes on.

    The response ends with the token that completes the first of them; both stay in it.

    Attributes:
      texts: any of them ends a response.
      decode: ids -> text.
      every: tokens between two looks; up to so many are written in vain.
    """

    texts: tuple[str, ...]
    decode: Callable[[np.ndarray], str]
    every: int = 16

    def __post_init__(self):
        if not self.texts or not all(self.texts) or self.every < 1:
            raise ConfigError(
                f"stop texts are {self.texts}, looked for every {self.every} tokens: give at least "
                "one text, none of them empty, and at least 1."
            )

    def length(self, tokens: np.ndarray) -> int | None:
        """Tokens up to the one that completes a stop text; None if there is none."""

        def holds(count: int) -> bool:
            text = self.decode(tokens[:count])
            return any(stop in text for stop in self.texts)

        if not holds(len(tokens)):
            return None
        return bisect.bisect_left(range(1, len(tokens) + 1), True, key=holds) + 1
