"""Learning from language feedback, end to end.

python launch/llf.py --config configs/ti2t/digits_llf.py --workdir runs/llf [--stage=feedback]
"""

from absl import flags

from aa_jax import config, platforms

config.define_flags()
_STAGE = flags.DEFINE_string("stage", None, "Run just this stage; what it needs must be finished.")


def main(cfg, workdir):
    """Starts the platform, pins the run directory to this config, and runs the stages."""
    platforms.start()
    from aa_jax.llf import digits_run  # after start-up: importing it imports jax

    config.check_same_run(cfg, workdir)
    config.write_resolved(cfg, workdir)
    config.bind(digits_run.run, cfg, path="config", workdir=workdir, stage=_STAGE.value)()


if __name__ == "__main__":
    config.run_main(main)
