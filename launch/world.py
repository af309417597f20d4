"""A small checkpoint and a dataset of the digits world, for trying any recipe on any subtask.

python launch/world.py --config configs/world.py:TA2T --workdir runs/ta2t
"""

from aa_jax import config, platforms

config.define_flags()


def main(cfg, workdir):
    """Writes `workdir/model` and the parquet files beside it."""
    platforms.start()
    from aa_jax import small_models  # after start-up: importing it imports jax

    config.check_same_run(cfg, workdir)
    config.write_resolved(cfg, workdir)
    config.bind(small_models.write, cfg, path="config", workdir=workdir)()


if __name__ == "__main__":
    config.run_main(main)
