"""What compilers write about a kernel they compiled: fast memory, registers, spills, bundles.

libtpu and Mosaic's GPU compiler leave such reports in a folder when asked to before they start;
`prepare` asks, `take` reads what came since and empties the folder (reports of one program take
some 100 MB). The counts are static: every instruction once, however often it runs.
"""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

KIB = 1024

VMEM_KIB = 16 * KIB
"""What a TPU kernel may hold in vector memory: the scoped limit of the smallest chip's compiler."""

SPILL_SHARE = {"linear_logprob": 0.05, "attention": 0.2}
"""Most spill stores per bundle of a TPU kernel, by how its name begins; stores are one slot of
several in a bundle. Attention's largest tiles, of v6e, come to 0.16."""

SMEM_KIB = 227
"""Shared memory of a thread block on Hopper."""

REGISTERS = 168
"""Registers per thread of three warpgroups on Hopper."""


class Body(NamedTuple):
    """A stretch of a TPU kernel that multiplies matrices: what a grid step runs, or one way of it.

    Attributes:
      cycles: of its schedule, one per instruction bundle and the waits between them, for results of
        the matrix units above all; waits for memory are not known to the compiler.
      spills: spill stores among them.
    """

    cycles: int
    spills: int


class Facts(NamedTuple):
    """One compiled kernel.

    Attributes:
      kernel: its name.
      kib: vector memory (TPU) or shared memory (GPU).
      spills: spill stores (TPU) or bytes of them (GPU).
      bundles: instruction bundles, TPU only.
      registers: per thread, GPU only.
      bodies: TPU only, in the order of the program.
    """

    kernel: str
    kib: float
    spills: int
    bundles: int = 0
    registers: int = 0
    bodies: tuple[Body, ...] = ()

    def __str__(self) -> str:
        if self.registers:
            return (
                f"{self.kernel}: {self.kib:.0f} of {SMEM_KIB} KiB SMEM, {self.registers} of "
                f"{REGISTERS} registers, {self.spills} bytes spilled"
            )
        return (
            f"{self.kernel}: {self.kib / KIB:.1f} of {VMEM_KIB // KIB} MiB VMEM, {self.spills} "
            f"spill stores in {self.bundles} bundles"
            + "".join(f", {b.spills} in {b.cycles} cycles of a matmul body" for b in self.bodies)
        )

    def keeps_budget(self) -> bool:
        """Whether all of it is within what this module allows."""
        if self.registers:
            return self.kib <= SMEM_KIB and self.registers <= REGISTERS and not self.spills
        share = next(n for start, n in SPILL_SHARE.items() if self.kernel.startswith(start))
        return self.kib <= VMEM_KIB and self.spills <= share * self.bundles


def prepare(folder: Path, platform: str) -> None:
    """Asks the compiler for reports; call before the first JAX operation.

    Args:
      folder: where reports go, and where `take` empties.
      platform: "tpu" or "gpu".
    """
    folder.mkdir(parents=True, exist_ok=True)
    if platform == "tpu":
        flags = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"
        os.environ["LIBTPU_INIT_ARGS"] = f"{os.environ.get('LIBTPU_INIT_ARGS', '')} {flags}".strip()
    else:
        os.environ["MOSAIC_GPU_DUMP_TO"] = str(folder)
        os.environ["MOSAIC_GPU_DUMP_PTXAS"] = "1"


def take(folder: Path, platform: str) -> list[Facts]:
    """Facts of the kernels compiled since the last call, in alphabetical order."""
    found = sorted(set(_tpu(folder) if platform == "tpu" else _gpu(folder)))
    for path in folder.iterdir():
        path.unlink()
    return found


_TPU_KERNEL = re.compile(
    r"\d+-\w*?((?:attention|linear_logprob)_(?:forward|dq|dkv|dlogits)|splash_mha_(?:fwd|dq|dkv))"
    r"(?:_segmented)?(?:_residuals|_no_residuals)?_*(?:\.\d+)*-\d+-final_hlo"
)
_ALLOCATION = re.compile(r"^ *(#\w+) \[.*space=vmem, size = (0x[0-9a-f]+)", re.MULTILINE)


def _tpu(folder: Path) -> Iterator[Facts]:
    for path in folder.glob("*final_hlo-static-per-bundle-utilization.txt"):
        if not (name := _TPU_KERNEL.match(path.name)):
            continue  # of XLA's own operations
        slots, bundles = _use(path)
        spills = sum(int(line[slots.index("VSTORE:SPILL")]) for line in bundles)
        prefix = re.match(r"(.*?)-\d+-final_hlo", path.name)[1]
        # At the end empty bundles become waits of others; before, they still can be counted.
        (scheduled,) = folder.glob(f"{prefix}-??-packed-bundles-post-ra.txt")
        (waiting,) = folder.glob(f"{prefix}-??-pre-delay_hlo-static-per-bundle-utilization.txt")
        bodies = _bodies(scheduled, *_use(waiting))
        (report,) = folder.glob(f"{prefix}-??-post-ra.txt")
        vmem = sum(int(size, 16) for size in dict(_ALLOCATION.findall(report.read_text())).values())
        yield Facts(name[1], vmem / KIB, spills, bundles=len(bundles), bodies=bodies)


def _use(path: Path) -> tuple[list[str], list[list[str]]]:
    """(names of the slots, how many of each every bundle uses)."""
    head, _, body = path.read_text().partition("== UTILIZATION:")
    slots = [x.strip() for x in head.strip().splitlines()[1].split(",")]
    return slots, [line.split() for line in body.strip().splitlines()]


_BUNDLE = re.compile(r" *(0x[0-9a-f]+|0)\s+(?:[A-Z]{2} *)?: ")


def _bodies(path: Path, slots: list[str], bundles: list[list[str]]) -> tuple[Body, ...]:
    """Regions of predicated or repeated code with matrix products, from the compiler's remarks.

    Every bundle belongs to the innermost region open at it; one line of ``bundles`` is one bundle.
    """
    regions: dict[str, list[int]] = {}
    opened = ["all"]
    for line in path.read_text().splitlines():
        opened += re.findall(r"Start region (\d+)", line)
        if bundle := _BUNDLE.match(line):
            regions.setdefault(opened[-1], []).append(int(bundle[1], 0))
        for name in re.findall(r"End region (\d+)", line):
            if name in opened:
                opened.remove(name)

    def total(slot: str, rows: list[int]) -> int:
        return sum(int(bundles[row][slots.index(slot)]) for row in rows)

    return tuple(
        Body(len(rows), total("VSTORE:SPILL", rows))
        for rows in regions.values()
        if total("MXU", rows)
    )


def _gpu(folder: Path) -> Iterator[Facts]:
    for path in folder.glob("*.ptxas"):
        text, passes = path.read_text(), path.with_suffix(".mlir-passes.log").read_text()
        shared = max(map(int, re.findall(r"dynamic_shared_memory_size %c(\d+)_i32", passes)))
        yield Facts(
            re.sub(r"_\d+$", "", path.stem),
            shared / KIB,
            int(re.search(r"(\d+) bytes spill stores", text)[1]),
            registers=int(re.search(r"Used (\d+) registers", text)[1]),
        )
