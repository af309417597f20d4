"""The result table of reinforcement learning on the digits world over several seeds.

python launch/rl_table.py runs/rl_0 runs/rl_1
"""

import argparse
from pathlib import Path

from aa_jax.rl.digits_table import table

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path, help="run directories, one per seed")
    print(table(parser.parse_args().runs))
