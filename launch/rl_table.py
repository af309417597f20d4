"""The result table of reinforcement learning on an embedded world over several seeds.

python launch/rl_table.py runs/rl_0 runs/rl_1
"""

import argparse
from pathlib import Path

from aa_jax import config


def main():
    """Prints the table of the run directories named on the command line."""
    from aa_jax.rl import arithmetic_run, digits_table

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path, help="run directories, one per seed")
    runs = parser.parse_args().runs
    world = arithmetic_run if (runs[0] / arithmetic_run.RESULT).exists() else digits_table
    print(world.table(runs))


if __name__ == "__main__":
    config.run_main(main, argv=["rl_table"])
