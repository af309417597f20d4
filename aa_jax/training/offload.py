"""Updating arrays that lie in the host's memory, a few at a time.

An optimizer's state is needed for a moment only, each array of it with one parameter. Fetched all
at once it would fill the device as if it had never left. So an update is traced, taken apart into
the groups of operations that share such arrays, and run group by group: fetch, compute, write back,
and only then fetch the next.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax.extend.core import Literal

from aa_jax.sharding.rules import in_host_memory, on_device


def streamed(function: Callable[..., tuple[Any, Any]], held: Any, *others: Any) -> tuple[Any, Any]:
    """``function(held, *others)``, inside jit.

    Args:
      function: ``(held, *others) -> (new held, anything)``; new held has the tree and shapes of
        held.
      held: arrays; what of it lies in the host's memory is fetched in groups and goes back there.
      others: further arguments, on the devices.
    """
    flat, tree = jax.tree.flatten(held)
    if not any(map(in_host_memory, flat)):
        return function(held, *others)
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in flat]
    traced, result = jax.make_jaxpr(function, return_shape=True)(
        jax.tree.unflatten(tree, shapes), *others
    )
    program = _Program(_written_out(traced), [*flat, *jax.tree.leaves(others)], len(flat))
    return jax.tree.unflatten(jax.tree.structure(result), program.run())


def _written_out(closed: Any) -> Any:
    """The program without the calls that ask to be inlined, which newer versions of JAX keep: one
    of them over the whole state would tie all of it together."""
    if not any(map(_asks, closed.jaxpr.eqns)):
        return closed
    shapes = [
        jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype, weak_type=v.aval.weak_type)
        for v in closed.jaxpr.invars
    ]
    return jax.make_jaxpr(lambda *values: _call(closed, values))(*shapes)


def _asks(equation: Any) -> bool:
    return bool(equation.params.get("inline")) and "jaxpr" in equation.params


def _call(closed: Any, values: Any) -> list[Any]:
    jaxpr = closed.jaxpr
    env = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*closed.consts, *values), strict=True))
    _evaluate(jaxpr.eqns, env)
    return [_read(var, env) for var in jaxpr.outvars]


def _evaluate(equations: list[Any], env: dict[Any, Any]) -> None:
    for equation in equations:
        values = [_read(var, env) for var in equation.invars]
        if _asks(equation):
            found = _call(equation.params["jaxpr"], values)
        else:
            options = equation.primitive.get_bind_params(equation.params)
            found = equation.primitive.bind(*values, **options)
            found = found if equation.primitive.multiple_results else [found]
        env.update(zip(equation.outvars, found, strict=True))


def _read(var: Any, env: dict[Any, Any]) -> Any:
    return var.val if isinstance(var, Literal) else env[var]


class _Program:
    """A jaxpr, its arguments, and which of its operations belong together."""

    def __init__(self, closed: Any, values: list[Any], held: int):
        self.jaxpr = closed.jaxpr
        self.env = dict(zip(self.jaxpr.constvars, closed.consts, strict=True))
        self.host: dict[Any, Any] = {}
        for var, value in zip(self.jaxpr.invars, values, strict=True):
            (self.host if in_host_memory(value) else self.env)[var] = value
        # Those outputs go back to where the input at the same place of the tree came from.
        self.returned = {
            place
            for place, (var, out) in enumerate(
                zip(self.jaxpr.invars[:held], self.jaxpr.outvars[:held], strict=True)
            )
            if var in self.host and not isinstance(out, Literal)
        }

    def run(self) -> list[Any]:
        free, groups = self._groups()
        _evaluate(free, self.env)
        outputs: dict[int, Any] = {}
        before: list[Any] = []
        for inputs, equations in groups:
            arrays = [self.host[var] for var in inputs]
            if before:
                arrays = jax.lax.optimization_barrier((arrays, before))[0]
            self.env.update(zip(inputs, map(on_device, arrays), strict=True))
            _evaluate(equations, self.env)
            made = {var for equation in equations for var in equation.outvars} | set(inputs)
            mine = [n for n, out in enumerate(self.jaxpr.outvars)
                    if not isinstance(out, Literal) and out in made]  # fmt: skip
            for n in mine:
                value = self.env[self.jaxpr.outvars[n]]
                if n in self.returned:
                    value = jax.device_put(value, jax.memory.Space.Host)
                outputs[n] = value
            before = [outputs[n] for n in mine]
        rest = (n for n in range(len(self.jaxpr.outvars)) if n not in outputs)
        outputs |= {n: _read(self.jaxpr.outvars[n], self.env) for n in rest}
        return [outputs[n] for n in range(len(self.jaxpr.outvars))]

    def _groups(self) -> tuple[list[Any], list[tuple[list[Any], list[Any]]]]:
        """(operations without arrays of the host, groups of (arrays of the host, operations))."""
        leader = {var: var for var in self.host}  # union-find over the arrays of the host

        def find(var: Any) -> Any:
            while leader[var] is not var:
                var = leader[var]
            return var

        belongs: dict[Any, Any] = dict(leader)
        free, bound = [], []
        for equation in self.jaxpr.eqns:
            inputs = (v for v in equation.invars if not isinstance(v, Literal))
            leaders = [find(belongs[v]) for v in inputs if v in belongs]
            if not leaders:
                free.append(equation)
                continue
            for other in leaders[1:]:
                leader[find(other)] = find(leaders[0])
            belongs |= dict.fromkeys(equation.outvars, leaders[0])
            bound.append((equation, leaders[0]))
        groups: dict[Any, tuple[list[Any], list[Any]]] = {}
        for var in self.host:
            groups.setdefault(find(var), ([], []))[0].append(var)
        for equation, var in bound:
            groups[find(var)][1].append(equation)
        return free, list(groups.values())
