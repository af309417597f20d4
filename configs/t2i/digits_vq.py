"""The image tokenizer of the digits world (text -> image needs one), from nothing.

Command:  python launch/tokenizer.py --config configs/t2i/digits_vq.py --workdir runs/vq
Hardware: two CPU cores, no download.
Time and expected result: aa_jax/models/chameleon/README.md.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    return ConfigDict({
        "seed": 0,
        "max_digits": 3,
        "sizes": {"codes": 256, "embed_dim": 8, "patch": 4},
        "batch_rows": 16,
        "continuous_steps": 400,
        "steps": 600,
        "lr": 3e-3,
        "beta": 0.25,
        "log_every": 10,
        "test_strips": 128,
    })  # fmt: skip
