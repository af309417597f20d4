"""An image tokenizer trained from nothing on the digits world.

python launch/tokenizer.py --config configs/t2i/digits_vq.py --workdir runs/vq
"""

from absl import logging

from aa_jax import config, platforms

config.define_flags()


def main(cfg, workdir):
    """Starts the platform, pins the run directory to this config, and trains."""
    platforms.start()
    from aa_jax import image_recipe  # after start-up: importing it imports jax

    config.check_same_run(cfg, workdir)
    config.write_resolved(cfg, workdir)
    train = config.bind(image_recipe.train_tokenizer, cfg, path="config", workdir=workdir)
    _, _, figures = train()
    for name, value in figures.items():
        logging.info("%s %.4g", name, value)


if __name__ == "__main__":
    config.run_main(main)
