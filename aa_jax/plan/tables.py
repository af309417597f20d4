"""Plans as text: one compiled step in full, or many of them as a Markdown table."""

from collections.abc import Mapping, Sequence
from typing import Any

from aa_jax.plan.measure import Figures
from aa_jax.platforms.chips import CHIPS, GIB

COLUMNS = (
    "what", "slice", "rows per device × accumulation", "remat", "parameters", "optimizer",
    "other roles", "temporaries", "total of usable GiB", "TFLOP per device", "gathered",
    "reduced", "fits",
)  # fmt: skip
_STEP = ("parameters", "optimizer state", "batch", "temporaries", "program")


def describe(figures: Figures) -> str:
    """One compiled step, line by line."""
    mesh = ", ".join(f"{name}={size}" for name, size in figures.mesh.items()) or "one device"
    lines = [
        f"{figures.topology}: {figures.devices} devices ({mesh}), {figures.compiler}",
        f"  {figures.rows:g} rows per device and micro-batch, {figures.accumulation} "
        f"micro-batches, remat {figures.remat or 'none'}; compiled in {figures.seconds:.0f} s",
    ]
    if figures.refused:
        lines.append(f"  does not fit: {figures.refused}")
    for name, size in figures.memory.items():
        beside = "" if name in _STEP else "  (beside the step)"
        lines.append(f"  {name:<20}{size / GIB:9.2f} GiB per device{beside}")
    if figures.memory:
        lines.append(f"  {'total':<20}{figures.total / GIB:9.2f} GiB per device")
    if figures.host:
        lines.append(f"  {'in host memory':<20}{figures.host / GIB:9.2f} GiB per device")
    if figures.usable:
        word = "fits" if figures.fits else "does NOT fit"
        lines.append(f"  {word} into {figures.usable / GIB:.2f} GiB per device")
    lines.append(
        f"  {figures.flops / 1e12:.1f} TFLOP per device and step; the model's own "
        f"{figures.model_flops / 1e12:.1f}"
    )
    if seconds := least_seconds(figures):
        lines.append(
            f"  at peak arithmetic a step would take {seconds:.2f} s: a bound, no estimate"
        )
    for kind, traffic in figures.traffic.items():
        lines.append(f"  {kind:<20}{traffic.bytes / GIB:9.2f} GiB in {traffic.count} calls")
    return "\n".join(lines)


def least_seconds(figures: Figures) -> float | None:
    """Seconds of a step at the chip's peak; None where the chip is unknown."""
    chip = CHIPS.get(figures.topology.split(":")[0])
    return figures.flops / chip.peak if chip else None


def markdown(entries: Sequence[Mapping[str, Any]]) -> str:
    """A table of entries {"what", "figures": Figures.as_dict()}."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    lines += ["| " + " | ".join(_cells(e["what"], e["figures"])) + " |" for e in entries]
    return "\n".join(lines) + "\n"


def _cells(what: str, f: Mapping[str, Any]) -> list[str]:
    memory, traffic = f["memory"], f["traffic"]
    gib = lambda size: f"{size / GIB:.2f}"  # noqa: E731
    beside = sum(size for name, size in memory.items() if name not in _STEP)
    moved = lambda *kinds: gib(  # noqa: E731
        sum(traffic[kind]["bytes"] for kind in kinds if kind in traffic)
    )
    usable = f" of {gib(f['usable'])}" if f["usable"] else ""
    held = [gib(memory[name]) for name in ("parameters", "optimizer state")] if memory else ["", ""]
    if memory and f.get("host"):
        held[1] += f" (+ {gib(f['host'])} on the host)"
    return [
        what, f["topology"], f"{f['rows']:g} × {f['accumulation']}", f["remat"], *held,
        gib(beside) if memory else "", gib(memory["temporaries"]) if memory else "",
        (gib(f["total"]) if f["total"] else "more") + usable, f"{f['flops'] / 1e12:.0f}",
        moved("all-gather", "collective-permute") if traffic else "",
        moved("reduce-scatter", "all-reduce", "all-to-all") if traffic else "",
        {True: "yes", False: "no", None: "not judged"}[f["fits"]],
    ]  # fmt: skip
