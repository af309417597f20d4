"""Schedules of our TPU attention kernels next to those of JAX's splash attention, by the compiler.

    python benchmarks/kernels/splash.py [--libtpu libtpu.so] [--topology v5e:2x2] [--sizes 512x512]

Nothing runs and nothing is timed: both are compiled with the same tiles for a TPU that is not
there, bfloat16, heads of 128. Printed are cycles scheduled for a tile and the spill stores among
them: ours where everything is visible and where two key intervals are compared, splash's without a
mask and with the causal one, which is one comparison. The last column is ours over splash's; the
command fails where it is above `WORST` for a whole tile.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

from aa_jax.kernels import static, tune
from aa_jax.plan import targets

WORST = 1.05
KERNELS = {"forward": "fwd", "dq": "dq", "dkv": "dkv"}


def splash(sizes: tuple[int, int], causal: bool, device, reports: Path) -> dict[str, static.Body]:
    """Bodies of splash attention's three kernels, by our names for them."""
    import jax
    import jax.numpy as jnp
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_kernel as kernel,
    )
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    queries, keys = sizes
    length = 2 * max(sizes)
    mask = (masks.CausalMask if causal else masks.FullMask)((length, length))
    block = dict(zip(("block_q", "block_kv"), sizes, strict=True))
    run = kernel.make_splash_mha(
        masks.MultiHeadMask([mask] * 2),
        block_sizes=kernel.BlockSizes(
            **block, **{f"{name}_{of}": n for name, n in block.items() for of in ("dkv", "dq")},
            block_kv_compute=keys, block_kv_dkv_compute=keys,
        ),
        head_shards=1, q_seq_shards=1,
    )  # fmt: skip
    place = jax.sharding.SingleDeviceSharding(device)
    x = jax.ShapeDtypeStruct((2, length, 128), jnp.bfloat16, sharding=place)
    loss = lambda *x: run(*x).astype(jnp.float32).sum()  # noqa: E731
    jax.jit(jax.grad(loss, (0, 1, 2))).lower(x, x, x).compile()
    found = {f.kernel: f.bodies[-1] for f in static.take(reports, "tpu")}
    return {ours: found[f"splash_mha_{theirs}"] for ours, theirs in KERNELS.items()}


def main() -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--topology", default="v5e:2x2")
    parser.add_argument("--sizes", default="512x512", help="queries x keys of a tile")
    parser.add_argument("--libtpu", help="path of a libtpu.so")
    parser.add_argument("--out", type=Path, help="JSON file for the result")
    options = parser.parse_args()
    sizes = tuple(map(int, options.sizes.split("x")))
    targets.prepare(options.topology, options.libtpu)
    with tempfile.TemporaryDirectory() as folder:
        reports = Path(folder)
        static.prepare(reports, "tpu")
        device = targets.open_slice(options.topology).devices[0]
        with targets.compiling_for(targets.Target("tpu", 1, kind=device.device_kind)):
            tune.compile_one("attention", sizes, "bfloat16", 128, device)
        ours = {f.kernel.removeprefix("attention_"): f.bodies for f in static.take(reports, "tpu")}
        theirs = [splash(sizes, causal, device, reports) for causal in (False, True)]
    result = {"kind": device.device_kind, "sizes": sizes, "kernels": {}}
    worst = 0.0
    for name in KERNELS:
        masked, whole = ours[name]
        for what, a, b in (("whole", whole, theirs[0][name]), ("masked", masked, theirs[1][name])):
            ratio = a.cycles / b.cycles
            worst = max(worst, ratio if what == "whole" else 0.0)
            sys.stdout.write(
                f"{name}, {what}: {a.cycles} cycles with {a.spills} spill stores; splash "
                f"{b.cycles} with {b.spills}; {ratio:.2f}\n"
            )
            result["kernels"][f"{name}, {what}"] = {
                "ours": a._asdict(), "splash": b._asdict(), "ratio": round(ratio, 3)
            }  # fmt: skip
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n")
    return int(worst > WORST)


if __name__ == "__main__":
    sys.exit(main())
