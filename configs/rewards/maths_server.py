"""A reward server: mathematical answers and their form, for any number of training processes.

Command:  python launch/reward_server.py --config configs/rewards/maths_server.py
          and in the training config: "reward": {"kind": "http", "url":
          "http://127.0.0.1:8600/rewards"}
Hardware: CPU cores; each comparison is one worker process for about ten milliseconds.
Expected: one line that names the address; it answers until it is stopped.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder


def get_config() -> ConfigDict:
    return ConfigDict({
        "reward": {
            "terms": {"maths": {"where": "answer"}, "format": {"weight": 0.5}},
        },
        "allowed_functions": (),
        "mesh": {"data": -1},
        "host": "127.0.0.1",
        "port": 8600,
        "token_env": placeholder(str),
    })  # fmt: skip
