"""Learning from language feedback over several training seeds, with the paper's comparisons.

python launch/reproduce.py --config configs/ti2t/digits_llf_reproduce.py --workdir runs/reproduce
"""

from aa_jax import config, platforms

config.define_flags()


def main(cfg, workdir):
    """Starts the platform, pins the run directory to this config, and runs every seed."""
    platforms.start()
    from aa_jax.llf import reproduce  # after start-up: importing it imports jax

    config.check_same_run(cfg, workdir)
    config.write_resolved(cfg, workdir)
    result = reproduce.run(workdir, **config.resolve(cfg))
    print(reproduce.markdown(result))


if __name__ == "__main__":
    config.run_main(main)
