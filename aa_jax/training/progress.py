"""Progress of a long stage: a bar on a terminal, a few plain lines in a log."""

import os
import time
from typing import Any

from rich import progress
from rich.console import Console
from rich.text import Text

_SECONDS_BETWEEN_LINES = 10.0
_SECONDS_BETWEEN_FIGURES = 0.2
_LINES_PER_STAGE = 10


class Progress:
    """Shows steps, figures, speed and time left, and nothing when switched off.

        with Progress("dpo", total=500, start=restored_step) as bar:
            for step in range(restored_step + 1, 501):
                bar.update(step, loss=loss, lr=lr)

    On a terminal this is a bar; elsewhere (CI, a file, a notebook) a line every tenth of the way
    or every ten seconds, whichever comes first. Off under pytest, with ``AA_JAX_PROGRESS=0``, and
    in every process of a multi-host run but the first (``enabled=jax.process_index() == 0``).
    """

    def __init__(
        self,
        title: str,
        total: int,
        start: int = 0,
        *,
        enabled: bool | None = None,
        console: Console | None = None,
    ):
        """Shows nothing yet; entering the context does.

        Args:
          title: What is going on, e.g. the stage's name.
          total: Number of steps when done.
          start: Steps already done by an earlier run; they do not count for the speed.
          enabled: None asks the environment.
          console: Where to draw; stderr if None.
        """
        self.title, self.total, self.start = title, total, start
        self._console = console or Console(stderr=True)
        self._enabled = _wanted() if enabled is None else enabled
        # rich draws bars in notebooks through widgets, which are often not installed.
        self._fancy = self._console.is_terminal and not self._console.is_jupyter
        self._bar: progress.Progress | None = None
        self._began = self._last_time = 0.0
        self._last_step = start

    def __enter__(self) -> "Progress":
        self._began = self._last_time = time.monotonic()
        if self._enabled and self._fancy:
            self._bar = progress.Progress(
                progress.TextColumn("{task.description}", style="bold", markup=False),
                progress.BarColumn(bar_width=None),
                progress.MofNCompleteColumn(),
                progress.TextColumn("{task.fields[figures]}", style="dim", markup=False),
                progress.TimeElapsedColumn(),
                progress.TextColumn("left", style="dim"),
                progress.TimeRemainingColumn(),
                console=self._console,
                expand=True,
            )
            self._bar.start()
            self._task = self._bar.add_task(
                self.title, total=self.total, completed=self.start, figures=""
            )
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def update(self, step: int, **figures: Any) -> None:
        """Says that `step` steps are done, with a few figures to show beside it."""
        if not self._enabled:
            return
        now = time.monotonic()
        if self._bar is not None:
            # Formatting waits for the device: not on every step, only as often as it is seen.
            if step >= self.total or now - self._last_time >= _SECONDS_BETWEEN_FIGURES:
                self._last_time = now
                self._bar.update(self._task, figures=_format(figures))
            self._bar.update(self._task, completed=step)
            return
        # Each tenth of the way, but not more often than the eye needs.
        tenth = step * _LINES_PER_STAGE // max(1, self.total)
        new_tenth = tenth > self._last_step * _LINES_PER_STAGE // max(1, self.total)
        if not (new_tenth or step >= self.total or now - self._last_time >= _SECONDS_BETWEEN_LINES):
            return
        self._last_time, self._last_step = now, step
        speed = (step - self.start) / max(now - self._began, 1e-9)
        parts = [f"{self.title} {step}/{self.total} ({100 * step // max(1, self.total)} %)"]
        parts += [_format(figures)] if figures else []
        left = "done" if step >= self.total else f"{_clock((self.total - step) / speed)} left"
        parts.append(f"{_clock(now - self._began)} elapsed, {left if speed else 'just started'}")
        self._console.print(" | ".join(parts), highlight=False, markup=False, soft_wrap=True)


def stage_banner(
    title: str, detail: str = "", *, console: Console | None = None, enabled: bool | None = None
) -> None:
    """A rule with the stage's name, so that stages can be found in a long log."""
    if not (_wanted() if enabled is None else enabled):
        return
    console = console or Console(stderr=True)
    text = f"{title} · {detail}" if detail else title
    if console.is_terminal:
        console.rule(Text(text, style="bold"), align="left", style="dim")
    else:
        console.print(f"== {text}", highlight=False, markup=False, soft_wrap=True)


def _wanted() -> bool:
    setting = os.environ.get("AA_JAX_PROGRESS")
    if setting is not None:
        return setting not in ("0", "false", "off")
    return "PYTEST_CURRENT_TEST" not in os.environ


def _format(figures: dict[str, Any]) -> str:
    shown = []
    for name, value in figures.items():
        if not isinstance(value, (str, int)):
            value = f"{float(value):.4g}"
        shown.append(f"{name} {value}")
    return "  ".join(shown)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
