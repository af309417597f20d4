"""Compiles every kernel for accelerators this machine does not have, and checks what it needs.

    python -m aa_jax.kernels.verify --platform tpu                  # v5e, v5p and v6e
    python -m aa_jax.kernels.verify --platform tpu --topology v5e:2x2 --match attention
    python -m aa_jax.kernels.verify --platform gpu --cuda build/cuda [--target h200.txtpb]

Nothing runs and nothing is timed. ``--table FILE`` also writes the figures as a Markdown table.
On TPUs after the first topology only gradients, which hold every kernel, of the `PROBES` are
compiled. TPU needs a ``libtpu`` (installed, or named by ``--libtpu``) not older than jaxlib; GPU
needs JAX's CUDA plugin with ``ptxas``, and cuDNN for its attention; the default target is an H200.
Checked are that the kernel compiles (a tile that does not fit VMEM or
shared memory fails to), that the wanted kernels are in the program, that its temporary memory keeps
the budget, and what the compiler reports of each kernel (`aa_jax.kernels.static`): vector or shared
memory, registers, spills.
"""

import argparse
import dataclasses
import functools
import itertools
import math
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from aa_jax.errors import ConfigError
from aa_jax.kernels import static
from aa_jax.plan import targets
from aa_jax.plan.gpu_targets import GPU_TARGETS

TOPOLOGIES = ("v5e:2x2", "v5p:2x2x1", "v6e:2x2")
MIB = 2**20


@dataclasses.dataclass(frozen=True)
class Case:
    """One program to compile.

    Attributes:
      name: operator, direction and shape.
      function: what is compiled.
      arguments: (shape, dtype) of every argument.
      budget_mib: most temporary memory, beside arguments and results.
      kernels: custom calls the program must hold.
      call: how their target begins.
    """

    name: str
    function: Callable
    arguments: tuple[tuple[tuple[int, ...], Any], ...]
    budget_mib: float
    kernels: int
    call: str = "tpu_custom_call"


LOGPROB_SHAPES = {
    # tokens, width, vocabulary, budgets of forward and gradient in MiB
    "Vicuna 7B": (4096, 4096, 32000, 128.0, 600.0),
    "Llama 3 8B": (8192, 4096, 128256, 128.0, 600.0),
    "Qwen2-VL 7B": (8192, 3584, 152064, 128.0, 600.0),
    "Chameleon 7B": (4096, 4096, 65536, 128.0, 600.0),
    "uneven": (1000, 1000, 32001, 128.0, 600.0),
}

ATTENTION_SHAPES = {
    # rows, length, query heads, key heads, head size
    "Vicuna 7B": (8, 2048, 32, 32, 128),
    "Llama 3 8B": (4, 4096, 32, 8, 128),
    "Qwen2 7B": (4, 4096, 28, 4, 128),
    "CLIP-L/336": (32, 577, 16, 16, 64),
    "wide heads": (2, 2048, 8, 4, 256),
}


_CALLS = {"pallas_tpu": "tpu_custom_call", "pallas_hopper": "mosaic_gpu", "xla": ""}


PROBES = ("Llama 3 8B", "Qwen2", "CLIP-L/336")
"""What is compiled for further topologies too: they share all but sizes with the first."""


def _probe(case: Case) -> bool:
    return "gradient, " in case.name and any(f" {name}" in case.name for name in PROBES)


def cases(implementation: str) -> Iterator[Case]:
    """Every kernel of an implementation (a key of ``_CALLS``) at every shape."""
    import jax
    import jax.numpy as jnp

    from aa_jax.kernels.attention import xla as attention_xla
    from aa_jax.kernels.linear_logprob import xla as logprob_xla
    from aa_jax.kernels.linear_logprob.spec import Spec

    attention = attention_xla.attention
    # Block sizes of an accelerator, not of the CPU this runs on.
    logprob = functools.partial(logprob_xla.linear_logprob, platform="gpu")
    mosaic = implementation != "xla"
    call = _CALLS[implementation]
    case = functools.partial(Case, call=call)
    if implementation == "pallas_hopper":
        from aa_jax.kernels.attention import pallas_hopper as attention_hopper
        from aa_jax.kernels.linear_logprob import pallas_hopper as logprob_hopper

        attention, logprob = attention_hopper.attention, logprob_hopper.linear_logprob
    elif mosaic:
        from aa_jax.kernels.attention import pallas_tpu as attention_tpu
        from aa_jax.kernels.linear_logprob import pallas_tpu as logprob_tpu

        attention, logprob = attention_tpu.attention, logprob_tpu.linear_logprob

    def logps(hidden, head, targets, mask):
        out = logprob(hidden, head, targets, mask, None, Spec(need_entropy=True))
        return out.logps.sum() + out.entropy.sum()

    for name, (n, d, v, forward, gradient) in LOGPROB_SHAPES.items():
        arguments = (
            ((n, d), jnp.bfloat16), ((v, d), jnp.bfloat16), ((n,), jnp.int32), ((n,), jnp.bool_),
        )  # fmt: skip
        what = f"linear_logprob {{}}, {name} (N={n}, D={d}, V={v})"
        if implementation == "pallas_hopper":
            forward += 4 * 4 * n * (v / 256) / MIB  # four sums per token and tile, then merged
        # A vocabulary without an even divisor is filled up, which copies the head.
        forward = forward if mosaic else 2 * forward  # XLA's logits lie in memory, one block
        extra = 0.0 if v % 2 == 0 else 2.5 * 2 * v * d / MIB
        yield case(what.format("forward"), logps, arguments, forward + extra, int(mosaic))
        both = jax.grad(logps, (0, 1))
        yield case(what.format("gradient"), both, arguments, gradient + extra, 2 * mosaic)

    def attend(q, k, v, intervals):
        return attention(q, k, v, intervals, q.shape[-1] ** -0.5)

    def loss(*x):
        return attend(*x).astype(jnp.float32).sum()

    blocks = 64 if mosaic else 5 * attention_xla.BLOCK_BYTES // MIB
    for name, (b, t, h, kv, d) in ATTENTION_SHAPES.items():
        if implementation == "pallas_hopper" and d > 128:
            continue  # refused: does not fit the registers
        q, k = ((b, t, h, d), jnp.bfloat16), ((b, t, kv, d), jnp.bfloat16)
        arguments = q, k, k, ((b, t, 4), jnp.int32)
        padded = b * -(-t // 512) * 512 * max(d, 128) * 2 / MIB
        held = padded * (h + 2 * kv)  # queries, keys and values, heads before length
        what = f"attention {{}}, {name} (B={b}, T={t}, H={h}/{kv}, D={d})"
        yield case(what.format("forward"), attend, arguments, blocks + 2.5 * held, int(mosaic))
        both = jax.grad(loss, (0, 1, 2))
        yield case(what.format("gradient"), both, arguments, blocks + 6 * held, 3 * mosaic)


def cudnn_cases() -> Iterator[Case]:
    """cuDNN's attention as the library calls it: full, and causal without intervals."""
    import jax
    import jax.numpy as jnp

    from aa_jax.kernels.attention.api import attention

    for name in ("CLIP-L/336", "Vicuna 7B", "Llama 3 8B"):
        b, t, h, kv, d = ATTENTION_SHAPES[name]
        causal = name != "CLIP-L/336"
        q, k = ((b, t, h, d), jnp.bfloat16), ((b, t, kv, d), jnp.bfloat16)

        def attend(q, k, v, causal=causal):
            return attention(q, k, v, causal=causal, impl="cudnn")

        def loss(*x, attend=attend):
            return attend(*x).astype(jnp.float32).sum()

        held = b * t * d * 2 * (h + 2 * kv) / MIB
        what = f"cuDNN attention {{}}, {name} (B={b}, T={t}, H={h}/{kv}, D={d})"
        yield Case(what.format("forward"), attend, (q, k, k), 64 + held, 1, "__cudnn$")
        both = jax.grad(loss, (0, 1, 2))
        yield Case(what.format("gradient"), both, (q, k, k), 64 + 3 * held, 2, "__cudnn$")


class Checked(NamedTuple):
    """What came of one case: the line to print, whether it passed, and its figures."""

    line: str
    passed: bool
    temporary_mib: float = math.nan
    facts: tuple[static.Facts, ...] = ()


def check(case: Case, device: Any, *, mosaic: bool, reports: Path | None = None) -> Checked:
    """Compiles one case for a device that need not exist.

    ``reports`` is the folder given to `static.prepare`, if it was.
    """
    import jax

    place = jax.sharding.SingleDeviceSharding(device)
    shapes = [jax.ShapeDtypeStruct(s, d, sharding=place) for s, d in case.arguments]
    start = time.perf_counter()
    try:
        compiled = jax.jit(case.function).lower(*shapes).compile()
    except Exception as error:  # whatever a compiler may raise belongs into the table
        return Checked(f"FAILED    {case.name}: {type(error).__name__}: {str(error)[:400]}", False)
    spent = time.perf_counter() - start
    temporary = compiled.memory_analysis().temp_size_in_bytes / MIB
    mosaic |= bool(case.kernels)
    found = compiled.as_text().count(f'custom_call_target="{case.call}') if mosaic else 0
    passed = temporary <= case.budget_mib and (not mosaic or found == case.kernels)
    facts = ()
    if reports and case.kernels:
        facts = tuple(static.take(reports, "tpu" if case.call.startswith("tpu") else "gpu"))
        # cuDNN reports nothing, and Mosaic for GPUs nothing of a kernel it compiled before.
        passed &= all(f.keeps_budget() for f in facts)
        passed &= case.call.startswith("__cudnn") or bool(facts)
    word = "ok        " if passed else "EXCEEDED  "
    kernels = f", {found} of {case.kernels} kernels" if mosaic else ""
    line = (
        f"{word}{case.name}: {temporary:.0f} of {case.budget_mib:.0f} MiB temporary{kernels}, "
        f"compiled in {spent:.0f} s"
    )
    return Checked(
        "\n".join([line, *(f"              {f}" for f in facts)]), passed, temporary, facts
    )


def table(device: str, case: Case, found: Checked) -> list[str]:
    """Rows of the Markdown table: one for every kernel, or one for the program."""
    start = f"| {device} | {case.name} | {found.temporary_mib:.0f} MiB |"
    if not found.facts:
        return [f"{start} | | | |"]
    return [
        f"{start} {f.kernel} | {f.kib / 1024:.1f} MiB | {f.spills} | {f.bundles or f.registers} |"
        for f in found.facts
    ]


_HEADING = [
    "| compiled for | program (bfloat16) | temporary | kernel | VMEM or SMEM | spills | bundles or "
    "registers |",
    "|---|---|---|---|---|---|---|",
]


def devices(options: argparse.Namespace) -> Iterator[tuple[str, Any]]:
    """(name, one device) of every target.

    Raises:
      ConfigError: a compiler that is not there.
    """
    from jax.experimental import topologies

    if options.platform == "gpu":
        text = Path(options.target).read_text() if options.target else GPU_TARGETS["h200"]
        wanted = [("1x1x1", dict(target_config=text))]
    else:
        wanted = [(name, {}) for name in options.topology or TOPOLOGIES]
    for name, kwargs in wanted:
        platform = "cuda" if options.platform == "gpu" else "tpu"
        key = "topology" if options.platform == "gpu" else "topology_name"
        try:
            topology = topologies.get_topology_desc(platform=platform, **{key: name}, **kwargs)
        except Exception as error:
            raise ConfigError(
                f"verify: there is no compiler for {platform} {name}: {str(error)[:300]} Install "
                f"{'libtpu, or name one with --libtpu' if platform == 'tpu' else 'the CUDA plugin'}"
                ", not older than jaxlib."
            ) from error
        yield name, topology.devices[0]


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--platform", choices=("tpu", "gpu"), required=True)
    parser.add_argument("--topology", action="append", help="of TPUs, e.g. v5e:2x2; repeatable")
    parser.add_argument("--libtpu", help="path of a libtpu.so")
    parser.add_argument("--target", help="file with the text of a GPU target config")
    parser.add_argument("--cuda", help="folder of JAX's CUDA plugin, ptxas and cuDNN")
    parser.add_argument("--match", default="", help="only cases whose name contains this")
    parser.add_argument("--no-reports", action="store_true", help="of the kernels, which take long")
    parser.add_argument("--table", type=Path, help="Markdown file for the figures")
    options = parser.parse_args(arguments)
    tpu = options.platform == "tpu"
    targets.prepare("v5e:2x2" if tpu else "h200:1", options.libtpu, options.cuda)
    failed = compiled = 0
    rows = list(_HEADING)
    with tempfile.TemporaryDirectory() as folder:
        reports = Path(folder)
        if not options.no_reports:
            static.prepare(reports, options.platform)
        for number, (name, device) in enumerate(devices(options)):
            sys.stdout.write(f"{name}: {device.device_kind}\n")
            where = ("tpu", 1, "") if tpu else ("cuda", 1, "9.0")
            target = targets.Target(*where, device.device_kind)
            programs = cases("pallas_tpu") if tpu else itertools.chain(
                cases("pallas_hopper"), cases("xla"), cudnn_cases()
            )  # fmt: skip
            with targets.compiling_for(target):
                for case in programs:
                    if options.match not in case.name or (number and not _probe(case)):
                        continue
                    kept = None if options.no_reports else reports
                    found = check(case, device, mosaic=tpu, reports=kept)
                    compiled, failed = compiled + 1, failed + (not found.passed)
                    rows += table(name if tpu else "H200", case, found)
                    sys.stdout.write(f"  {found.line}\n")
                    sys.stdout.flush()
                    if options.table:
                        options.table.write_text("\n".join(rows) + "\n")
    sys.stdout.write(f"{compiled - failed} of {compiled} programs compile within their budgets\n")
    return 1 if failed or not compiled else 0


if __name__ == "__main__":
    sys.exit(main())
