"""Reinforcement learning of a policy against a reward.

python launch/rl.py --config configs/ti2t/llava_ppo.py --config.model.path=/ckpt/llava-1.5-7b-hf \\
    --config.reward.path=/ckpt/reward --config.prompts.path=PKU-Alignment/align-anything \\
    --workdir runs/ppo
python launch/rl.py --config configs/ti2t/digits_rl.py --workdir runs/rl
"""

from aa_jax import config, platforms

config.define_flags()


def main(cfg, workdir):
    """Starts the platform, pins the run directory to this config, and trains."""
    platforms.start()
    from aa_jax import rl  # after start-up: running it imports jax

    config.check_same_run(cfg, workdir)
    config.write_resolved(cfg, workdir)
    run, settings = rl.select(cfg)
    config.bind(run, settings, path="config", workdir=workdir)()


if __name__ == "__main__":
    config.run_main(main)
