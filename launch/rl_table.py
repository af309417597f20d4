"""The result table of reinforcement learning on the digits world over several seeds.

python launch/rl_table.py runs/rl_0 runs/rl_1
"""

import argparse
from pathlib import Path

from aa_jax import config


def main():
    """Prints the table of the run directories named on the command line."""
    from aa_jax.rl.digits_table import table

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path, help="run directories, one per seed")
    print(table(parser.parse_args().runs))


if __name__ == "__main__":
    config.run_main(main, argv=["rl_table"])
