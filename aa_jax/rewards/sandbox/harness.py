"""Unit tests in one process, the solution in another; both sandboxed, plain data between them.

The names a test uses and does not define are looked up in the solution and called *there*. So a
solution cannot patch the assertions, overload ``==``, read the expected values, or leave with the
exit code of success: all it can do is answer with a value, and the right value is what it is asked
for.

A program of its own (standard library only): ``harness.py solve`` holds ``solution.py``,
``harness.py check`` runs ``tests.json``. JSON lines from check to solve, and back::

    ["global", name] | ["get", id, name] | ["call", id, args, kwargs]
    ["value", encoded] | ["error", type, message]
"""

import ast
import builtins
import importlib
import json
import os
import sys
import types

MOST_ITEMS = 100_000  # of an iterator: an endless one must not fill the memory
MOST_CHARACTERS = 1 << 22  # of one answer
ITERATORS = (types.GeneratorType, map, filter, zip, enumerate, reversed)


def encode(value, refer):
    """Plain data as tagged JSON; for anything else `refer` gives a number."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    for kind in (list, tuple, set, frozenset):
        if isinstance(value, kind):
            return [kind.__name__, [encode(item, refer) for item in value]]
    if isinstance(value, dict):
        return ["dict", [[encode(k, refer), encode(v, refer)] for k, v in value.items()]]
    if isinstance(value, (bytes, bytearray)):
        return ["bytes", value.hex()]
    if isinstance(value, complex):
        return ["complex", [value.real, value.imag]]
    if isinstance(value, range):
        return ["range", [value.start, value.stop, value.step]]
    for kind in (int, float, str):
        if isinstance(value, kind):
            return kind(value)
    if isinstance(value, ITERATORS):
        items = []
        for item in value:
            items.append(encode(item, refer))
            if len(items) > MOST_ITEMS:
                raise ValueError("an iterator without end")
        return ["iter", items]
    if type(value).__module__ == "numpy" and hasattr(value, "tolist"):
        return encode(value.tolist(), refer)
    return ["object", refer(value)]


def decode(value, find):
    """The inverse of `encode`; `find` gives the object of a number."""
    if not isinstance(value, list):
        return value
    tag, inner = value
    if tag == "object":
        return find(inner)
    if tag == "bytes":
        return bytes.fromhex(inner)
    if tag == "dict":
        return {decode(k, find): decode(v, find) for k, v in inner}
    if tag in ("complex", "range"):
        return {"complex": complex, "range": range}[tag](*inner)
    makers = {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset, "iter": iter}
    return makers[tag]([decode(item, find) for item in inner])


# The solution's side -----------------------------------------------------------------------------


def answer(space, objects, request):
    """The value a request asks for."""
    verb, target, *rest = request
    if verb == "global":
        if target not in space:
            raise NameError(f"name {target!r} is not defined")
        return space[target]
    if verb == "get":
        return getattr(objects[target], rest[0])
    args, kwargs = (decode(part, objects.__getitem__) for part in rest)
    return objects[target](*args, **kwargs)


def serve(source, requests, answers):
    """Runs the solution, then answers until nobody asks."""
    space = {"__name__": "solution", "__builtins__": builtins}
    objects = []
    failed = None

    def refer(value):
        objects.append(value)
        return len(objects) - 1

    try:
        exec(compile(source, "solution", "exec"), space)
    except BaseException as error:  # SystemExit too: a solution that leaves has no functions
        failed = error
    for line in requests:
        try:
            if failed is not None:
                raise failed
            text = json.dumps(["value", encode(answer(space, objects, json.loads(line)), refer)])
        except BaseException as error:
            text = json.dumps(["error", type(error).__name__, str(error)[:300]])
        answers.write(text + "\n")
        answers.flush()


# The tests' side ---------------------------------------------------------------------------------


class Remote:
    """An object of the solution. Compared by identity: no ``__eq__`` of the solution counts."""

    def __init__(self, link, number):
        self._link, self._number = link, number

    def __getattr__(self, name):
        if name.startswith("_"):
            raise AttributeError(name)
        return self._link.ask("get", self._number, name)

    def __call__(self, *args, **kwargs):
        return self._link.ask("call", self._number, encode(args, number), encode(kwargs, number))


def number(value):
    """The number of an object of the solution that is handed back to it."""
    if isinstance(value, Remote):
        return value._number
    raise TypeError(f"a test passes a {type(value).__name__}; only plain data can be passed")


class Link:
    """Requests to the solution, one at a time."""

    def __init__(self, answers, requests):
        self.answers, self.requests = answers, requests

    def ask(self, *request):
        self.requests.write(json.dumps(request) + "\n")
        self.requests.flush()
        line = self.answers.readline(MOST_CHARACTERS)
        if not line.endswith("\n"):
            raise RuntimeError("the solution ended, or answered too much")
        kind, *rest = json.loads(line)
        if kind == "value":
            return decode(rest[0], lambda index: Remote(self, int(index)))
        name, message = map(str, rest)
        error = getattr(builtins, name, None)
        if not (isinstance(error, type) and issubclass(error, Exception)):
            error = RuntimeError  # SystemExit and the like must not end the tests
        if issubclass(error, (UnicodeError, BaseExceptionGroup)):  # made of more than a message
            error = ValueError
        raise error(f"{name}: {message}")


def wanted(sources):
    """Names that are used, and neither defined in the sources nor builtins."""
    used, defined = set(), set(dir(builtins))
    for source in sources:
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Name):
                (used if isinstance(node.ctx, ast.Load) else defined).add(node.id)
            elif isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.AsyncFunctionDef)):
                defined.add(node.name)
            elif isinstance(node, ast.alias):
                defined.add((node.asname or node.name).split(".")[0])
            elif isinstance(node, ast.arg):
                defined.add(node.arg)
            elif isinstance(node, ast.ExceptHandler) and node.name:
                defined.add(node.name)
    return sorted(used - defined)


def look_up(name, link):
    """A name of the tests. Modules are the tests' own: a solution could bring a false `math`."""
    module = {"np": "numpy"}.get(name, name)
    if module in sys.stdlib_module_names or module == "numpy":
        return importlib.import_module(module)
    return link.ask("global", name)


def check(spec, link, report):
    """Runs each test with names of its own; one line [passed, reason] each."""
    names = wanted([spec["setup"], *spec["tests"]])
    report(["ready", ""])
    for test in spec["tests"]:
        missing = ""
        try:
            space = {"__name__": "tests", "__builtins__": builtins}
            for name in names:
                try:
                    space[name] = look_up(name, link)
                except Exception as error:  # no matter, unless this test uses it
                    missing = f"{error}, "
            for source in (spec["setup"], test):
                exec(compile(source, "test", "exec"), space)
            report([True, ""])
        except BaseException as error:
            report([False, f"{missing}{type(error).__name__}: {error}"[:300]])


def main():
    sys.set_int_max_str_digits(100_000)
    sys.setrecursionlimit(10_000)
    if sys.argv[1] == "solve":
        with open("solution.py", encoding="utf-8") as file:
            source = file.read()
        requests, answers = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
        silence()
        serve(source, requests, answers)
        return
    with open("tests.json", encoding="utf-8") as file:
        spec = json.load(file)
    answers, requests = os.fdopen(os.dup(0)), os.fdopen(os.dup(2), "w")
    results = os.fdopen(os.dup(1), "w")
    silence()

    def report(line):
        results.write(json.dumps(line) + "\n")
        results.flush()

    check(spec, Link(answers, requests), report)


def silence():
    """What is printed is no answer and no result."""
    nothing = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nothing, stream)


if __name__ == "__main__":
    main()
