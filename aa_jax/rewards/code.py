"""Code judged by unit tests, in the sandbox; no verdict is made where the code could reach it."""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from aa_jax.errors import ConfigError, DataError
from aa_jax.rewards.base import Request, Result
from aa_jax.rewards.sandbox.runner import Jail, Limits, choose, pump, python_command, run

log = logging.getLogger(__name__)

_FENCE = re.compile(r"```[ \t]*(\w*)[^\n]*\n(.*?)```", re.DOTALL)
HARNESS = Path(__file__).parent / "sandbox" / "harness.py"


def code_of(text: str) -> str | None:
    """The program of a response: its last fenced Python block behind ``</think>``.

    A response without any fence is taken whole (without its thought and its ``<answer>`` tags):
    base models answer with bare code.
    """
    text = text.rpartition("</think>")[2]
    blocks = [(tag.lower(), code) for tag, code in _FENCE.findall(text)]
    python = [code for tag, code in blocks if tag in ("python", "py", "python3", "")]
    if python:
        return python[-1]
    bare = re.sub(r"</?answer>", "", text).strip()
    return bare if bare and not blocks else None


class UnitTests:
    """The tests of one problem.

    Attributes:
      pairs: (standard input, expected standard output) of programs.
      asserts: statements about the solution's functions.
      setup: run before each of the asserts.
    """

    def __init__(self, pairs: Sequence = (), asserts: Sequence = (), setup: str = ""):
        self.pairs, self.asserts, self.setup = list(pairs), list(asserts), setup

    @classmethod
    def read(cls, reference: Any) -> UnitTests:
        """Tests in any of the usual forms, or as the JSON text of one.

        - ``["assert f(1) == 2", ...]`` or ``{"asserts": [...], "setup": "import math"}`` (MBPP)
        - ``{"test": "def check(candidate): ...", "entry_point": "f"}`` (HumanEval)
        - ``{"inputs": [...], "outputs": [...]}``, with ``"fn_name"`` the arguments and results of
          that function, else standard input and output (APPS)

        Raises:
          DataError: it is none of these, or holds no test.
        """
        if isinstance(reference, str):
            try:
                reference = json.loads(reference)
            except json.JSONDecodeError as error:
                raise DataError(f"the tests are not JSON: {error}") from error
        if isinstance(reference, Sequence) and not isinstance(reference, str):
            reference = {"asserts": reference}
        if not isinstance(reference, Mapping):
            raise DataError(f"tests are a list or a mapping, not {type(reference).__name__}.")
        setup = str(reference.get("setup") or "")
        if reference.get("test"):
            entry = reference.get("entry_point")
            if not entry:
                raise DataError("'test' calls check(candidate): 'entry_point' names the candidate.")
            return cls(asserts=[f"{reference['test']}\ncheck({entry})\n"], setup=setup)
        if reference.get("asserts"):
            return cls(asserts=[str(test) for test in reference["asserts"]], setup=setup)
        pairs = list(zip(reference.get("inputs") or (), reference.get("outputs") or (),
                         strict=False))  # fmt: skip
        if not pairs or len(reference["inputs"]) != len(reference["outputs"]):
            raise DataError(
                f"no tests in {', '.join(map(str, reference)) or 'an empty mapping'}; give "
                "'asserts', 'test' and 'entry_point', or as many 'inputs' as 'outputs'."
            )
        if name := reference.get("fn_name"):
            calls = [f"assert {name}(*{list(given)!r}) == {out!r}" for given, out in pairs]
            return cls(asserts=calls, setup=setup)
        return cls(pairs=[(_lines(given), _lines(out)) for given, out in pairs])

    def __len__(self) -> int:
        return len(self.pairs) + len(self.asserts)


def _lines(text: Any) -> str:
    return "\n".join(map(str, text)) if isinstance(text, (list, tuple)) else str(text)


class CodeTests:
    """Value 1 if the program passes all its tests, else 0 (or the share it passes).

    The reference holds the tests, see `UnitTests.read`; unreadable or absent tests mask the sample.
    What a program does to its judge (endless loop, crash, flood, attempts to leave the sandbox) is
    a failed test.

    Args:
      partial: pay the share of passed tests instead of all or nothing.
      most_tests: tests run per problem, from the first.
      workers: programs judged at a time; None: one per core but one.
      isolation: see `aa_jax.rewards.sandbox`; "auto" refuses to run uncontained.
      readable: further folders programs may read, e.g. of packages to import.
      limits: keyword arguments of `aa_jax.rewards.sandbox.Limits`, per program run; all asserts
        of a problem are one run.

    Raises:
      RewardError: this machine cannot contain a program.
      ConfigError: a limit that does not exist.
    """

    overlaps = True

    def __init__(
        self,
        *,
        partial: bool = False,
        most_tests: int = 20,
        workers: int | None = None,
        isolation: str = "auto",
        readable: Sequence[str] = (),
        limits: Mapping[str, Any] | None = None,
    ):
        try:
            self.limits = Limits(**(limits or {}))
        except TypeError as error:
            raise ConfigError(f"limits of the sandbox: {error}") from error
        self.partial, self.most_tests, self.readable = partial, most_tests, tuple(readable)
        self.isolation = choose(isolation)
        workers = workers or max(1, (os.cpu_count() or 2) - 1)
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="code-reward")
        log.info("code is judged under %s isolation, %d at a time", self.isolation, workers)

    def __call__(self, requests: Sequence[Request]) -> list[Result]:
        return list(self._threads.map(self._judge, requests))

    def close(self) -> None:
        """Ends the threads."""
        self._threads.shutdown(cancel_futures=True)

    def _judge(self, request: Request) -> Result:
        if request.reference is None:
            return Result.invalid("no tests", "the reference is None")
        try:
            tests = UnitTests.read(request.reference)
        except DataError as error:
            return Result.invalid("unreadable tests", str(error))
        total = min(len(tests), self.most_tests)
        code = code_of(request.response)
        if code is None:
            return Result(0.0, parts={"passed": 0.0, "tests": float(total)}, detail="no code")
        if tests.pairs:
            passed, detail = self._run_pairs(code, tests.pairs[:total])
        else:
            passed, detail = self._run_asserts(code, tests, total)
            if passed is None:
                return Result.invalid("tests do not start", detail)
        share = passed / total
        value = share if self.partial else float(passed == total)
        return Result(value, parts={"passed": share, "tests": float(total)}, detail=detail)

    def _run_pairs(self, code: str, pairs: Sequence) -> tuple[int, str]:
        passed, detail = 0, ""
        for given, expected in pairs:
            outcome = run(
                python_command("main.py"), {"main.py": code}, stdin=given, limits=self.limits,
                isolation=self.isolation, readable=self.readable,
            )  # fmt: skip
            good = outcome.status == "ok" and _normal(outcome.stdout) == _normal(expected)
            passed += good
            if not good:
                last = outcome.stderr.strip().rpartition("\n")[2]
                detail = detail or f"{outcome.status}: {last or outcome.stdout[:100]!r}"
                if not self.partial:
                    break
        return passed, detail

    def _run_asserts(self, code: str, tests: UnitTests, total: int) -> tuple[int | None, str]:
        """(tests passed, or None if the tests cannot even start; what went wrong)."""
        spec = {"setup": tests.setup, "tests": tests.asserts[:total]}
        harness = HARNESS.read_text(encoding="utf-8")
        options = dict(limits=self.limits, isolation=self.isolation, readable=self.readable)
        with ExitStack() as stack:
            asked, ask = os.pipe()
            answers, answer = os.pipe()
            try:
                solution = stack.enter_context(
                    Jail([*python_command("harness.py"), "solve"],
                         {"harness.py": harness, "solution.py": code},
                         stdin=asked, stdout=answer, stderr=answer, **options)
                )  # fmt: skip
                checker = stack.enter_context(
                    Jail([*python_command("harness.py"), "check"],
                         {"harness.py": harness, "tests.json": json.dumps(spec)},
                         stdin=answers, stderr=ask, **options)
                )  # fmt: skip
            finally:
                for end in (asked, ask, answers, answer):
                    os.close(end)
            output = {checker.process.stdout: bytearray()}
            status = pump(checker, b"", output, self.limits)
            solution.check_started()
            checker.check_started()
        lines = [json.loads(line) for line in bytes(*output.values()).splitlines(keepends=True)
                 if line.endswith(b"\n")]  # fmt: skip
        if not lines:  # the first is written before the solution is spoken to
            return None, f"a syntax error in the tests, or no time to read them ({status})"
        results = lines[1:]
        reasons = [reason for good, reason in results if not good]
        if len(results) < total:
            reasons.append(status)
        return sum(good for good, _ in results), reasons[0] if reasons else ""


def _normal(text: str) -> list[str]:
    """Lines without trailing spaces, without blank lines at the end."""
    return [line.rstrip() for line in text.rstrip().splitlines()]
