"""What is installed: aa_jax with its kernels, and no other top-level name."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def python_files(folder):
    """Paths of the Python files under `folder`, relative to it."""
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*.py")}


def test_kernels_is_not_a_package_of_its_own():
    # `import kernels` belongs to another project; with an __init__.py ours would shadow it.
    assert (ROOT / "kernels").is_dir()
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_symlink_resolves():
    link = ROOT / "aa_jax" / "kernels"
    assert os.readlink(link) == "../kernels"
    assert link.resolve() == ROOT / "kernels"


def test_every_folder_with_code_is_a_package():
    folders = {
        path.parent for name in ("aa_jax", "kernels") for path in (ROOT / name).rglob("*.py")
    }
    missing = [
        folder.relative_to(ROOT).as_posix()
        for folder in folders - {ROOT / "kernels", ROOT / "aa_jax" / "kernels"}
        if not (folder / "__init__.py").exists()
    ]
    assert not missing, f"without __init__.py a folder is left out of the wheel: {missing}"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    # Built from a copy: setuptools writes build/ and egg-info next to the sources.
    source, output = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("aa_jax", "kernels", "configs", "launch", "tests", "benchmarks", "docs"):
        if (ROOT / name).exists():
            ignore = shutil.ignore_patterns("__pycache__", "*.egg-info")
            shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=ignore)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, source / name)
    command = [
        sys.executable, "-m", "pip", "wheel", str(source), "--no-deps", "--no-build-isolation",
        "--no-index", "--quiet", "--wheel-dir", str(output),
    ]  # fmt: skip
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    (built,) = output.glob("*.whl")
    return built


def test_wheel_holds_the_library_and_nothing_else(wheel):
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert {name.split("/")[0] for name in names} == {"aa_jax"}
    packed = {name.removeprefix("aa_jax/") for name in names if name.endswith(".py")}
    kernels = {f"kernels/{name}" for name in python_files(ROOT / "kernels")}
    library = python_files(ROOT / "aa_jax") - {n for n in packed if n.startswith("kernels/")}
    assert kernels <= packed
    assert {n for n in packed if not n.startswith("kernels/")} == {
        n for n in library if not n.startswith("kernels/")
    }


def test_wheel_imports_away_from_the_source(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path)
    code = (
        "import aa_jax, aa_jax.errors, importlib.util as u, pathlib\n"
        "print(pathlib.Path(aa_jax.__file__).parent)\n"
        "print(*u.find_spec('aa_jax.kernels').submodule_search_locations)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    expected = str(tmp_path / "aa_jax")
    assert result.stdout.split() == [expected, expected + "/kernels"]
