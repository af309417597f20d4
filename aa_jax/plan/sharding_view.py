"""Where every array of a run lies: a table, and a picture that opens in a browser."""

import dataclasses
import html
import math
from collections.abc import Sequence
from pathlib import Path

import jax
from jax.sharding import Mesh

from aa_jax.plan.program import Program
from aa_jax.platforms.chips import GIB
from aa_jax.sharding.rules import path_name

_COLOURS = {
    "data": "#8da0cb", "fsdp": "#66c2a5", "tensor": "#fc8d62",
    "seq": "#e78ac3", "expert": "#a6d854",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Row:
    """One array.

    Attributes:
      where: "params", "opt_state" or a further role.
      path: its name there.
      shape: of the whole array.
      dtype: its type.
      axes: the mesh axes each dimension is divided over.
      shard: shape on one device.
      bytes: on one device.
    """

    where: str
    path: str
    shape: tuple[int, ...]
    dtype: str
    axes: tuple[tuple[str, ...], ...]
    shard: tuple[int, ...]
    bytes: int


def rows(program: Program) -> list[Row]:
    """Every array of the train state and of the roles beside it, in tree order."""
    trees = {"params": program.state["params"], "opt_state": program.state["opt_state"]}
    out = []
    for where, tree in (trees | program.resident).items():
        for path, x in jax.tree_util.tree_leaves_with_path(tree):
            spec = tuple(x.sharding.spec) + (None,) * (len(x.shape) - len(x.sharding.spec))
            axes = tuple((a,) if isinstance(a, str) else tuple(a or ()) for a in spec)
            shard = x.sharding.shard_shape(x.shape)
            size = math.prod(shard) * x.dtype.itemsize
            row = Row(where, path_name(path), x.shape, str(x.dtype), axes, tuple(shard), size)
            out.append(row)
    return out


def text(found: Sequence[Row], mesh: Mesh) -> str:
    """The table, one line per array, and sums."""
    width = max(len(f"{row.where}/{row.path}") for row in found)
    lines = [_mesh_line(mesh)]
    for row in found:
        dims = _dims(row, mesh)
        name = f"{row.where}/{row.path}"
        lines.append(f"{name:<{width}}  {row.dtype:<9} {dims:<44} {row.bytes / 2**20:10.2f} MiB")
    for where in dict.fromkeys(row.where for row in found):
        total = sum(row.bytes for row in found if row.where == where)
        lines.append(f"{where}: {total / GIB:.2f} GiB per device")
    return "\n".join(lines)


def write_html(workdir: Path, found: Sequence[Row], mesh: Mesh, title: str) -> Path:
    """A self-contained page: a bar per array as long as its share of a device's memory, a box per
    dimension in the colours of the mesh axes that divide it.

    Returns:
      ``workdir/sharding.html``.
    """
    most = max(row.bytes for row in found)
    legend = " ".join(
        f'<span class="box" style="background:{_COLOURS[axis]}">{axis} = {size}</span>'
        for axis, size in mesh.shape.items()
        if size > 1
    )
    body = []
    for where in dict.fromkeys(row.where for row in found):
        own = [row for row in found if row.where == where]
        total = sum(row.bytes for row in own)
        body.append(f"<h2>{html.escape(where)}: {total / GIB:.2f} GiB per device</h2><table>")
        for row in own:
            boxes = "".join(_box(n, a, mesh) for n, a in zip(row.shape, row.axes, strict=True))
            bar = f'<div class="bar" style="width:{max(100 * row.bytes / most, 0.3):.1f}%"></div>'
            body.append(
                f"<tr><td>{html.escape(row.path)}</td><td>{row.dtype}</td>"
                f"<td>{boxes or 'scalar'}</td><td class=n>{row.bytes / 2**20:.2f} MiB</td>"
                f"<td class=w>{bar}</td></tr>"
            )
        body.append("</table>")
    page = (
        f"<!doctype html><meta charset=utf-8><title>{html.escape(title)}</title><style>"
        "body{font:14px system-ui;margin:2em}td{padding:2px 8px;white-space:nowrap}"
        ".n{text-align:right}.w{width:30%}.bar{background:#888;height:10px}"
        ".box{display:inline-block;border:1px solid #999;padding:0 6px;margin-right:3px}"
        f"</style><h1>{html.escape(title)}</h1><p>{html.escape(_mesh_line(mesh))}</p>"
        f"<p>{legend} <span class=box>not divided</span></p>{''.join(body)}\n"
    )
    file = Path(workdir) / "sharding.html"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(page, encoding="utf-8")
    return file


def _mesh_line(mesh: Mesh) -> str:
    axes = ", ".join(f"{name}={size}" for name, size in mesh.shape.items())
    return f"{mesh.size} devices: {axes}"


def _dims(row: Row, mesh: Mesh) -> str:
    """ "[32, 4096/fsdp, 11008/tensor]" """
    parts = [
        "/".join([str(size), *(axis for axis in axes if mesh.shape[axis] > 1)])
        for size, axes in zip(row.shape, row.axes, strict=True)
    ]
    return f"[{', '.join(parts)}]"


def _box(size: int, axes: Sequence[str], mesh: Mesh) -> str:
    dividing = [axis for axis in axes if mesh.shape[axis] > 1]
    if not dividing:
        return f'<span class="box">{size}</span>'
    colours = [_COLOURS[axis] for axis in dividing]
    paint = colours[0] if len(colours) == 1 else f"linear-gradient(90deg,{','.join(colours)})"
    return f'<span class="box" style="background:{paint}">{size} / {" / ".join(dividing)}</span>'
