"""Learning from language feedback, end to end.

python launch/llf.py --config configs/ti2t/digits_llf.py --workdir runs/llf [--stage=feedback]
python launch/llf.py --config configs/ti2t/llava_llf.py --config.model.path=/ckpt/llava-1.5-7b-hf \\
    --config.data.path=PKU-Alignment/align-anything --workdir runs/llava_llf
"""

from absl import flags

from aa_jax import config, platforms

config.define_flags()
_STAGE = flags.DEFINE_string("stage", None, "Run just this stage; what it needs must be finished.")


def main(cfg, workdir):
    """Starts the platform, pins the run directory to this config, and runs the stages."""
    platforms.start()
    from aa_jax import llf  # after start-up: running it imports jax

    config.check_same_run(cfg, workdir)
    config.write_resolved(cfg, workdir)
    run, settings = llf.select(cfg)
    config.bind(run, settings, path="config", workdir=workdir, stage=_STAGE.value)()


if __name__ == "__main__":
    config.run_main(main)
