"""Compiles tiles of many sizes for TPUs this machine does not have, and drops those that cannot be.

    python -m aa_jax.kernels.tune --topology v5e:2x2 [--match attention] [--out sizes.json]
    python -m aa_jax.kernels.tune --topology v5e:2x2 --check        # the shipped table and default

Nothing runs and nothing is timed. A candidate is dropped if

- it does not compile, or holds more vector memory than `static.VMEM_KIB`;
- its matrix products do fewer operations per byte fetched than the chip needs to be busy
  (`Chip.peak` over `Chip.bandwidth`): no schedule could help it.

The rest are ranked by ``busy``: cycles the matrix units need for a tile over the cycles scheduled
for it (a grid step of log-probs; a step of attention that compares no masks, summed over the three
kernels), at most 1. Among those nearly as busy as the best, `rank` looks at the size of a tile and
at spill stores per cycle of these bodies. A schedule is static: waiting for memory is not in it.
The table of `aa_jax.kernels.tuning` holds the first of each list.
"""

import argparse
import itertools
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from aa_jax.kernels import static, tuning
from aa_jax.plan import targets
from aa_jax.platforms.chips import find_chip

CANDIDATES = {
    "attention": tuple(itertools.product((256, 512, 1024), (128, 256, 512, 1024))),
    "linear_logprob_forward": tuple(
        itertools.product((256, 512, 1024), (512, 1024, 2048), (256, 512, 1024))
    ),
    "linear_logprob_dlogits": tuple(
        itertools.product((256, 512, 1024), (512, 1024, 2048), (256, 512, 1024))
    ),
}
"""Sizes tried, as in `tuning.DEFAULT`."""

CELLS = {"TPU v6 lite": 4 * 256**2}
"""Multiplications per cycle of a core's matrix units: four of 256 × 256, or `DEFAULT_CELLS`."""

DEFAULT_CELLS = 4 * 128**2

NEARLY = 0.05
"""Sizes this much less busy than the best count as equal."""


class Outcome(NamedTuple):
    """What came of one candidate.

    Attributes:
      sizes: the candidate.
      refused: why it was dropped, or None.
      busy: share of the scheduled cycles in which the matrix units could work, at most 1.
      spills: spill stores per cycle of the matmul bodies.
      facts: of its kernels.
    """

    sizes: tuple[int, ...]
    refused: str | None
    busy: float = 0.0
    spills: float = 0.0
    facts: tuple[static.Facts, ...] = ()


def intensity(operator: str, sizes: tuple[int, ...]) -> float:
    """Floating-point operations per byte a tile fetches, of two bytes per number.

    Log-probs fetch a tile of hidden states and one of the head per step. Attention keeps the
    queries and fetches keys and values, or in the gradient of those the other way round.
    """
    if operator == "attention":
        return float(min(sizes[0], 2 * sizes[1]))
    tokens, vocab, _ = sizes
    return tokens * vocab / (tokens + vocab)


def compile_one(operator: str, sizes: tuple[int, ...], dtype: Any, depth: int, device: Any) -> None:
    """Compiles the kernels of an operator over a few tiles; raises what the compiler raises."""
    import jax
    import jax.numpy as jnp

    place = jax.sharding.SingleDeviceSharding(device)

    def shaped(shape, dtype=dtype):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=place)

    if operator == "attention":
        from aa_jax.kernels.attention import pallas_tpu as attention

        def run(q, k, v, intervals):
            out = attention.attention(q, k, v, intervals, 0.1, attention.Sizes(*sizes))
            return out.astype(jnp.float32).sum()

        length = 2 * max(sizes)
        q, intervals = shaped((1, length, 2, depth)), shaped((1, length, 4), jnp.int32)
        jax.jit(jax.grad(run, (0, 1, 2))).lower(q, q, q, intervals).compile()
        return
    from aa_jax.kernels.linear_logprob import blocked, pallas_tpu
    from aa_jax.kernels.linear_logprob.spec import Spec

    spec, engine = Spec(need_entropy=True), pallas_tpu.engine(pallas_tpu.Sizes(*sizes))
    tokens, vocab = 2 * sizes[0], 2 * sizes[1]
    hidden, head, ids = (
        shaped((tokens, depth)),
        shaped((vocab, depth)),
        shaped((tokens,), jnp.int32),
    )
    if operator == "linear_logprob_forward":

        def run(hidden, head, ids, live):
            tiles = blocked.Tiles(head[None], None, jnp.zeros(1, jnp.int32))
            return engine.partials(hidden[None], ids[None], live, tiles, vocab, spec)

        jax.jit(run).lower(hidden, head, ids, shaped((1,), jnp.bool_)).compile()
    else:

        def run(hidden, head, ids, rows):
            rows = blocked.Rows(*(rows[:, n : n + 1] for n in range(5)))
            first = jnp.zeros((), jnp.int32)
            return engine.dlogits(hidden, ids, rows, head, None, first, vocab, spec)

        jax.jit(run).lower(hidden, head, ids, shaped((tokens, 5), jnp.float32)).compile()


def judge(
    operator: str,
    sizes: tuple[int, ...],
    dtype: Any,
    depth: int,
    device: Any,
    reports: Path,
    *,
    slow: bool = False,
) -> Outcome:
    """One candidate for one device; ``reports`` is the folder given to `static.prepare`.

    ``slow``: also those that cannot keep the chip busy are compiled and judged by the rest.
    """
    chip = find_chip(device.device_kind)
    if chip and not slow and intensity(operator, sizes) < chip.peak / chip.bandwidth:
        needed = chip.peak / chip.bandwidth
        few = intensity(operator, sizes)
        return Outcome(sizes, f"{few:.0f} operations per byte, {chip.name} needs {needed:.0f}")
    try:
        compile_one(operator, sizes, dtype, depth, device)
    except Exception as error:  # a compiler says in its own words that a tile does not fit
        static.take(reports, "tpu")
        return Outcome(sizes, f"{type(error).__name__}: {str(error)[:120]}")
    return weigh(operator, sizes, depth, device.device_kind, tuple(static.take(reports, "tpu")))


def weigh(
    operator: str, sizes: tuple[int, ...], depth: int, kind: str, facts: tuple[static.Facts, ...]
) -> Outcome:
    """The outcome of a candidate from what the compiler reported of it."""
    if not facts:
        return Outcome(sizes, "the compiler left no report")
    if over := [f for f in facts if f.kib > static.VMEM_KIB]:
        return Outcome(sizes, f"{over[0].kib / 1024:.1f} MiB of vector memory", facts=facts)
    cells = CELLS.get(kind, DEFAULT_CELLS)
    if operator == "attention":
        products = {"attention_forward": 2, "attention_dq": 3, "attention_dkv": 4}
        ideal = sum(products[f.kernel] for f in facts) * sizes[0] * sizes[1] * max(depth, 128)
    else:
        ideal = sizes[0] * sizes[1] * sizes[2]
    # The last body of a kernel of attention is the one without a mask.
    bodies = [f.bodies[-1] for f in facts]
    cycles, spills = sum(b.cycles for b in bodies), sum(b.spills for b in bodies)
    return Outcome(sizes, None, min(ideal / cells / cycles, 1.0), spills / cycles, facts)


def rank(operator: str, outcomes: list[Outcome]) -> list[Outcome]:
    """Those that were not dropped and are nearly as busy as the busiest, best first.

    Of attention the smallest tile, which skips the most, then the fewest spills; of log-probs,
    where nothing is skipped by the vocabulary, the other way round.
    """
    kept = [o for o in outcomes if o.refused is None]
    best = max((o.busy for o in kept), default=0.0)
    kept = [o for o in kept if o.busy >= best - NEARLY]

    def order(outcome: Outcome) -> tuple:
        area, spills = outcome.sizes[0] * outcome.sizes[1], round(outcome.spills, 3)
        return ((area, spills) if operator == "attention" else (spills, area)) + outcome.sizes

    return sorted(kept, key=order)


def wanted(
    kind: str, match: str, check: bool, only: list[tuple[int, ...]] | None = None
) -> Iterator[tuple[tuple[str, Any, int], list]]:
    """((operator, dtype, depth), candidates) to compile for a device."""
    for operator, default in tuning.DEFAULT.items():
        for depth in (128, 256) if operator == "attention" else (4096,):
            for dtype in ("bfloat16", "float32") if check else ("bfloat16",):
                if match not in f"{operator} {dtype} {depth}":
                    continue
                shipped = tuning.sizes(operator, dtype, depth, kind)
                listed = [*dict.fromkeys((shipped, default))]
                tried = only and [s for s in only if len(s) == len(default)]
                found = listed if check else tried if only else list(CANDIDATES[operator])
                yield (operator, dtype, depth), found


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status: with ``--check`` 1 if anything shipped was dropped."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--topology", default="v5e:2x2", help="a TPU, e.g. v5e:2x2")
    parser.add_argument("--libtpu", help="path of a libtpu.so")
    parser.add_argument("--match", default="", help="only operators whose line contains this")
    parser.add_argument(
        "--check", action="store_true", help="compile what is shipped, nothing else"
    )
    parser.add_argument("--sizes", action="append", help="only these, e.g. 512x512; repeatable")
    parser.add_argument("--out", type=Path, help="JSON file for all outcomes")
    options = parser.parse_args(arguments)
    targets.prepare(options.topology, options.libtpu)
    only = [tuple(map(int, text.split("x"))) for text in options.sizes or ()] or None
    failed, found = 0, []
    with tempfile.TemporaryDirectory() as folder:
        reports = Path(folder)
        static.prepare(reports, "tpu")
        place = targets.open_slice(options.topology)
        device = place.devices[0]
        with targets.compiling_for(targets.Target("tpu", 1, kind=device.device_kind)):
            for (operator, dtype, depth), sizes in wanted(
                device.device_kind, options.match, options.check, only
            ):
                sys.stdout.write(f"{device.device_kind}, {operator}, {dtype}, depth {depth}\n")
                outcomes = []
                for one in sizes:
                    # What is shipped must compile; a default may be too small to be fast.
                    outcomes.append(
                        judge(operator, one, dtype, depth, device, reports, slow=options.check)
                    )
                    sys.stdout.write(f"  {describe(outcomes[-1])}\n")
                    sys.stdout.flush()
                shown = rank(operator, outcomes)
                # A default may be too small to be fast, not too large to compile.
                failed += sum(
                    o.refused is not None and "per byte" not in o.refused for o in outcomes
                )
                if shown and not options.check:
                    sys.stdout.write(f"  best: {shown[0].sizes}\n")
                found += [
                    {"kind": device.device_kind, "operator": operator, "dtype": dtype,
                     "depth": depth, **o._asdict()} for o in outcomes
                ]  # fmt: skip
                if options.out:
                    options.out.write_text(json.dumps(found, indent=1) + "\n")
    return int(options.check and failed > 0)


def describe(outcome: Outcome) -> str:
    """One line."""
    start = " x ".join(map(str, outcome.sizes))
    if outcome.refused:
        return f"{start}: dropped, {outcome.refused}"
    memory = max(f.kib for f in outcome.facts) / 1024
    return (
        f"{start}: busy {outcome.busy:.2f}, {outcome.spills:.3f} spill stores per cycle, "
        f"{memory:.1f} MiB of vector memory"
    )


if __name__ == "__main__":
    sys.exit(main())
