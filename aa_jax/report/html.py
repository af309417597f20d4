"""HTML elements whose text is escaped by construction."""

import html
import re


class Markup(str):
    """Text that is HTML already; everything else is escaped when it enters an element."""


_VOID = {"img", "meta", "br", "input"}
_LINK = re.compile(r"\[([^\]]+)\]\((https?://[^\s)]+)\)")
_SPANS = (
    (re.compile(r"`([^`]+)`"), "code"),
    (re.compile(r"\*\*([^*]+)\*\*"), "strong"),
    (re.compile(r"(?<![*\w])\*([^*\s][^*]*)\*(?!\w)"), "em"),
)


def el(tag: str, *children: object, **attributes: object) -> Markup:
    """An element; ``class_`` -> ``class``, ``aria_label`` -> ``aria-label``, None is left out."""
    parts = [f"<{tag}"]
    for name, value in attributes.items():
        if value is None or value is False:
            continue
        name = name.rstrip("_").replace("_", "-")
        parts.append(f" {name}" if value is True else f' {name}="{html.escape(str(value))}"')
    parts.append(">")
    if tag not in _VOID:
        parts += [join(*children), f"</{tag}>"]
    return Markup("".join(parts))


def join(*children: object) -> Markup:
    """Children in sequence: Markup as it is, None skipped, iterables flattened, text escaped."""
    parts = []
    for child in children:
        if child is None:
            continue
        if isinstance(child, Markup):
            parts.append(child)
        elif isinstance(child, (list, tuple)):
            parts.append(join(*child))
        else:
            parts.append(html.escape(str(child)))
    return Markup("".join(parts))


def prose(text: str) -> Markup:
    """Paragraphs, ``- `` lists, ``### `` headings, **bold**, *emphasis*, `code` and http links."""
    blocks = []
    for block in re.split(r"\n\s*\n", text.strip()):
        lines = [line.strip() for line in block.splitlines() if line.strip()]
        while lines:
            is_item = lines[0].startswith("- ")
            taken = 0
            while taken < len(lines) and lines[taken].startswith("- ") == is_item:
                taken += 1
            chunk, lines = lines[:taken], lines[taken:]
            if is_item:
                blocks.append(el("ul", [el("li", _inline(line[2:])) for line in chunk]))
            elif chunk[0].startswith("### "):
                blocks.append(el("h3", _inline(chunk[0][4:])))
                lines = chunk[1:] + lines
            else:
                blocks.append(el("p", _inline(" ".join(chunk))))
    return join(blocks)


def _inline(text: str) -> Markup:
    """Marks spans; code and links are taken out first so that nothing is marked inside them."""
    kept: list[Markup] = []

    def keep(markup: Markup) -> str:
        kept.append(markup)
        return f"\x00{len(kept) - 1}\x00"

    text = text.replace("\x00", "")
    code, name = _SPANS[0]
    text = code.sub(lambda match: keep(el(name, match[1])), text)
    text = _LINK.sub(lambda match: keep(el("a", match[1], href=match[2], rel="noreferrer")), text)
    text = html.escape(text)
    for pattern, name in _SPANS[1:]:
        text = pattern.sub(rf"<{name}>\1</{name}>", text)
    return Markup(re.sub(r"\x00(\d+)\x00", lambda match: kept[int(match[1])], text))
