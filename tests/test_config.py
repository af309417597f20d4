"""Config files, overrides, binding and run directories: the errors are part of the interface."""

import functools
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from absl import flags
from ml_collections import ConfigDict

from aa_jax import config
from aa_jax.errors import ConfigError, DataError

SOURCE = """
from ml_collections import ConfigDict, config_dict

def get_config(arg="small"):
    return ConfigDict({
        "steps": 10,
        "seed": 0,
        "shuffle": True,
        "model": {"path": config_dict.required_placeholder(str), "size": arg, "remat": None},
        "optim": {"lr": 1e-3, "betas": (0.9, 0.95), "frozen": ["vision/*"]},
        "sources": [{"path": "a.jsonl", "weight": 1.0}],
        "columns": {},
    })
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "run.py"
    path.write_text(SOURCE)
    return str(path)


@pytest.mark.parametrize(
    ("override", "key", "expected"),
    [
        ("--config.optim.lr=1e-6", "optim.lr", 1e-6),
        ("--config.optim.lr=2", "optim.lr", 2.0),
        ("--config.steps=1_000", "steps", 1000),
        ("--noconfig.shuffle", "shuffle", False),
        ("--config.shuffle=false", "shuffle", False),
        ("--config.shuffle", "shuffle", True),
        ("--config.model.path=/a=b,c", "model.path", "/a=b,c"),
        ("--config.model.path=1", "model.path", "1"),
        ("--config.model.remat=full", "model.remat", "full"),
        ("--config.model.remat=3", "model.remat", 3),
        ("--config.optim.betas=0.8,1", "optim.betas", (0.8, 1.0)),
        ("--config.optim.betas=(0.8,)", "optim.betas", (0.8,)),
        ("--config.optim.frozen=a/*,b", "optim.frozen", ["a/*", "b"]),
        ("--config.steps=none", "steps", None),
        ("--config.optim={'lr': 0.5}", "optim.lr", 0.5),
        ("--config.columns={'prompt': 'q'}", "columns.prompt", "q"),
    ],
)
def test_override(file, override, key, expected):
    loaded = config.load(file, [override])
    assert loaded[key] == expected
    assert type(loaded[key]) is type(expected)


def test_override_in_list_of_sections(file):
    loaded = config.load(file, ["--config.sources[0].path=b.jsonl", "--config.sources[0].weight=2"])
    assert loaded.sources[0]["path"] == "b.jsonl"
    assert loaded.sources[0]["weight"] == 2.0


def test_last_override_wins_and_result_is_locked(file):
    loaded = config.load(file, ["--config.steps=1", "--config.steps=2", "--config.model.path=x"])
    assert loaded.steps == 2
    for section in (loaded, loaded.model, loaded.optim):
        with pytest.raises(KeyError):
            section["typo"] = 1


def test_argument_of_get_config(file):
    assert config.load(f"{file}:large").model.size == "large"


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("--config.optim.lrr=1", ["'lrr'", "Did you mean --config.optim.lr?", "betas, frozen, lr"]),
        ("--config.lr=1", ["'lr'", "Did you mean --config.optim.lr?"]),
        ("--config.optm.lr=1", ["'optm'", "Did you mean --config.optim.lr?"]),
        ("--config.steps=1e4", ["--config.steps", "an integer", "'1e4'", "a number", "it is 10"]),
        ("--config.optim.lr=fast", ["--config.optim.lr", "a number", "'fast'", "text"]),
        ("--config.shuffle=maybe", ["true or false", "'maybe'"]),
        ("--config.optim.betas=a,b", ["betas[0]", "a number", "'a'"]),
        ("--config.optim=3", ["is a section", "--config.optim.betas=..."]),
        ("--config.sources[4].path=x", ["a list of 1", "no [4]"]),
        ("--config.steps.x=1", ["config.steps", "is a value, not a section"]),
        ("--config.=1", ["names no key"]),
        ("--steps=1", ["--config.key=value"]),
        ("--config.model.path.x=1", ["model.path has no keys"]),
    ],
)
def test_bad_override(file, override, words):
    with pytest.raises(ConfigError) as error:
        config.load(file, [override])
    for word in words:
        assert word in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("x = 1", ["defines no get_config()"]),
        ("def get_config(:\n", ["line 1", "syntax"]),
        ("def get_config():\n    return 1/0\n", ["line 2", "ZeroDivisionError"]),
        ("def get_config():\n    pass\n", ["returned NoneType", "return statement"]),
        ("import no_such_module_here\n", ["line 1", "no_such_module_here"]),
    ],
)
def test_broken_file(tmp_path, source, words):
    path = tmp_path / "broken.py"
    path.write_text(source)
    with pytest.raises(ConfigError) as error:
        config.load(str(path))
    for word in ["broken.py", *words]:
        assert word in str(error.value)


def test_missing_file_names_the_nearest(file):
    with pytest.raises(ConfigError, match=r"rum\.py does not exist.* Did you mean .*run\.py\?"):
        config.load(file.replace("run.py", "rum.py"))
    with pytest.raises(ConfigError, match="does not exist either"):
        config.load("no/such/folder/x.py")
    with pytest.raises(ConfigError, match="--config=configs"):
        config.load("")


def test_required_values(file):
    loaded = config.load(file)
    assert config.missing(loaded) == ["model.path"]
    with pytest.raises(ConfigError, match="--config.model.path=..."):
        config.require(loaded)
    with pytest.raises(ConfigError, match="--config.model.path=..."):
        config.resolve(loaded)
    config.require(config.load(file, ["--config.model.path=x"]))


def make(
    lr: float,
    steps: int = 10,
    *,
    kind: Literal["adamw", "sgd"] = "adamw",
    betas: tuple[float, float] = (0.9, 0.999),
    clip: float | None = 1.0,
    frozen: Sequence[str] = (),
    folder: Path | None = None,
    options: dict | None = None,
    untyped=0.5,
    flag: bool = False,
    axes: dict[str, int] | None = None,
):
    return dict(locals())


def test_bind_converts_and_fixes():
    section = ConfigDict({"lr": 1, "betas": [0.8, 1], "options": {"a": {"b": 1}}, "folder": "x"})
    result = config.bind(make, section, path="config.optim", steps=3)()
    assert result["lr"] == 1.0 and type(result["lr"]) is float
    assert result["betas"] == (0.8, 1.0)
    assert result["folder"] == Path("x")
    assert result["options"] == {"a": {"b": 1}} and type(result["options"]["a"]) is dict
    assert result["steps"] == 3
    assert config.bind(make, None, lr=1.0)()["kind"] == "adamw"


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({"lrr": 1.0}, ["config.optim", "make()", "'lrr'", "did you mean 'lr'", "kind, betas"]),
        ({"lr": "fast"}, ["config.optim.lr", "a number", "'fast'", "text"]),
        ({"steps": 1.5}, ["config.optim.steps", "an integer"]),
        ({"steps": True}, ["config.optim.steps", "an integer", "true or false"]),
        ({"kind": "adam"}, ["config.optim.kind", "'adamw', 'sgd'", "'adam'"]),
        ({"betas": [0.9]}, ["config.optim.betas", "a list of 2"]),
        ({"clip": "x"}, ["a number or none"]),
        ({"frozen": "vision"}, ["config.optim.frozen", "a list of text"]),
        ({"untyped": "x"}, ["config.optim.untyped", "a number"]),
        ({"flag": 1}, ["true or false", "an integer"]),
        ({"options": 3}, ["a section or none"]),
    ],
)
def test_bind_errors(section, words):
    with pytest.raises(ConfigError) as error:
        config.bind(make, ConfigDict(section), path="config.optim")
    for word in words:
        assert word in str(error.value)


def test_bind_fixed_arguments_and_required_values(file):
    with pytest.raises(ConfigError, match="config.optim.lr cannot be set"):
        config.bind(make, {"lr": 1.0}, path="config.optim", lr=2.0)
    with pytest.raises(TypeError, match="'rate'"):
        config.bind(make, {}, rate=2.0)
    with pytest.raises(ConfigError, match="--config.model.path=..."):
        config.bind(make, config.load(file).model, path="config.model")


def test_bind_classes_partials_and_open_signatures():
    class Thing:
        def __init__(self, size: int = 1):
            self.size = size

    def free(**anything):
        return anything

    assert config.bind(Thing, {"size": 2})().size == 2
    with pytest.raises(ConfigError, match="an integer"):
        config.bind(Thing, {"size": "2"})
    assert config.bind(free, {"x": [1]})() == {"x": [1]}
    assert config.bind(functools.partial(make, steps=2), {"lr": 1.0})()["steps"] == 2


def test_resolve_is_json(file):
    loaded = config.load(file, ["--config.model.path=x"])
    resolved = config.resolve(loaded)
    assert json.loads(json.dumps(resolved)) == resolved
    assert resolved["optim"]["betas"] == [0.9, 0.95]
    assert config.resolve({"a": np.float32(0.5), "b": Path("x")}) == {"a": 0.5, "b": "x"}
    with pytest.raises(ConfigError, match=r"config\.f is a function"):
        config.resolve({"f": lambda: 0})


def test_same_run(file, tmp_path):
    workdir = tmp_path / "run"
    first = config.load(file, ["--config.model.path=x"])
    assert config.check_same_run(first, workdir) is False
    written = config.write_resolved(first, workdir)
    assert json.loads(written.read_text())["optim"]["lr"] == 1e-3
    assert "--config.optim.lr=0.001" in (workdir / "config.txt").read_text().splitlines()
    assert config.check_same_run(first, workdir) is True

    changed = config.load(file, ["--config.model.path=y", "--config.steps=20"])
    with pytest.raises(ConfigError) as error:
        config.check_same_run(changed, workdir)
    for word in ("model.path: was 'x', now 'y'", "steps: was 10, now 20", "another --workdir"):
        assert word in str(error.value)
    assert config.check_same_run(changed, workdir, harmless=["model.*", "steps"]) is True

    (workdir / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="cannot be read"):
        config.check_same_run(first, workdir)


def test_same_run_reports_added_and_removed_keys(tmp_path):
    config.write_resolved({"a": {"b": 1}, "log_every": 5}, tmp_path)
    with pytest.raises(ConfigError, match=r"a\.b: was 1, now not set; a\.c: was not set, now 2"):
        config.check_same_run({"a": {"c": 2}, "log_every": 9}, tmp_path)


def test_written_flags_reproduce_the_config(file, tmp_path):
    first = config.load(file, ["--config.model.path=x", "--config.optim.lr=3e-7"])
    config.write_resolved(first, tmp_path)
    lines = (tmp_path / "config.txt").read_text().splitlines()
    lines = [line for line in lines if "sources" not in line]
    assert config.resolve(config.load(file, lines)) == config.resolve(first)


@pytest.fixture
def launch(monkeypatch):
    """Runs `run_main` with fresh absl flags."""
    monkeypatch.setattr(flags, "FLAGS", flags.FlagValues())

    def run(main, *argv, define=True):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("logging.basicConfig", lambda **_: None)
            for name in ("DEFINE_string", "DEFINE_boolean"):
                bound = functools.partial(getattr(flags, name), flag_values=flags.FLAGS)
                patch.setattr(flags, name, bound)
            if define:
                config.define_flags()
            config.run_main(main, ["prog", *argv])

    return run


def test_run_main(launch, file):
    seen = []
    launch(
        lambda loaded, workdir: seen.append((loaded.steps, loaded.optim.lr, workdir)),
        f"--config={file}", "--config.steps", "3", "--config.optim.lr", "-0.5",
        "--config.model.path=x", "--workdir=runs/x",
    )  # fmt: skip
    assert seen == [(3, -0.5, Path("runs/x"))]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--workdir=w"], "--config=configs"),
        (["--config={file}", "--workdir=w"], "--config.model.path=..."),
        (["--config={file}", "--config.model.path=x"], "--workdir=runs/<name>"),
        (["--config={file}", "--config.stepz=1"], "Did you mean --config.steps?"),
        (["--config={file}", "--wrkdir=w"], "wrkdir"),
        (["--config={file}", "stray"], "unexpected argument 'stray'"),
    ],
)
def test_run_main_errors(launch, file, capsys, argv, words):
    with pytest.raises(SystemExit) as error:
        launch(lambda *_: None, *(part.format(file=file) for part in argv))
    assert error.value.code == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("error: ")
    assert words in printed.err
    assert "Traceback" not in printed.err and printed.err.count("\n") == 1
    assert printed.out == ""


def test_run_main_traceback_and_other_errors(launch, capsys):
    def fail():
        raise DataError("row 3 of [red]x.jsonl[/red] has no column 'prompt'")

    with pytest.raises(SystemExit):
        launch(fail, define=False)
    assert "[red]x.jsonl[/red]" in capsys.readouterr().err
    with pytest.raises(DataError):
        launch(fail, "--traceback", define=False)
    with pytest.raises(ZeroDivisionError):  # a bug keeps its traceback
        launch(lambda: 1 / 0, define=False)

    def interrupt():
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as error:
        launch(interrupt, define=False)
    assert error.value.code == 130
    assert "interrupted" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        launch(fail, "--config.x=1", define=False)
    assert "takes no config" in capsys.readouterr().err


def test_run_main_in_a_process(file, tmp_path):
    script = tmp_path / "launch.py"
    script.write_text(
        "from aa_jax import config\n"
        "config.define_flags()\n"
        "def main(cfg, workdir):\n"
        "    config.bind(open, cfg.optim, path='config.optim')\n"
        "config.run_main(main)\n"
    )
    command = [sys.executable, str(script), f"--config={file}", "--config.model.path=x"]
    result = subprocess.run([*command, "--workdir=w"], capture_output=True, text=True)
    assert result.returncode == 2
    assert "config.optim holds the arguments of open()" in result.stderr
    assert "Traceback" not in result.stderr
    result = subprocess.run(
        [*command, "--workdir=w", "--traceback"], capture_output=True, text=True
    )
    assert result.returncode == 1
    assert "Traceback" in result.stderr
