"""metrics.jsonl: one line per step and stage, the record every chart and report is drawn from."""

import json
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from aa_jax.errors import DataError

_FILE = "metrics.jsonl"
_RESERVED = ("stage", "step", "time", "nonfinite")
_NONFINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


class MetricWriter:
    """Appends metrics to ``workdir/metrics.jsonl`` and to TensorBoard.

    Every line is written and flushed at once, so a crash can tear only the last one; the tear is
    removed when the file is opened again. NaN and infinities, which JSON does not have, are
    written as null and named in ``"nonfinite"``. In a multi-host run only process 0 writes.

        with MetricWriter(workdir, "dpo") as metrics:
            metrics.write(10, {"loss": Ratio(total, count), "lr": 1e-6})
    """

    def __init__(self, workdir: str | os.PathLike, stage: str, *, tensorboard: bool = True):
        """Opens the file for appending.

        Args:
          workdir: Run directory, created if needed.
          stage: Name of the phase, e.g. "sft"; several stages share one file.
          tensorboard: Also write events to ``workdir/tensorboard/<stage>``.
        """
        import jax

        self.stage, self.path = stage, Path(workdir) / _FILE
        self._events_dir = Path(workdir) / "tensorboard" / stage
        self._tensorboard = tensorboard
        self._file = self._events = None
        if jax.process_index() != 0:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        _cut_torn_line(self.path)
        self._open(purge_step=None)

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Writes one line.

        Args:
          step: Number of optimizer steps done when the values were measured.
          values: Scalars, or (total, count) pairs such as ``losses.Ratio``, written as their mean.

        Raises:
          DataError: A value is not a scalar or a pair, or uses a reserved name.
        """
        if self._file is None:
            return
        scalars = {name: _scalar(name, value) for name, value in values.items()}
        line = {"stage": self.stage, "step": int(step), "time": round(time.time(), 3)}
        line |= {name: x if math.isfinite(x) else None for name, x in scalars.items()}
        odd = {name: str(x) for name, x in scalars.items() if not math.isfinite(x)}
        if odd:
            line["nonfinite"] = odd
        self._file.write(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n")
        self._file.flush()
        if self._events is not None:
            for name, x in scalars.items():
                self._events.add_scalar(name, x, int(step))

    def rewind(self, step: int) -> None:
        """Drops this stage's lines after `step`, e.g. those a crashed run wrote past its
        checkpoint. The file is replaced atomically; other stages are untouched."""
        if self._file is None:
            return
        self._shut()
        temporary = self.path.with_name(f".{_FILE}.{os.getpid()}")
        with (
            open(self.path, encoding="utf-8") as old,
            open(temporary, "w", encoding="utf-8") as new,
        ):
            for text, line in _lines(old, self.path):
                if line["stage"] != self.stage or line["step"] <= step:
                    new.write(text)
            new.flush()
            os.fsync(new.fileno())
        os.replace(temporary, self.path)
        # TensorBoard hides what an earlier event file wrote from this step on.
        self._open(purge_step=step + 1)

    def close(self) -> None:
        """Closes both files; writing afterwards does nothing."""
        if self._file is not None:
            self._shut()
        self._file = self._events = None

    def __enter__(self) -> "MetricWriter":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _open(self, purge_step: int | None) -> None:
        self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115 (closed in close())
        if self._tensorboard:
            from tensorboardX import SummaryWriter

            # Files are named by the second: one reopened within it would overwrite the first.
            earlier = len(list(self._events_dir.glob("*"))) if self._events_dir.exists() else 0
            self._events = SummaryWriter(
                str(self._events_dir), purge_step=purge_step, filename_suffix=f".{earlier:04d}"
            )

    def _shut(self) -> None:
        self._file.close()
        if self._events is not None:
            self._events.close()


def read_metrics(workdir: str | os.PathLike, stage: str | None = None) -> list[dict[str, Any]]:
    """The lines of ``workdir/metrics.jsonl`` in file order, NaN and infinities restored.

    Args:
      workdir: Run directory; a run that has written nothing gives an empty list.
      stage: Only this stage's lines.

    Raises:
      DataError: A line in the middle of the file is not JSON. A torn last line is skipped.
    """
    path = Path(workdir) / _FILE
    if not path.exists():
        return []
    rows = []
    with open(path, encoding="utf-8") as file:
        for _, line in _lines(file, path):
            if stage is None or line["stage"] == stage:
                odd = line.pop("nonfinite", {})
                rows.append(line | {name: _NONFINITE[text] for name, text in odd.items()})
    return rows


def series(rows: Sequence[Mapping[str, Any]], name: str) -> tuple[list[int], list[float]]:
    """(steps, values) of one metric, from the rows that have it; what ``report.Curves`` takes."""
    found = [(row["step"], row[name]) for row in rows if name in row]
    return [step for step, _ in found], [value for _, value in found]


def _scalar(name: str, value: Any) -> float:
    if name in _RESERVED:
        raise DataError(f"metric {name!r} has a reserved name ({', '.join(_RESERVED)}): rename it")
    try:
        if isinstance(value, tuple):
            total, count = value
            # A metric that nothing was counted for has no mean; it is shown as a gap.
            return float(total) / float(count) if float(count) else math.nan
        return float(value)
    except (TypeError, ValueError) as error:
        raise DataError(
            f"metric {name!r} must be a scalar or a (total, count) pair, got "
            f"{type(value).__name__} {getattr(value, 'shape', value)}: reduce it first"
        ) from error


def _lines(file: Any, path: Path) -> Iterator[tuple[str, dict]]:
    for number, text in enumerate(file, start=1):
        try:
            yield text, json.loads(text)
        except json.JSONDecodeError as error:
            if not text.endswith("\n"):
                return
            raise DataError(
                f"{path}, line {number} is not JSON ({error.msg}): {text[:60].strip()!r}. "
                "Remove the line; the rest of the file is intact."
            ) from error


def _cut_torn_line(path: Path) -> None:
    """Removes what follows the last newline: the line a crash interrupted."""
    if not path.exists():
        return
    with open(path, "rb+") as file:
        end = file.seek(0, os.SEEK_END)
        tail = b""
        while end > 0 and b"\n" not in tail:
            start = max(0, end - 65536)
            file.seek(start)
            tail, end = file.read(end - start), start
        file.truncate(end + tail.rfind(b"\n") + 1)
