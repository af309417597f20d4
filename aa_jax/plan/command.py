"""What ``launch/plan.py`` does, as functions."""

import copy
import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from aa_jax import config as configs
from aa_jax.errors import ConfigError
from aa_jax.plan import sharding_view, tables
from aa_jax.plan.measure import Figures, measure
from aa_jax.plan.program import Layout, Program, build
from aa_jax.plan.search import REMAT, search
from aa_jax.plan.targets import open_slice


@dataclasses.dataclass(frozen=True)
class Wishes:
    """What a plan is asked for; None follows the config.

    Attributes:
      model: see `presets.model_config`.
      topology: see `targets.open_slice`.
      rows: examples per update.
      search: try larger micro-batches and less recomputation.
      micro: rows per device and micro-batch to try.
      remat: policies to try.
      length: tokens per row.
      response: slots per response.
      patches: per image, for models that read any size.
    """

    model: str | None
    topology: str
    rows: int | None = None
    search: bool = False
    micro: Sequence[int] | None = None
    remat: Sequence[str] | None = None
    length: int | None = None
    response: int | None = None
    patches: int = 1024

    @property
    def layout(self) -> Layout:
        return Layout(length=self.length, response=self.response, patches=self.patches)


def run(cfg: ConfigDict, wishes: Wishes, tell: Callable[[str], None]) -> list[Figures]:
    """Compiles what was asked for.

    Args:
      cfg: a training's config; paths of data and checkpoints may be empty.
      wishes: what else.
      tell: called with text for the user.

    Returns:
      Figures of all compiled steps; after a search, of the best one alone.
    """
    config, model = resolve(cfg, wishes)
    place = open_slice(wishes.topology)
    with place.tracing():
        if wishes.search or wishes.micro:
            remat = wishes.remat or (REMAT if wishes.search else [config["model"].get("remat")])
            best, tried = search(
                config, model, place, total_rows=wishes.rows, remat=remat, rows=wishes.micro,
                layout=wishes.layout, tell=lambda one: tell(tables.describe(one)),
            )  # fmt: skip
            if not wishes.search:
                return tried
            tell("nothing fits" if best is None else f"best: {best.rows:g} rows, {best.remat}")
            return [best] if best else tried[-1:]
        found = []
        for policy in wishes.remat or [config["model"].get("remat", "none")]:
            program = _build(config, model, place.devices, wishes, policy)
            found.append(measure(program, place, policy))
            tell(tables.describe(found[-1]))
    return found


def show(cfg: ConfigDict, wishes: Wishes, workdir: Path | None) -> str:
    """Where every array of a run lies, as text; with a run directory also sharding.html there."""
    config, model = resolve(cfg, wishes)
    place = open_slice(wishes.topology)
    with place.tracing():
        program = _build(config, model, place.devices, wishes, None)
    rows = sharding_view.rows(program)
    text = sharding_view.text(rows, program.mesh)
    if workdir is not None:
        file = sharding_view.write_html(workdir, rows, program.mesh, place.name)
        text += f"\n{file}"
    return text


def resolve(cfg: ConfigDict, wishes: Wishes) -> tuple[dict[str, Any], str]:
    """(plain config with its empty paths filled, name of the model).

    Raises:
      ConfigError: no model was named.
    """
    cfg = copy.deepcopy(cfg)  # its own copy refuses empty placeholders
    model = wishes.model
    for key in configs.missing(cfg):
        *sections, last = key.split(".")
        holder = cfg
        for section in sections:
            holder = holder[section]
        if key == "model.path" and not model:
            raise ConfigError(
                "no model was named: give --model=llava-1.5-7b (a known name, a checkpoint folder "
                "or a config.json), or --config.model.path."
            )
        holder[last] = "not needed"
    config = configs.resolve(cfg)
    return config, model or config["model"]["path"]


def _build(
    config: dict[str, Any], model: str, devices: Any, wishes: Wishes, remat: str | None
) -> Program:
    return build(config, model, devices, rows=wishes.rows, remat=remat, layout=wishes.layout)
