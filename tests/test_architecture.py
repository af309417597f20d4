"""The one-way street, read from the source: who may import whom, and how large a file may be."""

import ast
import importlib.metadata
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LIBRARY = sorted(
    path
    for folder in ("aa_jax", "kernels")
    for path in (ROOT / folder).rglob("*.py")
    if not path.is_relative_to(ROOT / "aa_jax" / "kernels")  # the symlink: seen as kernels/
)

# folder (or file) -> rooms it must not import
FORBIDDEN = {
    "aa_jax/losses": ["aa_jax.models", "aa_jax.data", "aa_jax.training", "aa_jax.objectives",
                      "aa_jax.config", "aa_jax.sharding", "aa_jax.sampling", "aa_jax.rl",
                      "ml_collections"],
    "aa_jax/models": ["aa_jax.training", "aa_jax.losses", "aa_jax.objectives", "aa_jax.data",
                      "aa_jax.config", "aa_jax.rl", "aa_jax.llf", "aa_jax.eval", "ml_collections"],
    "aa_jax/data": ["aa_jax.models", "aa_jax.training", "aa_jax.losses", "aa_jax.objectives",
                    "aa_jax.rl", "aa_jax.llf", "aa_jax.eval", "aa_jax.config", "ml_collections"],
    "aa_jax/sharding": ["aa_jax.models", "aa_jax.training", "aa_jax.data", "aa_jax.losses"],
    "aa_jax/report": ["aa_jax.models", "aa_jax.training", "aa_jax.data", "aa_jax.losses", "jax"],
    "aa_jax/platforms": ["aa_jax.models", "aa_jax.training", "aa_jax.data", "aa_jax.losses"],
    "kernels": ["aa_jax.models", "aa_jax.training", "aa_jax.data", "aa_jax.losses", "flax"],
    "aa_jax": ["torch", "trl", "kernels", "configs", "launch", "tests", "benchmarks"],
}  # fmt: skip

# Modules that come with a declared dependency.
COMES_WITH = {
    "numpy": "jax",
    "ml_dtypes": "jax",
    "etils": "orbax-checkpoint",
    "pyarrow": "datasets",
    "tokenizers": "transformers",
}


def name(path):
    return path.relative_to(ROOT).as_posix()


def imports(path):
    """(module, line) of every import in a file, also those inside functions."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), filename=str(path))):
        if isinstance(node, ast.Import):
            found += [(alias.name, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name(path)}:{node.lineno} imports relatively"
            found.append((node.module, node.lineno))
            # `from aa_jax import models` imports the room aa_jax.models
            found += [(f"{node.module}.{alias.name}", node.lineno) for alias in node.names]
    return found


def is_in(module, room):
    return module == room or module.startswith(room + ".")


@pytest.mark.parametrize("folder", FORBIDDEN)
def test_one_way_street(folder):
    wrong = [
        f"{name(path)}:{line} imports {module}"
        for path in LIBRARY
        if path.is_relative_to(ROOT / folder)
        for module, line in imports(path)
        if any(is_in(module, room) for room in FORBIDDEN[folder])
    ]
    assert not wrong, "\n".join(wrong)


def test_only_models_import_flax():
    wrong = [
        f"{name(path)}:{line} imports {module}"
        for path in LIBRARY
        if not path.is_relative_to(ROOT / "aa_jax" / "models")
        for module, line in imports(path)
        if is_in(module, "flax")
    ]
    assert not wrong, "\n".join(wrong)


def test_third_party_imports_are_declared():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project.get("optional-dependencies", {})
    requirements = project["dependencies"] + sum(
        (extras[extra] for extra in extras if extra != "test"), []
    )
    declared = {canonical(re.match(r"[\w.-]+", text)[0]) for text in requirements}
    distributions = importlib.metadata.packages_distributions()
    wrong = set()
    for path in LIBRARY:
        for module, line in imports(path):
            top = module.split(".")[0]
            if top in sys.stdlib_module_names or top == "aa_jax":
                continue
            owners = {canonical(owner) for owner in distributions.get(top, [top])}
            if not owners & declared and COMES_WITH.get(top) not in declared:
                wrong.add(f"{name(path)}:{line} imports {top}, which pyproject.toml does not name")
    assert not wrong, "\n".join(sorted(wrong))


def canonical(distribution):
    return re.sub(r"[-_.]+", "-", distribution).lower()


@pytest.mark.parametrize(
    ("folder", "most"),
    [("aa_jax", 500), ("kernels", 500), ("launch", 500), ("benchmarks", 500), ("tests", 600),
     ("configs", 80)],
)  # fmt: skip
def test_files_stay_small(folder, most):
    sizes = {
        name(path): len(path.read_text(encoding="utf-8").splitlines())
        for path in (ROOT / folder).rglob("*.py")
    }
    large = {path: lines for path, lines in sizes.items() if lines > most}
    assert not large, f"over {most} lines: {large}"


def test_library_logs_and_leaves_nothing_unfinished():
    wrong = []
    for path in LIBRARY:
        source = path.read_text(encoding="utf-8")
        for number, line in enumerate(source.splitlines(), start=1):
            if re.search(r"\b(TODO|FIXME|XXX)\b", line):
                wrong.append(f"{name(path)}:{number} {line.strip()}")
        if path.stem == "bench":  # a program of its own
            continue
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("print", "eval"):
                wrong.append(f"{name(path)}:{node.lineno} calls {node.func.id}()")
    assert not wrong, "\n".join(wrong)


def python(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT,
        env={**os.environ, **environment},
    )  # fmt: skip


def test_importing_the_package_is_fast_and_loads_nothing():
    code = (
        "import sys, time; before = time.perf_counter(); import aa_jax\n"
        "print(time.perf_counter() - before)\n"
        "heavy = {'jax', 'flax', 'numpy', 'torch', 'transformers', 'datasets'} & set(sys.modules)\n"
        "print(sorted(heavy))"
    )
    results = [python(code).stdout.split("\n") for _ in range(3)]
    assert min(float(result[0]) for result in results) < 0.05
    assert results[0][1] == "[]"


def test_every_module_imports_and_starts_nothing():
    modules = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for path in LIBRARY
    ]
    modules = [re.sub(r"^kernels\b", "aa_jax.kernels", module) for module in modules]
    # With a platform that does not exist, touching a device while importing raises.
    code = (
        "import importlib, sys\n"
        f"for module in {modules}:\n"
        "    try:\n"
        "        importlib.import_module(module)\n"
        "    except Exception as error:\n"
        "        print(f'{module}: {type(error).__name__}: {error}')\n"
        "print(*({'torch', 'trl', 'tensorflow'} & set(sys.modules)))"
    )
    result = python(code, JAX_PLATFORMS="none_at_all")
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.strip() == ""
