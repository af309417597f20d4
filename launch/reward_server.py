"""Serves the reward of a config over HTTP.

python launch/reward_server.py --config configs/rewards/maths_server.py
REWARD_TOKEN=... python launch/reward_server.py --config configs/rewards/maths_server.py \\
    --config.host=0.0.0.0 --config.token_env=REWARD_TOKEN
"""

from aa_jax import config, platforms

config.define_flags(workdir="")


def main(cfg, workdir):
    """Starts the platform, builds the reward and serves it."""
    platforms.start()
    from aa_jax.rewards import service  # after start-up: importing it imports jax

    config.bind(service.run, cfg, path="config")()


if __name__ == "__main__":
    config.run_main(main)
