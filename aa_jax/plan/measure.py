"""What a train step needs, by compiling it: memory per device, arithmetic, traffic."""

import dataclasses
import math
import re
import time
from typing import Any

import jax

from aa_jax.plan.hlo import Traffic, collectives
from aa_jax.plan.program import Program
from aa_jax.plan.targets import Slice
from aa_jax.sharding.rules import HOST
from aa_jax.training.flops import matmul_flops, model_flops

_USED = re.compile(r"(?:Used|required for HLO temporaries) \(?([\d.]+)([KMGT])i?B?")
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclasses.dataclass(frozen=True)
class Figures:
    """One compiled step; bytes and FLOPs are per device.

    Attributes:
      topology: what it was compiled for.
      compiler: what compiled it.
      devices: how many there are.
      mesh: axis -> size, those above 1.
      rows: examples per micro-batch and device.
      accumulation: micro-batches.
      remat: recomputation policy, as given.
      tokens: per update over all devices, padding included.
      memory: what the bytes are for: parameters, optimizer state, batch, temporaries (activations,
        gradients, gathered weights), program, and what is resident beside the step. Empty where the
        compiler refused.
      host: bytes per device that lie in its host's memory instead (offload).
      total: bytes in all on the device; of a refused program what the compiler says it would need.
      usable: bytes a device offers to programs; None for CPU devices.
      fits: whether it does; None for CPU devices.
      flops: matrix products of a step, recomputation included.
      model_flops: 6 per trained weight and token, 2 per frozen one.
      traffic: collectives by kind, loops unrolled.
      seconds: compile time, tracing not included.
      refused: the compiler's words.
    """

    topology: str
    compiler: str
    devices: int
    mesh: dict[str, int]
    rows: float
    accumulation: int
    remat: str
    tokens: int
    memory: dict[str, int]
    total: int
    usable: float | None
    fits: bool | None
    flops: float
    model_flops: float
    traffic: dict[str, Traffic]
    seconds: float
    refused: str = ""
    host: int = 0

    def as_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return dataclasses.asdict(self)


def measure(program: Program, place: Slice, remat: str = "") -> Figures:
    """Compiles a step for devices that need not exist; call within ``place.tracing()``."""
    count = len(place.devices)
    traced = program.step.trace(program.state, program.batch)
    lowered = traced.lower()
    resident = {name: device_bytes(tree) for name, tree in program.resident.items()}
    usable = place.chip.usable if place.chip else None
    rows = program.batch["tokens"].shape[0]
    pieces = program.step.rows_multiple
    common = dict(
        topology=place.name, compiler=place.compiler, devices=count,
        mesh={name: size for name, size in program.mesh.shape.items() if size > 1},
        rows=rows / pieces, accumulation=program.step.accumulation, remat=remat,
        tokens=program.sequence_tokens, usable=usable,
        flops=matmul_flops(traced.jaxpr) / count,
        model_flops=model_flops(
            program.state["params"], program.trainable(), program.sequence_tokens
        ) / count,
        host=device_bytes(program.state, on_host=True),
    )  # fmt: skip
    start = time.perf_counter()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        found = _USED.search(str(error))
        needed = int(float(found[1]) * _UNITS[found[2]]) if found else 0
        words = " ".join(str(error).split())[:300]
        return Figures(
            **common, memory={}, total=needed + sum(resident.values()), fits=False, traffic={},
            seconds=time.perf_counter() - start, refused=words,
        )  # fmt: skip
    seconds = time.perf_counter() - start
    stats = compiled.memory_analysis()
    parameters = device_bytes(program.state["params"])
    optimizer = device_bytes(program.state["opt_state"])
    results = stats.output_size_in_bytes - stats.alias_size_in_bytes
    memory = {
        "parameters": parameters,
        "optimizer state": optimizer,
        "batch": max(stats.argument_size_in_bytes - parameters - optimizer, 0),
        "temporaries": stats.temp_size_in_bytes + max(results, 0),
        "program": stats.generated_code_size_in_bytes,
        **resident,
    }
    total = sum(memory.values())
    return Figures(
        **common, memory=memory, total=total, fits=None if usable is None else total <= usable,
        traffic=collectives(compiled.as_text()), seconds=seconds,
    )  # fmt: skip


def device_bytes(tree: Any, on_host: bool = False) -> int:
    """Bytes of a placed tree on each device, or what it has in its host's memory."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
        for x in jax.tree.leaves(tree)
        if (x.sharding.memory_kind == HOST) == on_host
    )
