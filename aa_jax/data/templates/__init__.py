"""Templates: how the rows of each dataset are read. ``TEMPLATES["AA_TI2T"].preference(row)``."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence

from aa_jax.data.templates.base import WORDED, Side, Template, read
from aa_jax.data.templates.dialogue import DIALOGUE_TEMPLATES
from aa_jax.data.templates.generation import GENERATION_TEMPLATES
from aa_jax.data.templates.multimodal import MULTIMODAL_TEMPLATES
from aa_jax.data.templates.text import TEXT_TEMPLATES
from aa_jax.errors import DataError

__all__ = [
    "TEMPLATES",
    "WORDED",
    "Side",
    "Template",
    "find_template",
    "from_columns",
    "read",
]

TEMPLATES: dict[str, Template] = {
    **TEXT_TEMPLATES,
    **MULTIMODAL_TEMPLATES,
    **GENERATION_TEMPLATES,
    **DIALOGUE_TEMPLATES,
}

_KEYS = (
    ("prompt", "image", "audio", "video", "system")
    + ("response", "chosen", "rejected", "response_1", "response_2", "label")
    + ("critique", "critique_1", "critique_2", "reference")
)


def find_template(
    template: str | Template | None = None, columns: Mapping[str, str] | None = None
) -> Template:
    """A template by name, or one made from your own column names.

    Raises:
      DataError: unknown name (lists the choices), or both or neither given.
    """
    if (template is None) == (columns is None):
        raise DataError("Give a template name, or columns={...} for your own columns; not both.")
    if columns is not None:
        return from_columns(columns)
    if isinstance(template, Template):
        return template
    if template not in TEMPLATES:
        close = difflib.get_close_matches(template, TEMPLATES, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise DataError(f"Unknown template {template!r}.{hint} There are {', '.join(TEMPLATES)}.")
    return TEMPLATES[template]


def from_columns(columns: Mapping[str, str | Sequence[str]]) -> Template:
    """A template for anybody's columns.

    Args:
      columns: e.g. ``{"prompt": "q", "image": "img", "chosen": "good", "rejected": "bad"}``.
        ``response`` for supervised data; ``response_1``, ``response_2`` and ``label`` (1 or 2)
        for labelled pairs; ``critique`` (of the response) or ``critique_1``, ``critique_2`` for
        language feedback; ``system`` is a text, not a column; ``reference`` is kept in the meta
        data under the column's name, for rewards.

    Raises:
      DataError: an unknown or missing key.
    """
    if unknown := sorted(set(columns) - set(_KEYS)):
        raise DataError(f"columns: unknown {', '.join(unknown)}; the keys are {', '.join(_KEYS)}.")
    if "prompt" not in columns:
        raise DataError("columns: 'prompt' is missing; it names the column with the user's text.")

    def names(key: str) -> tuple[str, ...]:
        value = columns[key]
        return (value,) if isinstance(value, str) else tuple(value)

    def sides(*keys: str) -> tuple[Side, Side] | None:
        given = [key for key in keys if key in columns]
        if given and len(given) < len(keys):
            raise DataError(f"columns: {given[0]!r} needs {', '.join(set(keys) - set(given))} too.")
        return (Side(names(keys[0])), Side(names(keys[1]))) if given else None

    labelled = sides("response_1", "response_2", "label")
    pair = labelled or sides("chosen", "rejected")
    response = Side(names("response")) if "response" in columns else None
    critiques: tuple[tuple[str, ...], ...] = ()
    critiqued: tuple[Side, ...] = ()
    if sides("critique_1", "critique_2"):
        critiques = (names("critique_1"), names("critique_2"))
    elif "critique" in columns:
        if response is None:
            raise DataError("columns: 'critique' needs 'response', the answer it speaks about.")
        critiques, critiqued = (names("critique"),), (response,)
    return Template(
        question=names("prompt"),
        media=tuple((k, names(k)) for k in ("image", "audio", "video") if k in columns),
        response=response,
        pair=pair,
        label=names("label") if labelled else (),
        critiques=critiques,
        critiqued=critiqued,
        system=str(columns["system"]) if "system" in columns else None,
        meta=names("reference") if "reference" in columns else (),
    )
