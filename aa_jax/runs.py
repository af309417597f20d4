"""One training run as a config describes it: dataset and checkpoint folder in, checkpoint out."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from aa_jax import models, platforms, recipes, report
from aa_jax.data.dataset import Dataset
from aa_jax.data.processor import Processor
from aa_jax.data.sources import open_source
from aa_jax.data.tokens import Limits
from aa_jax.models import heads
from aa_jax.sharding import make_mesh, shardings
from aa_jax.training.metrics import read_metrics, series


def load_dataset(
    task: str,
    processor: Processor,
    *,
    path: str,
    template: str | None = None,
    columns: Mapping[str, str] | None = None,
    split: str = "train",
    subset: str | None = None,
    size: int | None = None,
    keep: int | None = None,
    limits: Mapping[str, Any] | None = None,
    strict: bool = False,
    check_media: bool = False,
    wording: Mapping[str, str] | None = None,
) -> Dataset:
    """A dataset as a config's `data` section names it.

    Args:
      task: how rows are read, see `Dataset`.
      processor: of the model.
      path: file, folder or hub id.
      template: key of `aa_jax.data.templates.TEMPLATES`.
      columns: your own column names, instead of a template.
      split: e.g. "train".
      subset: of a hub dataset, e.g. "text-image-to-text".
      size: use only the first rows.
      keep: stop at this many examples.
      limits: keyword arguments of `Limits`, e.g. max_length.
      strict: refuse the dataset at the first invalid row instead of dropping and counting it.
      check_media: decode every image before training starts.
      wording: of the feedback prompts.
    """
    return Dataset(
        open_source(path, split=split, subset=subset), template, task, columns=columns,
        processor=processor, limits=Limits(**(limits or {})), strict=strict,
        check_media=check_media, wording=wording, size=size, keep=keep,
    )  # fmt: skip


def run(
    workdir: str | Path,
    *,
    recipe: str,
    model: Mapping[str, Any],
    data: Mapping[str, Any],
    optim: Mapping[str, Any],
    objective: Mapping[str, Any] | None = None,
    train: Mapping[str, Any] | None = None,
    eval_data: Mapping[str, Any] | None = None,
    mesh: Mapping[str, int] | None = None,
    seed: int = 0,
    config: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Trains what a config describes and writes `workdir/model` and `workdir/report.html`.

    Args:
      workdir: run directory; the same command again continues.
      recipe: a key of `aa_jax.recipes.RECIPES`.
      model: `path` of a Hugging Face checkpoint folder, and options of `models.load`.
      data: keyword arguments of `load_dataset`.
      optim: keyword arguments of `make_optimizer`; `lr` is required.
      objective: options of the recipe's objective, e.g. beta.
      train: further keyword arguments of `recipes.train`.
      eval_data: held-out data; what it leaves out is taken from `data`.
      mesh: sizes for `make_mesh`; default: all devices over data.
      seed: of the order of the data and of new parameters.
      config: the resolved config, kept in the checkpoint.

    Returns:
      Figures of the run.
    """
    workdir = Path(workdir)
    row = recipes.find_recipe(recipe)
    platforms.current()  # says in the log what it decides
    devices = make_mesh(**(mesh or {}))
    options = dict(model)
    path = options.pop("path")
    built, params = models.load(
        path, shardings=lambda m: shardings(m.axes(), m.abstract(), devices), **options
    )
    processor = Processor.from_pretrained(path)
    examples = load_dataset(row.task, processor, **data)
    held_out = None
    if eval_data:
        held_out = load_dataset(row.task, processor, **{**data, **eval_data})
    final, figures = recipes.train(
        recipe, model=built, params=params, processor=processor, examples=examples,
        eval_examples=held_out, workdir=workdir, mesh=devices, seed=seed, config=config,
        optim=optim, objective=objective, **(train or {}),
    )  # fmt: skip
    if row.score_head:
        heads.save(workdir / "model", built, final, extra_files_from=path, overwrite=True)
    else:
        models.save(workdir / "model", built, final, extra_files_from=path, overwrite=True)
    rows = read_metrics(workdir, stage="train")
    names = sorted({name for line in rows for name in line} - {"stage", "step", "time"})
    hidden = ("step_seconds", "data_seconds", "compute_seconds", "skipped", "loss_gap")
    charts = [
        report.Curves(name, {name: series(rows, name)}) for name in names if name not in hidden
    ]
    report.write_report(
        workdir, f"{recipe}: {Path(path).name}",
        [report.KeyValues("This run", figures), report.Grid("Curves", charts)],
        wall_seconds=figures["seconds"],
    )  # fmt: skip
    return figures
