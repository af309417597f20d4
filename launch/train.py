"""Trains one model by one recipe.

python launch/train.py --config configs/ti2t/llava_dpo.py \\
    --config.model.path=/ckpt/llava-1.5-7b-hf --config.data.path=PKU-Alignment/align-anything \\
    --workdir runs/dpo
"""

from aa_jax import config, platforms

config.define_flags()


def main(cfg, workdir):
    """Starts the platform, pins the run directory to this config, and trains."""
    platforms.start()
    from aa_jax import runs  # after start-up: importing it imports jax

    config.check_same_run(cfg, workdir)
    config.write_resolved(cfg, workdir)
    resolved = config.resolve(cfg)
    config.bind(runs.run, cfg, path="config", workdir=workdir, config=resolved)()


if __name__ == "__main__":
    config.run_main(main)
