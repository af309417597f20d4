"""What a compiled program sends between devices, read from its text."""

import dataclasses
import re
from collections import defaultdict
from collections.abc import Sequence

KINDS = (
    "all-gather", "reduce-scatter", "all-reduce", "all-to-all", "ragged-all-to-all",
    "collective-permute", "collective-broadcast",
)  # fmt: skip
_BITS = {"pred": 8, "s4": 4, "u4": 4, "token": 0, "opaque": 0}
_HEADER = re.compile(r"^(?:ENTRY )?(%[\w.\-]+) \(.*\{\s*$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?(%[\w.\-]+) = (.*)$")
_CALLED = re.compile(
    r"(?:calls|to_apply|called_computations|true_computation|false_computation)="
    r"(?:\{([^}]*)\}|(%[\w.\-]+))"
)
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_WHILE = re.compile(r"condition=(%[\w.\-]+), body=(%[\w.\-]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_SHAPE = re.compile(r"\b([a-z]+\d*(?:e\d+m\d+\w*)?)\[([\d,]*)\]")
_OPERATION = re.compile(r"^(?:\(.*?\)|[^\s(]+) ([\w\-]+)\(")


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Collectives of one kind in one call of a program, on one device.

    Attributes:
      count: executed instructions, loops unrolled.
      bytes: of their results (of a reduce-scatter its operands): the full array on each device.
    """

    count: int
    bytes: int


def collectives(text: str) -> dict[str, Traffic]:
    """Collectives of a program by kind, those in loops as often as they run.

    A loop's trip count is what the compiler notes, or else the constant its condition compares the
    counter with over what its body adds to the counter, from 0. A collective that the compiler has
    cut into pieces which run beside other work (the same ``channel_id`` in several computations)
    counts once.

    Args:
      text: ``compiled.as_text()``.
    """
    computations, entry = _computations(text)
    times = _multiplicities(computations, entry)
    seen: dict[tuple[str, str], tuple[int, int]] = {}
    unnamed = 0
    for name, lines in computations.items():
        if not times.get(name):
            continue
        for instruction, rest in lines:
            match = _OPERATION.match(_strip_layouts(rest))
            operation = match[1] if match else ""
            kind = operation.removesuffix("-start")
            if kind not in KINDS:
                continue
            channel = re.search(r"channel_id=(\d+)", rest)
            unnamed += channel is None
            key = kind, channel[1] if channel else f"{instruction}#{unnamed}"
            size = _size(rest, kind, started=operation.endswith("-start"))
            # Of its pieces, those that start and end it run once, those in between in a loop.
            known = seen.get(key, (times[name], size))
            seen[key] = min(known[0], times[name]), max(known[1], size)
    out: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for (kind, _), (count, size) in seen.items():
        out[kind][0] += count
        out[kind][1] += count * size
    return {kind: Traffic(*out[kind]) for kind in KINDS if kind in out}


def custom_calls(text: str) -> dict[str, int]:
    """Targets of the custom calls of a program (HLO or StableHLO), and how many there are."""
    found = re.findall(r'custom_call_target="([^"]+)"', text)
    found += re.findall(r"stablehlo\.custom_call @([\w.$]+)", text)
    return {name: found.count(name) for name in sorted(set(found))}


def _computations(text: str) -> tuple[dict[str, list[tuple[str, str]]], str]:
    out: dict[str, list[tuple[str, str]]] = {}
    current = entry = ""
    for line in text.splitlines():
        if header := _HEADER.match(line):
            current = header[1]
            out[current] = []
            if line.startswith("ENTRY"):
                entry = current
        elif current and (found := _INSTRUCTION.match(line)):
            out[current].append((found[1], found[2]))
        elif line.startswith("}"):
            current = ""
    return out, entry


def _multiplicities(computations: dict[str, list[tuple[str, str]]], entry: str) -> dict[str, int]:
    """How often each computation runs per call of the program."""
    times: dict[str, int] = defaultdict(int)
    pending = [(entry, 1)]
    while pending:  # a call graph without cycles
        name, factor = pending.pop()
        times[name] += factor
        for _, rest in computations.get(name, ()):
            if loop := _WHILE.search(rest):
                trips = _trips(rest, computations.get(loop[1], ()), computations.get(loop[2], ()))
                pending.append((loop[2], factor * trips))
                continue
            for group, single in _CALLED.findall(rest):
                names = re.findall(r"%[\w.\-]+", group) or [single]
                pending += [(called, factor) for called in names if called in computations]
            for group in _BRANCHES.findall(rest):
                pending += [(called, factor) for called in re.findall(r"%[\w.\-]+", group)]
    return times


def _trips(loop: str, condition: Sequence[tuple[str, str]], body: Sequence[tuple[str, str]]) -> int:
    if known := _TRIPS.search(loop):
        return int(known[1])
    constants, elements = _constants(condition), _elements(condition)
    for _, rest in condition:
        if "direction=LT" in rest and "compare(" in rest:
            operands = _operands(rest, "compare")
            bounds = [constants[name] for name in operands if name in constants]
            counters = [elements[name] for name in operands if name in elements]
            if bounds:
                return -(-bounds[0] // _increment(body, counters[0] if counters else None))
    # The comparison lies in a fusion that is handed its bound.
    return max(constants.values(), default=1)


def _increment(body: Sequence[tuple[str, str]], element: int | None) -> int:
    """What a loop's body adds to its counter, an element of the carried tuple."""
    if element is None or not body:
        return 1
    constants, named = _constants(body), dict(body)
    results = _operands(body[-1][1], "tuple")
    if element >= len(results) or " add(" not in named.get(results[element], ""):
        return 1
    added = _operands(named[results[element]], "add")
    return next((constants[name] for name in added if constants.get(name)), 1)


def _constants(lines: Sequence[tuple[str, str]]) -> dict[str, int]:
    found = ((name, re.search(r"\bconstant\((\d+)\)", rest)) for name, rest in lines)
    return {name: int(value[1]) for name, value in found if value}


def _elements(lines: Sequence[tuple[str, str]]) -> dict[str, int]:
    found = ((name, re.search(r"get-tuple-element\(.*index=(\d+)", rest)) for name, rest in lines)
    return {name: int(value[1]) for name, value in found if value}


def _operands(rest: str, operation: str) -> list[str]:
    inside = _strip_layouts(rest).split(f" {operation}(", 1)[-1].split(")")[0]
    return re.findall(r"%[\w.\-]+", inside)


def _strip_layouts(rest: str) -> str:
    return re.sub(r"\{[^{}]*\}", "", rest)


def _size(rest: str, kind: str, *, started: bool) -> int:
    """Bytes of the whole arrays that are gathered, reduced or passed on."""
    head = _strip_layouts(rest).split(f"{kind}-start(" if started else f"{kind}(")[0]
    sizes = [_bytes(*shape) for shape in _SHAPE.findall(head)]
    total = sum(size for size in sizes if size > 8)  # not counters and semaphores
    pieces = _group_size(rest)
    if kind in ("all-gather", "reduce-scatter") and started:
        return total * pieces // (pieces + 1)  # operands and results
    if kind in ("all-to-all", "ragged-all-to-all", "collective-permute") and started:
        return total // 2
    return total * pieces if kind == "reduce-scatter" else total


def _group_size(rest: str) -> int:
    """Devices that take part together."""
    if counted := re.search(r"replica_groups=\[\d+,(\d+)\]", rest):
        return int(counted[1])
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", rest):
        return listed[1].count(",") + 1
    pieces = 1
    if mesh := re.search(r"replica_groups=mesh\[([^\]]*)\] ?\{([^}]*)\}", rest):
        extent = dict(re.findall(r"'(\w+)'=(\d+)", mesh[1]))
        for axis in re.findall(r"'(\w+)'", mesh[2]):
            pieces *= int(extent.get(axis, 1))
    return pieces


def _bytes(dtype: str, dims: str) -> int:
    bits = _BITS.get(dtype)
    if bits is None:
        number = re.search(r"\d+", dtype)
        bits = int(number[0]) if number else 0
    count = 1
    for dim in dims.split(","):
        count *= int(dim) if dim else 1
    return count * bits // 8
