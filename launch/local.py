"""Starts a command in several processes on this machine, as one job.

JAX_PLATFORMS=cpu python launch/local.py --processes 2 --devices 4 -- \\
    launch/train.py --config configs/ti2t/llava_dpo.py --workdir runs/dpo ...
python launch/local.py --processes 8 --devices 1 -- launch/train.py ...     # one process per GPU
"""

import sys

from absl import flags

from aa_jax import config
from aa_jax.hosts import local

_PROCESSES = flags.DEFINE_integer("processes", 2, "Number of processes.")
_DEVICES = flags.DEFINE_integer("devices", None, "Devices of each process; default: JAX decides.")
_GRACE = flags.DEFINE_float("grace", 15.0, "Seconds the others have after one has failed.")
_COMMAND: list[str] = []


def main():
    """Runs the command behind --, and exits with the job's code."""
    raise SystemExit(
        local.run(_COMMAND, processes=_PROCESSES.value, devices=_DEVICES.value, grace=_GRACE.value)
    )


if __name__ == "__main__":
    at = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    _COMMAND[:] = sys.argv[at + 1 :]
    config.run_main(main, argv=sys.argv[:at])
