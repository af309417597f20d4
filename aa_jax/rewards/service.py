"""A reward server as a config describes it."""

from collections.abc import Mapping, Sequence
from typing import Any

from aa_jax.rewards.base import close
from aa_jax.rewards.build import make_reward
from aa_jax.rewards.server import serve
from aa_jax.sharding import make_mesh


def run(
    *,
    reward: Mapping[str, Any],
    allowed_functions: Sequence[str] = (),
    mesh: Mapping[str, int] | None = None,
    host: str = "127.0.0.1",
    port: int = 8600,
    token_env: str | None = None,
) -> None:
    """Builds the reward and serves it until the process is told to end.

    Args:
      reward: see `aa_jax.rewards.build.make_reward`.
      allowed_functions: Python functions the reward may import.
      mesh: sizes for `make_mesh`, where the reward is a model.
      host: see `aa_jax.rewards.server.serve`, as the two below.
      port: to listen on.
      token_env: variable with the token.
    """
    made = make_reward(reward, mesh=make_mesh(**(mesh or {})), allowed=allowed_functions)
    try:
        serve(made, host=host, port=port, token_env=token_env)
    finally:
        close(made)
