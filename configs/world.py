"""A small checkpoint with random weights, and a dataset, for one subtask of the digits world.

Command:  python launch/world.py --config configs/world.py:TA2T --workdir runs/ta2t
          (T2T, TI2T, TA2T, TV2T, T2I or TI2TI)
Hardware: a CPU.
Time:     under a minute.
Expected: runs/ta2t/model, preference.parquet, preference_val.parquet and sft.parquet.
"""

from ml_collections import ConfigDict


def get_config(subtask: str = "TI2T") -> ConfigDict:
    return ConfigDict({
        "subtask": subtask,
        "seed": 0,
        "max_digits": 3,
        "model": {
            "text": {"dim": 96, "layers": 3, "heads": 4, "kv_heads": 4, "mlp_dim": 256},
            "tower": {"dim": 64, "layers": 2, "heads": 4},
        },
        "data": {"pairs": 2000, "demonstrations": 4000, "held_out": 200},
    })  # fmt: skip
