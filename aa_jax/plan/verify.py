"""Compiles the whole DPO step of LLaVA-1.5-7B for accelerators that are not there.

    python -m aa_jax.plan.verify --platform tpu           # v5e, v5p and v6e slices
    python -m aa_jax.plan.verify --platform gpu           # eight H200
    python -m aa_jax.plan.verify --topology v5e:4x4

Checked are that it compiles, fits the chip, and that temporary memory keeps a stated budget. How
often the weights are sent over the network is printed: about twice with fsdp.
`aa_jax.kernels.verify` does the same for every kernel by itself.
"""

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

from aa_jax.plan import targets

GIB = 2.0**30


@dataclasses.dataclass(frozen=True)
class Case:
    """One slice, how much of a batch each device takes, and what it may need.

    Attributes:
      platform: "tpu" or "gpu".
      topology: see `targets.open_slice`.
      rows: pairs per device of 2048 tokens.
      budget: GiB of temporaries per device.
    """

    platform: str
    topology: str
    rows: int
    budget: float


CASES = (
    Case("tpu", "v5e:4x4", 1, 4.0),
    Case("tpu", "v5p:2x2x2", 4, 9.0),
    Case("tpu", "v6e:2x4", 2, 8.0),
    Case("gpu", "h200:8", 4, 7.0),
)


def check(case: Case, model: str = "llava-1.5-7b") -> tuple[str, bool, dict[str, Any]]:
    """(line to print, whether it passed, its figures) of one compiled step.

    Args:
      case: what to compile.
      model: see `presets.model_config`.
    """
    from aa_jax.plan import measure, program

    place = targets.open_slice(case.topology)
    config = {
        "recipe": "dpo",
        "mesh": {"data": 1, "fsdp": -1},
        "model": {"dtype": "bfloat16", "param_dtype": "bfloat16", "remat": "full"},
        "data": {"limits": {"max_length": 2048}},
        "objective": {"beta": 0.1},
        "optim": {"lr": 1e-6},
        "train": {"frozen": ("vision_tower/*",)},
    }
    with place.tracing():
        rows = case.rows * len(place.devices)
        found = measure.measure(
            program.build(config, model, place.devices, rows=rows), place, "full"
        )
    if found.refused:
        return f"FAILED    {case.topology}: {found.refused}", False, found.as_dict()
    needed = found.memory["temporaries"] / GIB
    passed = needed <= case.budget and found.fits is not False
    weights = found.memory["parameters"] * len(place.devices)
    moved = sum(found.traffic[k].bytes for k in found.traffic if k != "reduce-scatter") / weights
    return (
        (
            f"{'ok        ' if passed else 'EXCEEDED  '}DPO step of {model}, {case.topology}, "
            f"{case.rows} pairs per device: {needed:.2f} of {case.budget:.2f} GiB temporary, "
            f"{found.total / GIB:.2f} GiB in all, weights gathered {moved:.1f} times, compiled in "
            f"{found.seconds:.0f} s"
        ),
        passed,
        found.as_dict(),
    )


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--platform", choices=("tpu", "gpu"))
    parser.add_argument("--topology", action="append", help="only these; repeatable")
    parser.add_argument("--libtpu", help="path of a libtpu.so")
    parser.add_argument("--cuda", help="folder of JAX's CUDA plugin")
    parser.add_argument("--out", type=Path, help="JSON file the figures are added to")
    options = parser.parse_args(arguments)
    wanted = [
        case for case in CASES
        if options.platform in (None, case.platform)
        and (not options.topology or case.topology in options.topology)
    ]  # fmt: skip
    failed = 0
    for case in wanted:
        targets.prepare(case.topology, options.libtpu, options.cuda)
        line, passed, figures = check(case)
        if options.out:
            kept = json.loads(options.out.read_text()) if options.out.exists() else []
            kept.append({"what": "LLaVA-1.5-7B DPO", "figures": figures})
            options.out.write_text(json.dumps(kept, indent=1) + "\n")
        failed += not passed
        sys.stdout.write(line + "\n")
        sys.stdout.flush()
    sys.stdout.write(f"{len(wanted) - failed} of {len(wanted)} steps compile within budget\n")
    return 1 if failed or not wanted else 0


if __name__ == "__main__":
    sys.exit(main())
