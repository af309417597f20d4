"""Sections to one HTML file."""

import base64
import datetime
import hashlib
import json
import os
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from numbers import Real
from pathlib import Path
from typing import Any

from aa_jax import hosts
from aa_jax.errors import DataError
from aa_jax.report import charts, formats, media
from aa_jax.report.html import Markup, el, join, prose
from aa_jax.report.sections import (
    Bars,
    Curves,
    Grid,
    KeyValues,
    Numbers,
    Samples,
    Section,
    Table,
    Text,
)
from aa_jax.report.style import CSS, SCRIPT

# A number that stands alone or before an interval, a unit in brackets, a per cent sign.
_NUMBER = re.compile(r"[+\N{MINUS SIGN}-]?\d+(\.\d+)?(e[+-]?\d+)?(?=$|[\s±%\[(])")
_LONG = 700  # characters from which a cell of a sample scrolls


def write_report(
    workdir: str | os.PathLike,
    title: str,
    sections: Sequence[Section],
    *,
    summary: str = "",
    command: str | None = None,
    wall_seconds: Real | None = None,
    environment: Mapping[str, Any] | None = None,
    filename: str = "report.html",
) -> Path:
    """Writes ``workdir/report.html``: one file, no requests, light and dark, printable.

    Of several processes only process 0 writes.

    The configuration (``workdir/config.json``, if there) and the environment are added at the end.

    Args:
      workdir: Run directory.
      title: What was run.
      sections: What was found, in reading order.
      summary: A sentence or two below the title (same notation as :class:`Text`).
      command: The command line; None takes the running program's.
      wall_seconds: Wall time of what is reported, in seconds.
      environment: What to say about the machine; None asks :func:`aa_jax.platforms.environment`.
      filename: Name of the file in `workdir`.

    Returns:
      The file's path. It replaces an earlier report in one step.

    Raises:
      DataError: A table or sample has rows that do not fit its columns, or a curve is uneven.
      MediaError: A sample's bytes are no image, audio or video a browser can show.
    """
    if environment is None:
        from aa_jax import platforms

        environment = platforms.environment()
    folder = Path(workdir)
    if hosts.joined() and hosts.index() != 0:
        return folder / filename
    sections = [*sections, *_appendix(folder, environment)]
    file = folder / filename
    folder.mkdir(parents=True, exist_ok=True)
    page = _page(title, sections, summary, _meta(command, wall_seconds, environment))
    temporary = file.with_name(f".{filename}.{os.getpid()}")
    temporary.write_text(page, encoding="utf-8")
    os.replace(temporary, file)
    return file


def _page(title: str, sections: Sequence[Any], summary: str, meta: Mapping[str, str]) -> str:
    names = _anchors([section.title for section in sections])
    top = el(
        "header",
        el("h1", title),
        el("div", prose(summary), class_="lede") if summary else None,
        _definitions(meta, "meta"),
        el(
            "nav",
            el("ul", [el("li", el("a", section.title, href=f"#{name}"))
                      for section, name in zip(sections, names, strict=True) if section.title]),
            aria_label="Contents",
        ),
        class_="top",
    )  # fmt: skip
    body = [_section(section, name) for section, name in zip(sections, names, strict=True)]
    # Nothing outside the file may be loaded and no script but ours may run, whatever a sample says.
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    policy = (
        "default-src 'none'; style-src 'unsafe-inline'; img-src data:; media-src data:; "
        f"script-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    )
    head = el(
        "head",
        el("meta", charset="utf-8"),
        el("meta", http_equiv="Content-Security-Policy", content=policy),
        el("meta", name="viewport", content="width=device-width,initial-scale=1"),
        el("meta", name="color-scheme", content="light dark"),
        el("title", title),
        el("style", Markup(CSS)),
    )
    footer = el("footer", "Written by aa_jax. Click a heading of a table to sort, an image to "
                          "enlarge it.")  # fmt: skip
    dialog = el("dialog", aria_label="Enlarged image")
    page = el("body", top, el("main", body), footer, dialog, el("script", Markup(SCRIPT)))
    return "<!doctype html>\n" + el("html", head, "\n", page, lang="en") + "\n"


def _section(section: Any, name: str) -> Markup:
    heading = el("h2", section.title) if section.title else None
    return join("\n", el("section", heading, _render(section), id=name))


def _render(section: Any) -> Markup:
    for kind, render in _RENDERERS.items():
        if isinstance(section, kind):
            return render(section)
    known = ", ".join(kind.__name__ for kind in _RENDERERS)
    raise DataError(f"a report has no section {type(section).__name__}; it has {known}")


def _text(section: Text) -> Markup:
    return el("div", prose(section.text), class_="prose")


def _numbers(section: Numbers) -> Markup:
    tiles = []
    for label, value in section.values.items():
        value, fine = value if isinstance(value, tuple) else (value, "")
        tiles.append(
            el("div", el("dt", label), el("dd", _shown(value), class_="big"),
               el("dd", fine, class_="fine") if fine else None)
        )  # fmt: skip
    return el("dl", tiles, class_="tiles")


def _curves(section: Curves) -> Markup:
    return charts.curves(section)


def _bars(section: Bars) -> Markup:
    return el("figure", _note(section.note), charts.bars(section))


def _table(section: Table) -> Markup:
    _check_rows(section)
    columns = list(zip(*section.rows, strict=True)) or [()] * len(section.columns)
    values = [[_leading_number(cell) for cell in cells] for cells in columns]
    numeric = [
        any(value is not None for value in parsed)
        and all(c is None or v is not None for c, v in zip(cells, parsed, strict=True))
        for cells, parsed in zip(columns, values, strict=True)
    ]
    heads = [
        el("th", el("button", name, type="button"), scope="col", class_="number" if n else None)
        for name, n in zip(section.columns, numeric, strict=True)
    ]
    body = []
    for index, row in enumerate(section.rows):
        cells = [
            el("td", _shown(cell), class_="number" if n else None,
               data_value=_leading_number(cell) if n else None)
            for cell, n in zip(row, numeric, strict=True)
        ]  # fmt: skip
        body.append(el("tr", cells, class_="highlight" if index in section.highlight else None))
    table = el("table", el("thead", el("tr", heads)), el("tbody", body))
    return el("div", _note(section.caption), _scroll(table, section.title))


def _samples(section: Samples) -> Markup:
    _check_rows(section)
    cards = []
    for number, row in enumerate(section.rows, start=1):
        clips, cells, scores = [], [], []
        for name, cell in zip(section.columns, row, strict=True):
            if media.is_media(cell):
                items = cell if isinstance(cell, (list, tuple)) else [cell]
                alts = [f"{name} of sample {number}"]
                if len(items) > 1:
                    alts = [f"{alts[0]}, {i} of {len(items)}" for i in range(1, len(items) + 1)]
                shown = [media.show(item, alt) for item, alt in zip(items, alts, strict=True)]
                value = el("dd", el("div", shown, class_="strip"))
                clips.append(el("dl", el("dt", name), value))
            elif _is_number(cell) or isinstance(cell, bool):
                scores.append(el("div", el("dt", name), el("dd", _shown(cell))))
            else:
                text = "–" if cell is None else str(cell)
                long = len(text) > _LONG
                value = el(
                    "dd", text, class_="long" if long else None, tabindex=0 if long else None
                )
                cells.append(el("div", el("dt", name), value, class_=section.tones.get(name)))
        cards.append(
            el("article", el("div", clips, class_="media") if clips else None,
               el("dl", cells, class_="cells"),
               el("dl", scores, class_="scores") if scores else None,
               class_="sample" if clips else "sample text", aria_label=f"Sample {number}")
        )  # fmt: skip
    return join(_note(section.caption), cards or el("p", "No samples.", class_="empty"))


def _key_values(section: KeyValues) -> Markup:
    rows = [
        el(
            "tr",
            el("th", name, scope="row", class_="mono"),
            el("td", _literal(value), class_="mono"),
        )
        for name, value in _flat(section.values)
    ]
    table = el("table", el("tbody", rows), class_="pairs")
    if not section.folded:
        return table
    return el("details", el("summary", f"{len(rows)} values"), table)


def _grid(section: Grid) -> Markup:
    parts = [
        el("div", el("h3", part.title) if part.title else None, _render(part))
        for part in section.sections
    ]
    return join(_note(section.note), el("div", parts, class_="grid"))


_RENDERERS = {
    Text: _text,
    Numbers: _numbers,
    Curves: _curves,
    Bars: _bars,
    Table: _table,
    Samples: _samples,
    KeyValues: _key_values,
    Grid: _grid,
}


def _note(text: str) -> Markup | None:
    return el("p", text, class_="note") if text else None


def _scroll(table: Markup, label: str) -> Markup:
    # Focusable, so that a wide table can be scrolled with the keyboard.
    return el("div", table, class_="scroll", role="region", tabindex=0, aria_label=label)


def _check_rows(section: Table | Samples) -> None:
    for index, row in enumerate(section.rows):
        if len(row) != len(section.columns):
            raise DataError(
                f"{type(section).__name__} {section.title!r}: row {index} has {len(row)} cells for "
                f"{len(section.columns)} columns ({', '.join(section.columns)})"
            )


def _is_number(value: Any) -> bool:
    return not isinstance(value, (bool, str, bytes)) and hasattr(value, "__float__")


def _leading_number(cell: Any) -> float | None:
    """The number a cell is sorted by: itself, or that of "2.31 [2.2, 2.4]"; None for words."""
    if _is_number(cell):
        return float(cell)
    match = _NUMBER.match(cell) if isinstance(cell, str) else None
    return float(match[0].replace("\N{MINUS SIGN}", "-")) if match else None


def _shown(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if _is_number(value):
        return formats.short(value if isinstance(value, int) else float(value))
    if isinstance(value, (list, tuple)):
        return ", ".join(_shown(item) for item in value) or "(none)"
    return str(value)


def _literal(value: Any) -> str:
    """A value as it would be typed, not as it reads best: 1e-06, not 10⁻⁶."""
    if value is None or isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_literal(item) for item in value) + "]"
    return str(value)


def _flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    rows = []
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            rows += _flat(value, f"{prefix}{name}.")
        else:
            rows.append((f"{prefix}{name}", "(empty)" if isinstance(value, Mapping) else value))
    return rows


def _definitions(values: Mapping[str, str], style: str) -> Markup:
    pairs = [(el("dt", name), el("dd", value)) for name, value in values.items()]
    return el("dl", pairs, class_=style)


def _meta(command: str | None, wall: Real | None, environment: Mapping[str, Any]) -> dict[str, Any]:
    now = datetime.datetime.now(datetime.UTC)
    meta: dict[str, Any] = {"Date": f"{now:%Y-%m-%d %H:%M} UTC"}
    command = _command_line() if command is None else command
    if command:
        meta["Command"] = el("code", command)
    if "device" in environment:
        cores = environment.get("CPU cores")
        meta["Device"] = environment["device"] + (f", {cores} CPU cores" if cores else "")
    if wall is not None:
        meta["Wall time"] = formats.duration(wall)
    versions = [f"{name} {environment[name]}" for name in ("aa_jax", "jax", "flax")
                if name in environment]  # fmt: skip
    if versions:
        meta["Versions"] = ", ".join(versions)
    return meta


def _command_line() -> str:
    """The running command; nothing where there is none to repeat (a notebook, a prompt)."""
    program = sys.argv[0] if sys.argv else ""
    if not program.endswith(".py") or "ipykernel" in program:
        return ""
    relative = os.path.relpath(program)
    program = os.path.basename(program) if relative.startswith("..") else relative
    return shlex.join(["python", program, *sys.argv[1:]])


def _appendix(folder: Path, environment: Mapping[str, Any]) -> list[KeyValues]:
    sections = []
    config = folder / "config.json"
    if config.exists():
        values = json.loads(config.read_text(encoding="utf-8"))
        sections.append(KeyValues("Configuration", values, folded=len(_flat(values)) > 24))
    if environment:
        sections.append(KeyValues("Environment", environment))
    return sections


def _anchors(titles: Sequence[str]) -> list[str]:
    names: list[str] = []
    for index, title in enumerate(titles):
        name = re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-") or "section"
        names.append(name if name not in names else f"{name}-{index}")
    return names
