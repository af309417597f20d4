"""Arithmetic of a traced program: matrix products and convolutions, loops as often as they run.

The compiler's own count takes a loop's body once, so with scanned layers it is off by their number.
"""

import math
import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.extend


def matmul_flops(jaxpr: Any) -> int:
    """Multiplications and additions of all matrix products and convolutions, on all devices.

    What a remat policy recomputes is counted as often as it runs; what no result depends on is not
    counted, as the compiler drops it. Of loops without a fixed number of rounds those that state
    their most (a scope "at_most_N", as attention in tiles has it) count so often, others once; of
    alternatives the dearest counts; what a custom kernel does inside is not seen.

    Args:
      jaxpr: a (closed) jaxpr.
    """
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    return _count(jaxpr, [True] * len(jaxpr.outvars))[0]


def _count(jaxpr: Any, wanted: Sequence[bool]) -> tuple[int, list[bool]]:
    """(FLOPs of what the wanted results need, which arguments that is)."""
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    pairs = zip(jaxpr.outvars, wanted, strict=True)
    alive = {id(v) for v, want in pairs if want}
    total = 0
    for equation in reversed(jaxpr.eqns):
        outs = [id(v) in alive for v in equation.outvars]
        if not any(outs) and not equation.effects:
            continue
        flops, reads = _equation(equation, outs)
        total += flops
        alive |= {id(v) for v, read in zip(equation.invars, reads, strict=True) if read}
    return total, [id(v) in alive for v in jaxpr.invars]


def _equation(equation: Any, wanted: Sequence[bool]) -> tuple[int, list[bool]]:
    name, params = equation.primitive.name, equation.params
    everything = [True] * len(equation.invars)
    if name == "dot_general":
        (contract, _), _ = params["dimension_numbers"]
        left = equation.invars[0].aval.shape
        depth = math.prod(left[axis] for axis in contract)
        return 2 * math.prod(equation.outvars[0].aval.shape) * depth, everything
    if name == "conv_general_dilated":
        kernel = equation.invars[1].aval.shape
        depth = math.prod(kernel) // kernel[params["dimension_numbers"].rhs_spec[0]]
        return 2 * math.prod(equation.outvars[0].aval.shape) * depth, everything
    if name == "scan":
        return _scan(equation, wanted)
    if name == "cond":
        found = [_count(branch, wanted)[0] for branch in params["branches"]]
        return max(found), everything
    if name == "while":
        body = params["body_jaxpr"]
        carry = len(equation.invars) - params["cond_nconsts"] - params["body_nconsts"]
        return _rounds(equation) * _count(body, [True] * carry)[0], everything
    if name == "shard_map":  # its shapes are those of one device
        flops, reads = _count(params["jaxpr"], wanted)
        return flops * math.prod(params["mesh"].shape.values()), reads
    total = 0
    for inner in _inner(params):
        jaxpr = getattr(inner, "jaxpr", inner)
        same = len(jaxpr.outvars) == len(wanted) and len(jaxpr.invars) == len(everything)
        if same:  # jit, remat, custom derivatives: one to one
            return _count(jaxpr, wanted)
        total += _count(jaxpr, [True] * len(jaxpr.outvars))[0]
    return total, everything


def _rounds(equation: Any) -> int:
    stated = re.findall(r"at_most_(\d+)", str(equation.source_info.name_stack))
    return int(stated[-1]) if stated else 1


def _scan(equation: Any, wanted: Sequence[bool]) -> tuple[int, list[bool]]:
    params = equation.params
    jaxpr = getattr(params["jaxpr"], "jaxpr", params["jaxpr"])
    # By their shapes, for JAX's parameters have changed names: what is sliced, or stacked, has one
    # axis more outside, and what is left of the results is carried.
    outside = [len(v.aval.shape) for v in (*equation.invars, *equation.outvars)]
    inside = [len(v.aval.shape) for v in (*jaxpr.invars, *jaxpr.outvars)]
    same = [a == b for a, b in zip(outside, inside, strict=True)]
    inputs = len(equation.invars)
    carry = sum(same[inputs:])
    consts = sum(same[:inputs]) - carry
    wanted = list(wanted)
    while True:  # a carried value that a wanted one reads is wanted in the round before
        flops, reads = _count(jaxpr, wanted)
        more = [w or r for w, r in zip(wanted[:carry], reads[consts:], strict=False)]
        if more == wanted[:carry]:
            return params["length"] * flops, reads
        wanted[:carry] = more


def _inner(params: Any) -> list[Any]:
    kinds = jax.extend.core.Jaxpr, jax.extend.core.ClosedJaxpr
    values = [v for value in params.values() for v in (
        value if isinstance(value, (tuple, list)) else (value,)
    )]  # fmt: skip
    return [value for value in values if isinstance(value, kinds)]


def model_flops(params: Any, trained: Any, tokens: int) -> int:
    """6 FLOPs per trained weight and token, 2 per frozen one: the model's own arithmetic, without
    attention scores and without recomputation (Kaplan et al. 2020, section 2.1). An estimate: every
    matrix is taken to meet every token, so towers and embeddings are counted as if they did.

    Args:
      params: all parameters, abstract or not.
      trained: those with gradients.
      tokens: per step.
    """
    count = lambda tree: sum(math.prod(x.shape) for x in jax.tree.leaves(tree))  # noqa: E731
    return tokens * (2 * count(params) + 4 * count(trained))
