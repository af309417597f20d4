"""Programs against their unit tests: right ones pass, and every way to fake it fails."""

import json

import pytest

from aa_jax.errors import ConfigError, DataError
from aa_jax.rewards.base import evaluate
from aa_jax.rewards.code import CodeTests, UnitTests, code_of

ADD = "def add(a, b):\n    return a + b\n"
ASSERTS = ["assert add(1, 2) == 3", "assert add(0, 0) == 0", "assert add([1], [2]) == [1, 2]"]


@pytest.fixture(scope="module")
def reward():
    judge = CodeTests(limits={"cpu_seconds": 1, "wall_seconds": 60.0, "memory_mb": 256})
    yield judge
    judge.close()


@pytest.fixture(scope="module")
def shares():
    judge = CodeTests(limits={"cpu_seconds": 1, "wall_seconds": 60.0}, partial=True)
    yield judge
    judge.close()


def test_right_and_wrong_functions(reward, shares, ask):
    wrong = "def add(a, b):\n    return 3\n"
    scores = evaluate(reward, [ask(ADD, ASSERTS), ask(wrong, ASSERTS), ask("", ASSERTS)])
    assert scores.values.tolist() == [1, 0, 0] and scores.valid.all()
    assert scores.counts["empty"] == 1
    (result,) = shares([ask(wrong, ASSERTS)])
    assert result.value == pytest.approx(1 / 3) and result.parts["tests"] == 3


@pytest.mark.parametrize(
    ("code", "tests"),
    [
        (ADD, {"test": "def check(candidate):\n    assert candidate(1, 2) == 3\n",
               "entry_point": "add"}),
        (ADD, {"inputs": [[1, 2], ["a", "b"]], "outputs": [3, "ab"], "fn_name": "add"}),
        ("class Solution:\n    def twice(self, x): return (x, {x: {1.5}}, None, b'a', 2j)",
         ["s = Solution()\nassert s.twice(4) == (4, {4: {1.5}}, None, b'a', 2j)"]),
        ("def f(x):\n    if x < 0: raise ValueError('negative')\n    yield from range(x)",
         ["try:\n    list(f(-1))\n    assert False\nexcept ValueError:\n    pass\n",
          "assert list(f(3)) == [0, 1, 2] and math.isclose(sum(f(3)), 3.0)"]),
        ("n = int(input())\nprint(n * 2)\n", {"inputs": ["3\n", "4"], "outputs": ["6", ["8"]]}),
        ("print(input()[::-1])", '{"inputs": ["ab"], "outputs": ["ba  \\n\\n"]}'),
    ],
)  # fmt: skip
def test_every_form_of_tests(reward, ask, code, tests):
    (result,) = reward([ask(f"<think>hm</think>\n```python\n{code}\n```\nDone.", tests)])
    assert result.value == 1.0, result.detail


FAKES = {
    "leaves": "import sys\nsys.exit(0)",
    "leaves at once": "import os\nos._exit(0)",
    "leaves when asked": "import os\ndef add(a, b): os._exit(0)",
    "raises exit": "def add(a, b): raise SystemExit(0)",
    "equals all": "class E:\n    def __eq__(s, o): return True\n    __hash__ = None\n"
                  "def add(a, b): return E()",
    "number that equals all": "class E(int):\n    def __eq__(s, o): return True\n"
                              "def add(a, b): return E(7)",
    "patches the judge": "import builtins, sys\n"
        "builtins.AssertionError = ValueError\n"
        "for n, m in list(sys.modules.items()):\n"
        "    if hasattr(m, 'check'): m.check = lambda *a: None\n"
        "def add(a, b): raise AssertionError",
    "walks the frames": "import sys, json\n"
        "def add(a, b):\n"
        "    f = sys._getframe()\n"
        "    while f:\n"
        "        for k, v in list(f.f_locals.items()):\n"
        "            if hasattr(v, 'write'): v.write(json.dumps([True, '']) * 5 + '\\n')\n"
        "        f = f.f_back\n",
    "writes results": "import os\nfor fd in range(20):\n"
        "    try: os.write(fd, b'[true, \"\"]\\n' * 5)\n    except OSError: pass\n",
    "brings its own builtins": "all = isinstance = len = sorted = lambda *a, **k: True\n"
        "def add(a, b): return None",
    "reads the tests": "import json\nprint(json.load(open('tests.json')))",
    "no syntax": "def add(a, b: return",
    "loops": "def add(a, b):\n    while True: pass",
    "answers without end": "def add(a, b):\n    while True: yield 1",
    "answers too much": "def add(a, b): return 'x' * (1 << 25)",
    "recurses": "def add(a, b): return add(a, b)",
    "forks": "import os\nwhile True: os.fork()",
}  # fmt: skip


@pytest.mark.parametrize("name", FAKES)
def test_success_cannot_be_faked(reward, ask, name):
    (result,) = reward([ask(FAKES[name], ASSERTS)])
    assert result.valid and result.value == 0.0 and result.parts["passed"] == 0.0, result


def test_helpers_of_the_tests_are_not_the_solution_s(reward, ask):
    """A test that forgot its import gets the real module, not one the solution made."""
    code = "class math:\n    isclose = staticmethod(lambda *a: True)\ndef add(a, b): return 0"
    (result,) = reward([ask(code, ["assert math.isclose(add(1, 2), 3)"])])
    assert result.value == 0.0


@pytest.mark.parametrize(
    "code", ["import os\nprint(6)\nos._exit(1)", "print(6)\nwhile True: pass", "print(5)",
             "import sys\nwhile True: sys.stdout.write('6' * 10000)", "print(6, 6)"]
)  # fmt: skip
def test_programs_that_do_not_print_and_end(reward, ask, code):
    (result,) = reward([ask(code, {"inputs": ["3"], "outputs": ["6"]})])
    assert result.valid and result.value == 0.0


@pytest.mark.parametrize(
    ("tests", "reason"),
    [(None, "no tests"), ([], "unreadable tests"), ("[", "unreadable tests"),
     ({"test": "def check(candidate): pass"}, "unreadable tests"), (7, "unreadable tests"),
     ({"inputs": ["1"], "outputs": []}, "unreadable tests"),
     (["assert add(1, 2 == 3"], "tests do not start")],
)  # fmt: skip
def test_tests_that_judge_nothing_mask_the_sample(reward, ask, tests, reason):
    (result,) = reward([ask(ADD, tests)])
    assert not result.valid and result.reason == reason


def test_only_the_first_tests_are_run(ask):
    reward = CodeTests(most_tests=2, limits={"wall_seconds": 60.0})
    (result,) = reward([ask(ADD, [*ASSERTS[:2], "assert False"])])
    assert result.value == 1.0 and result.parts["tests"] == 2
    reward.close()


def test_the_program_of_a_response():
    assert code_of("a\n```python\nx = 1\n```\nb\n```\ny = 2\n```") == "y = 2\n"
    assert code_of("<think>```python\nx = 1\n```</think> none") == "none"
    assert code_of("```json\n{}\n```") is None
    assert code_of("<answer>\nx = 1\n</answer>") == "x = 1"
    assert code_of("  ") is None


def test_bad_setups():
    with pytest.raises(DataError, match="entry_point"):
        UnitTests.read(json.dumps({"test": "def check(candidate): pass"}))
    with pytest.raises(ConfigError, match="limits of the sandbox: .*gpu_seconds"):
        CodeTests(limits={"gpu_seconds": 1})
