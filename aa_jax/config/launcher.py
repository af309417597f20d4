"""What every script in ``launch/`` shares: flags, one call, and errors a person can read."""

import logging
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from absl import flags
from rich.console import Console
from rich.text import Text

from aa_jax import hosts
from aa_jax.config.files import load, require
from aa_jax.errors import AaJaxError, ConfigError

_OVERRIDE = re.compile(r"--?(no)?config\.")


def define_flags(workdir: str | None = None) -> None:
    """Defines ``--config``, ``--workdir`` and ``--traceback``; ``--config.key=value`` overrides.

    Call it at the top of a launcher, next to the launcher's own ``absl`` flags.

    Args:
      workdir: Default run directory; None makes the flag required.
    """
    if "config" in flags.FLAGS:
        return
    flags.DEFINE_string("config", None, "Config file; override its keys with --config.key=value.")
    flags.DEFINE_string("workdir", workdir, "Run directory: config, metrics, checkpoints, report.")
    _define_traceback()


def run_main(main: Callable, argv: Sequence[str] | None = None, *, complete: bool = True) -> None:
    """Parses the command line, calls ``main``, and turns errors into one clear paragraph.

    If :func:`define_flags` was called, this is ``main(config, workdir)`` with the locked config
    and a ``pathlib.Path``; otherwise ``main()``. An :class:`AaJaxError` is written to stderr
    without a traceback (``--traceback`` brings it back) and the process exits with code 2.

    Args:
      main: The launcher's function.
      argv: The command line with the program's name first; ``sys.argv`` if None.
      complete: Required values and the run directory must be given. Without it ``main`` may get a
        config with empty placeholders, and None.

    Raises:
      SystemExit: Code 2 after an error a user can fix, 130 after Ctrl-C, 75 where another process
        of the job has ended. One of several processes ends at once: waiting for the others, which
        wait for it, would hang the job.
    """
    argv = list(sys.argv if argv is None else argv)
    _define_traceback()
    _start_logging()
    # Read before parsing: the flag must also hold for errors in the command line itself.
    show = any(argument in ("--traceback", "-traceback", "--traceback=true") for argument in argv)
    try:
        main(*_parse(argv, complete))
    except (AaJaxError, flags.Error) as error:
        if show:
            raise
        _show_error(str(error))
        hosts.leave(2)
    except KeyboardInterrupt:
        if show:
            raise
        _show_error("interrupted. The same command continues from the last checkpoint.")
        hosts.leave(130)
    except Exception as error:
        if not hosts.joined():
            raise
        if (lost := hosts.explain(error)) is not None and not show:
            _show_error(lost)
            hosts.leave(hosts.LOST_A_PEER)
        traceback.print_exc()
        hosts.leave(1)


def _parse(argv: list[str], complete: bool) -> tuple[Any, ...]:
    overrides, rest = _split_overrides(argv)
    unparsed = flags.FLAGS(rest)[1:]
    if unparsed:
        raise ConfigError(
            f"unexpected argument {unparsed[0]!r}: flags look like --name=value "
            "(quote values that contain spaces)."
        )
    if "config" not in flags.FLAGS:
        if overrides:
            raise ConfigError(f"this command takes no config, but was given {overrides[0]}.")
        return ()
    if flags.FLAGS.config is None:
        raise ConfigError("no config file was given: pass --config=configs/<task>/<name>.py")
    config = load(flags.FLAGS.config, overrides)
    if not complete:
        return config, flags.FLAGS.workdir and Path(flags.FLAGS.workdir)
    require(config)
    if flags.FLAGS.workdir is None:
        raise ConfigError("no run directory was given: pass --workdir=runs/<name>")
    return config, Path(flags.FLAGS.workdir)


def _split_overrides(argv: list[str]) -> tuple[list[str], list[str]]:
    """Separates ``--config.a=1`` and ``--config.a 1`` from what absl parses itself."""
    overrides, rest, position = [], argv[:1], 1
    while position < len(argv):
        argument = argv[position]
        position += 1
        if not _OVERRIDE.match(argument):
            rest.append(argument)
            continue
        follows = argv[position] if position < len(argv) else "--"
        is_value = not follows.startswith("-") or re.match(r"-\.?\d", follows)
        if "=" not in argument and not argument.lstrip("-").startswith("no") and is_value:
            argument = f"{argument}={follows}"
            position += 1
        overrides.append(argument)
    return overrides, rest


def _define_traceback() -> None:
    if "traceback" not in flags.FLAGS:
        flags.DEFINE_boolean("traceback", False, "Show the Python traceback of an error.")


def _start_logging() -> None:
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(name)s: %(message)s", datefmt="%H:%M:%S"
    )
    # orbax narrates every file and jax every backend it does not find at INFO.
    for name in ("absl", "jax._src.xla_bridge", "datasets"):
        logging.getLogger(name).setLevel(logging.WARNING)


def _show_error(message: str) -> None:
    console = Console(stderr=True, highlight=False)
    text = Text("error: ", style="bold red").append(Text(message, style="not bold default"))
    # In a log file one error is one line, so that it can be searched for.
    console.print(text, soft_wrap=not console.is_terminal)
