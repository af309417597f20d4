"""One training run as a config describes it: dataset and checkpoint folder in, checkpoint out."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from aa_jax import models, platforms, recipes, report
from aa_jax.data.dataset import Dataset
from aa_jax.data.mixed import Mixed
from aa_jax.data.processor import Processor
from aa_jax.data.sources import open_source
from aa_jax.data.tokens import Limits
from aa_jax.errors import ConfigError
from aa_jax.models import adapt, heads, peft
from aa_jax.models.chameleon.tokenizer import own_image_encoder
from aa_jax.sharding import make_mesh, shardings
from aa_jax.training.metrics import read_metrics, series


def load_dataset(
    task: str,
    processor: Processor,
    *,
    path: str | None = None,
    mix: Sequence[Mapping[str, Any]] | None = None,
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
) -> Dataset | Mixed:
    """A dataset as a config's `data` section names it.

    Args:
      task: how rows are read, see `Dataset`.
      processor: of the model.
      path: file, folder or hub id.
      mix: several datasets instead of `path`: each its own keyword arguments of this function
        over those given here, and its `weight` (all of them or none; see `Mixed`).
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

    Raises:
      ConfigError: neither `path` nor `mix`, both, or weights for some parts only.
      DataError: see `Dataset`.
    """
    if (path is None) == (mix is None):
        raise ConfigError("the data section names either a path or a mix of several.")
    if mix is not None:
        common = dict(
            template=template, columns=columns, split=split, subset=subset, size=size, keep=keep,
            limits=limits, strict=strict, check_media=check_media, wording=wording,
        )  # fmt: skip
        return _load_mix(task, processor, mix, common)
    return Dataset(
        open_source(path, split=split, subset=subset), template, task, columns=columns,
        processor=processor, limits=Limits(**(limits or {})), strict=strict,
        check_media=check_media, wording=wording, size=size, keep=keep,
    )  # fmt: skip


def _load_mix(
    task: str, processor: Processor, mix: Sequence[Mapping[str, Any]], common: Mapping[str, Any]
) -> Mixed:
    weights = [part.get("weight") for part in mix]
    if any(w is None for w in weights) and any(w is not None for w in weights):
        raise ConfigError("give every dataset of data.mix a weight, or none of them.")
    parts = []
    for number, part in enumerate(mix):
        own = {name: value for name, value in part.items() if name != "weight"}
        if unknown := sorted(set(own) - set(common) - {"path"}):
            raise ConfigError(
                f"data.mix[{number}] has no key {unknown[0]!r}; it has path, weight, "
                f"{', '.join(common)}."
            )
        # A template of its own replaces the common columns, and the other way round.
        shared = dict(common)
        if "template" in own or "columns" in own:
            shared |= {"template": None, "columns": None}
        parts.append(load_dataset(task, processor, **{**shared, **own}))
    return Mixed(parts, None if weights[0] is None else weights)


def save(
    workdir: Path, model: models.Model, params: Any, base: str, *, score_head: bool = False
) -> None:
    """Writes `workdir/model`, and of a model with adapters also `workdir/adapter`.

    Args:
      workdir: run directory.
      model: the model.
      params: its parameters, or a score model's.
      base: the checkpoint folder it started from.
      score_head: whether they are a score model's.
    """
    write = heads.save if score_head else models.save
    write(workdir / "model", model, params, extra_files_from=base, overwrite=True)
    if model.variant.lora is not None:
        finish = heads.writer(params) if score_head else None
        adapters = params["model"] if score_head else params
        peft.save(workdir / "adapter", model, adapters, base=base, overwrite=True, finish=finish)


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
    lora: Mapping[str, Any] | None = None,
    mesh: Mapping[str, Any] | None = None,
    seed: int = 0,
    config: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Trains what a config describes and writes `workdir/model` and `workdir/report.html`.

    With low-rank adapters `workdir/model` has them merged in, and `workdir/adapter` is a PEFT
    folder with them alone.

    Args:
      workdir: run directory; the same command again continues.
      recipe: a key of `aa_jax.recipes.RECIPES`.
      model: `path` of a Hugging Face checkpoint folder, and options of `models.load`.
      data: keyword arguments of `load_dataset`.
      optim: keyword arguments of `make_optimizer`; `lr` is required.
      objective: options of the recipe's objective, e.g. beta.
      train: further keyword arguments of `recipes.train`.
      eval_data: held-out data; what it leaves out is taken from `data`.
      lora: keyword arguments of `aa_jax.models.adapt.attach`: adapters train, the model does not.
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

    def place(m: models.Model) -> Any:
        return shardings(m.axes(), m.abstract(), devices)

    built, params = models.load(path, shardings=place, **options)
    # A model that writes images reads them as tokens too, so they must be made with the rows.
    encode = own_image_encoder(built, params)
    if lora is not None:
        built, params = adapt.attach(built, params, shardings=place, **{"seed": seed, **lora})
    processor = Processor.from_pretrained(path, image_encoder=encode)
    examples = load_dataset(row.task, processor, **data)
    held_out = None
    if eval_data:
        held_out = load_dataset(row.task, processor, **{**data, **eval_data})
    final, figures = recipes.train(
        recipe, model=built, params=params, processor=processor, examples=examples,
        eval_examples=held_out, workdir=workdir, mesh=devices, seed=seed, config=config,
        optim=optim, objective=objective,
        **{"keep_params": False, **(train or {})},
    )  # fmt: skip
    save(workdir, built, final, path, score_head=row.head is not None)
    rows = read_metrics(workdir, stage="train")
    names = sorted({name for line in rows for name in line} - {"stage", "step", "time"})
    hidden = (
        "step_seconds",
        "data_seconds",
        "compute_seconds",
        "checkpoint_seconds",
        "skipped",
        "loss_gap",
    )
    charts = [
        report.Curves(name, {name: series(rows, name)}) for name in names if name not in hidden
    ]
    report.write_report(
        workdir, f"{recipe}: {Path(path).name}",
        [report.KeyValues("This run", figures), report.Grid("Curves", charts)],
        wall_seconds=figures["seconds"],
    )  # fmt: skip
    return figures
