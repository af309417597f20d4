"""One token per row: what may come, temperature, truncation, the draw, and its log-probability."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from aa_jax.sampling.draw import draw
from aa_jax.sampling.filters import check_sampling, filter_logits


@dataclasses.dataclass(frozen=True)
class Choice:
    """How a token is chosen.

    Attributes:
      temperature: 0 is greedy.
      top_p: nucleus mass in (0, 1]; 1 keeps every token.
      top_k: tokens kept; 0 keeps every token.
      min_p: least probability relative to the highest; 0 keeps every token.

    Raises:
      ConfigError: a value outside its range.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0

    def __post_init__(self):
        check_sampling(self.temperature, self.top_p, self.top_k, self.min_p)

    def __call__(
        self,
        logits: Float[Array, "B V"],
        uniform: Float[Array, "B"],
        allowed: Bool[Array, "B V"] | None,
    ) -> tuple[Int[Array, "B"], Float[Array, "B"]]:
        """(tokens, their log-probs under the whole vocabulary at this temperature).

        Args:
          logits: of the next token.
          uniform: in [0, 1], what is random in the choice; see `draw.uniforms`.
          allowed: tokens that may come, or None for all.
        """
        logits = logits.astype(jnp.float32)
        if self.temperature > 0:
            logits = logits / self.temperature
        open_ = logits if allowed is None else jnp.where(allowed, logits, -jnp.inf)
        total = None
        if self.temperature > 0:
            cut = filter_logits(open_, top_k=self.top_k, top_p=self.top_p, min_p=self.min_p)
            token, mass = draw(uniform, cut)
            total = mass if cut is logits else None  # else of what was left of the vocabulary
        else:
            token = jnp.argmax(open_, axis=-1)
        if total is None:
            total = jax.nn.logsumexp(logits, axis=-1)
        picked = jnp.take_along_axis(logits, token[:, None], axis=-1)[:, 0]
        return token.astype(jnp.int32), picked - total
