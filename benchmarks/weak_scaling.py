"""What one device sends and holds as devices are added, and what depth costs the compiler.

    python benchmarks/weak_scaling.py                        # 8 to 256 H200, then 4 to 32 layers
    python benchmarks/weak_scaling.py --chip cpu --devices 8 16 32 --layers 4 8
    python benchmarks/weak_scaling.py --out benchmarks/results/weak_scaling.json

Nothing is executed: a DPO step of LLaVA-1.5-7B's width is compiled for devices that are not there
(see docs/plan.md), rows per device held fixed, weights divided over all devices (fsdp). With fsdp a
device gathers the whole model however many there are, so bytes and temporaries should stay flat.
The first table uses 4 decoder layers: they are scanned, so depth multiplies the traffic of a layer.
"""

import argparse
import dataclasses
import json
import time
from pathlib import Path

from aa_jax import config
from aa_jax.plan import targets

ROOT = Path(__file__).parents[1]
GIB = 2**30


def topology(chip: str, devices: int) -> str:
    """Name of a slice: GPUs in hosts of eight."""
    if chip == "cpu" or devices <= 8:
        return f"{chip}:{devices}"
    return f"{chip}:{devices // 8}x8"


def compiled(place, model: str, *, layers: int, rows_per_device: int, length: int):
    """(Figures, CPU seconds of tracing and compiling) of one step."""
    from aa_jax.plan import command, measure, program  # after preparing: it imports jax

    cfg = config.load(str(ROOT / "configs/ti2t/llava_dpo.py"), [])
    resolved, _ = command.resolve(cfg, command.Wishes(model, place.name))
    with place.tracing():
        start = time.process_time()
        step = program.build(
            resolved, model, place.devices, rows=rows_per_device * len(place.devices),
            layout=program.Layout(length=length), layers=layers,
        )  # fmt: skip
        figures = measure.measure(step, place, "full")
    return figures, time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--chip", default="h200", help="h200, or cpu for virtual devices")
    parser.add_argument("--model", default="llava-1.5-7b")
    parser.add_argument("--devices", type=int, nargs="*", default=[8, 16, 32, 64, 128, 256])
    parser.add_argument("--layers", type=int, nargs="*", default=[4, 8, 16, 32])
    parser.add_argument("--rows", type=int, default=1, help="pairs per device")
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=2, help="compilations per depth; least time")
    parser.add_argument("--out", type=Path, help="also write the figures to this JSON file")
    args = parser.parse_args()
    most = max([*args.devices, 8])
    targets.prepare(topology(args.chip, most))
    sizes = dict(rows_per_device=args.rows, length=args.length)
    result: dict = {"arguments": {**vars(args), "out": None}, "scaling": [], "depth": []}

    print(f"{'devices':>8}{'gathered':>12}{'reduced':>12}{'other':>10}{'temporaries':>14}{'s':>6}")
    for count in args.devices:
        place = targets.open_slice(topology(args.chip, count))
        figures, _ = compiled(place, args.model, layers=4, **sizes)
        moved = {kind: traffic.bytes for kind, traffic in figures.traffic.items()}
        gathered = moved.pop("all-gather", 0)
        reduced = moved.pop("reduce-scatter", 0) + moved.pop("all-reduce", 0)
        held = figures.memory["temporaries"]
        print(
            f"{count:>8}{gathered / GIB:>8.2f} GiB{reduced / GIB:>8.2f} GiB"
            f"{sum(moved.values()) / GIB:>6.2f} GiB{held / GIB:>10.2f} GiB{figures.seconds:>6.0f}",
            flush=True,
        )
        result["scaling"].append(dataclasses.asdict(figures))

    print(f"\n{'layers':>8}{'CPU time':>18}{'ratio':>8}")
    place = targets.open_slice(topology(args.chip, 8))
    for layers in args.layers:
        seconds = min(
            compiled(place, args.model, layers=layers, **sizes)[1] for _ in range(args.repeats)
        )
        result["depth"].append({"layers": layers, "seconds": seconds})
        ratio = seconds / result["depth"][0]["seconds"]
        print(f"{layers:>8}{seconds:>16.1f} s{ratio:>8.2f}", flush=True)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
