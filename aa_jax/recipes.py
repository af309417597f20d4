"""A recipe: how examples become batches × which loss × which model roles.

`train` is what a notebook, `launch/train.py` and every LLF stage call. It knows no algorithm: the
recipe's row in `RECIPES` (`aa_jax.recipe_table`) names the reading of a dataset row, the layout of
a batch, and the objective.
"""

import dataclasses
import hashlib
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from aa_jax import hosts, losses, objectives
from aa_jax.config.runs import HARMLESS
from aa_jax.data.buckets import bucket_lengths
from aa_jax.data.collate import Shapes, collate, row_length
from aa_jax.data.encoded import EncodedExamples, WithColumn
from aa_jax.data.judged import Judged
from aa_jax.data.loader import Loader, pack
from aa_jax.data.mismatched import Mismatched
from aa_jax.data.processor import Processor
from aa_jax.data.tokens import Limits, Sizes
from aa_jax.errors import CheckpointError, ConfigError
from aa_jax.models import Model, heads
from aa_jax.recipe_table import RECIPES, Recipe, find_recipe
from aa_jax.sharding import batch_devices, put_batch, shardings, share
from aa_jax.towers import computed_ahead
from aa_jax.training.loop import fit
from aa_jax.training.optim import make_optimizer
from aa_jax.training.state import init_state
from aa_jax.training.step import make_step

__all__ = ["RECIPES", "Recipe", "find_recipe", "reference_logps", "train"]

log = logging.getLogger(__name__)


def train(
    recipe: str,
    *,
    model: Model,
    params: Mapping[str, Any],
    processor: Processor,
    examples: Sequence,
    workdir: str | Path,
    stage: str = "train",
    mesh: jax.sharding.Mesh,
    seed: int = 0,
    batch_rows: int = 8,
    accumulation: int = 1,
    epochs: int | None = 1,
    steps: int | None = None,
    frozen: Sequence[str] = (),
    objective: Mapping[str, Any] | None = None,
    optim: Mapping[str, Any] | None = None,
    limits: Mapping[str, Any] | None = None,
    share_prefix: bool = True,
    pack_length: int | None = None,
    buckets: int = 1,
    reference_cache: str | Path | None = None,
    tower_cache: str | Path | None = None,
    checkpoint_every: int | None = None,
    log_every: int = 10,
    workers: int = 2,
    eval_examples: Sequence | None = None,
    eval_every: int | None = None,
    profile: int | None = None,
    keep_params: bool = True,
    offload: bool = False,
    config: Mapping[str, Any] | None = None,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Trains a model by a recipe; called again with the same `workdir` it continues.

    Args:
      recipe: a key of `RECIPES`.
      model: the architecture.
      params: its initial parameters; also the reference, where the recipe has one. Of a model
        with adapters (`aa_jax.models.adapt`) these alone train and are in checkpoints.
      processor: the model's.
      examples: Examples, or data already encoded (`Dataset`, `EncodedExamples`).
      workdir: run directory.
      stage: name of this training in the run directory.
      mesh: device mesh.
      seed: of the order of the data, and of a new score head.
      batch_rows: examples per update.
      accumulation: micro-batches an update is computed in; does not change the result.
      epochs: passes over the data; None needs `steps`.
      steps: updates; overrides `epochs`.
      frozen: path globs of parameters that do not train, e.g. "vision_tower/*".
      objective: options of the recipe's objective, e.g. beta.
      optim: keyword arguments of `make_optimizer`; `lr` is required.
      limits: keyword arguments of `aa_jax.data.tokens.Limits`.
      share_prefix: one row `prompt | chosen | rejected` per pair instead of two rows.
      pack_length: supervised recipes: rows of this many tokens hold several short examples each,
        and `batch_rows` counts such rows.
      buckets: most row lengths that batches are padded to; above 1 a batch holds examples of
        similar length, and each row length compiles the step once.
      reference_cache: file that keeps the reference log-probs, for other runs on the same data.
      tower_cache: folder that keeps the features of a frozen tower, for this and other runs; they
        are computed before training, and the tower does not run in it (`aa_jax.towers`).
      checkpoint_every: updates between checkpoints.
      log_every: updates per line of metrics.
      workers: threads that read and decode batches while the devices compute; 0: none.
      eval_examples: held-out data; the objective's figures on it are logged as "eval/...".
      eval_every: updates between evaluations; they also run at the end.
      profile: updates before a trace of the next ones is written, see
        `aa_jax.training.observe.Observer`.
      keep_params: False: the caller does not need `params` again, and those that train are gone
        when this returns. They are not kept beside the trained ones in memory.
      offload: keep the optimizer state in the host's memory and fetch it for every update.
      config: of the run, kept in the checkpoint.

    Returns:
      The final parameters, and `examples`, `dropped`, `steps`, `seconds`.

    Raises:
      ConfigError: unknown recipe or option, or neither epochs nor steps.
      DataError: no usable example, or one that does not fit.
    """
    row = find_recipe(recipe)
    if epochs is None and steps is None:
        raise ConfigError("give epochs or steps: otherwise training would never end.")
    if (optim or {}).get("lr") is None:
        raise ConfigError("optim.lr is not set: give the peak learning rate.")
    started = time.perf_counter()
    rule = Limits(**(limits or {}))
    options = dict(objective or {})
    # Built first: a wrong option is an error before anything is read or computed.
    loss = row.objective(model, **options)
    layout = row.layout if share_prefix or row.layout != "preference" else "preference_rows"
    frozen = (*model.frozen, *frozen)

    def encode(examples: Any) -> Any:
        data = _encode(examples, processor, rule)
        if tower_cache is None:
            return data
        return computed_ahead(
            model, params, data, processor=processor, frozen=frozen, folder=tower_cache,
            mesh=mesh, batch_rows=batch_rows, threads=workers,
        )  # fmt: skip

    data, held_out = encode(examples), None
    if eval_examples is not None:
        held_out = encode(eval_examples)
    if row.task in ("unpaired", "judgment", "graded") and any(size.trained for size in data.sizes):
        raise ConfigError(
            f"the recipe {recipe!r} judges a response as a whole, but the data trains earlier "
            "turns too: set train_on='last' in the data's limits."
        )
    shapes, groups = data.shapes(layout), None
    if layout == "preference" or pack_length:
        option = f"pack_length={pack_length}" if pack_length else "share_prefix=True"
        for part in (data, held_out):
            _check_rope(model, part, option)
    if pack_length:
        if layout != "supervised" or row.extras(options):
            raise ConfigError(
                f"pack_length is for supervised recipes; {recipe!r} reads responses one by one."
            )
        shapes = _packed_shapes(data.sizes, shapes, pack_length)
        groups = pack(data.sizes, shapes, seed=seed)
    if buckets < 1 or (buckets > 1 and pack_length):
        raise ConfigError("buckets is 1 or more, and 1 with pack_length: packed rows are all full.")
    lengths, edges = None, ()
    if buckets > 1:
        lengths = [row_length(size.prompt, size.responses, layout) for size in data.sizes]
        edges = bucket_lengths(lengths, buckets)
    roles: dict[str, Any] = {}
    if row.head:
        head = row.head(model, jax.random.key(seed), options)
        params = {"model": dict(params), "score_head": head}
        frozen = tuple(f"model/{glob}" for glob in frozen)
        axes = heads.axes(model, head)
    else:
        axes = model.axes()
    places = shardings(axes, jax.eval_shape(lambda: params), mesh)
    data, form = _prepare(
        row, options, data, shapes, layout, processor, batch_rows, mesh, model, params,
        cache=reference_cache,
    )  # fmt: skip
    loader = Loader(
        data, form, batch_rows, epochs=None if steps else epochs, seed=seed, groups=groups,
        share=share(mesh), multiple_of=batch_devices(mesh) * accumulation, lengths=lengths,
        buckets=edges, threads=workers,
    )  # fmt: skip
    total = steps or len(loader)
    tx, schedule = make_optimizer(total_steps=total, **(optim or {}))
    evaluate = None
    if held_out is not None:
        evaluate = _evaluation(
            row, model, params, options, held_out, layout, processor, batch_rows, mesh
        )
    state = fit(
        step=make_step(
            loss, tx, mesh=mesh, schedule=schedule, frozen=frozen, accumulation=accumulation
        ),
        state=init_state(
            params,
            tx,
            mesh=mesh,
            shardings=places,
            frozen=frozen,
            seed=seed,
            copy=keep_params,
            offload=offload,
        ),
        batches=iter(loader),
        total_steps=total,
        workdir=workdir,
        stage=stage,
        checkpoint_every=checkpoint_every,
        log_every=log_every,
        evaluate=evaluate,
        eval_every=eval_every,
        roles=roles,
        config=config,
        save_frozen=not model.frozen,
        profile=profile,
        may_differ=HARMLESS,
    )
    figures = {
        "examples": len(data),
        "dropped": dict(data.report.dropped),
        "steps": int(state["step"]),
        "tokens_per_row": shapes.length,
        "seconds": time.perf_counter() - started,
    }
    return state["params"], figures


def _check_rope(model: Model, data: Any, option: str) -> None:
    """Refuses sequences that would take their rotary angles from others of their row."""
    rope = getattr(model.config, "text", model.config).rope
    if rope.context is None or data is None:
        return
    longest = max(size.prompt + max(size.responses, default=0) for size in data.sizes)
    if longest > rope.context:
        raise ConfigError(
            f"train.{option} puts several sequences into one row, but this model's rotary angles "
            f"(rope_type {rope.kind!r}) depend on a row's length beyond {rope.context} tokens, and "
            f"the longest sequence has {longest}: log-probs would depend on the neighbours. Set "
            "train.share_prefix=False and leave out pack_length, or drop longer examples with "
            f"data.limits.max_length={rope.context}."
        )


def _packed_shapes(sizes: Sequence[Sizes], single: Shapes, length: int) -> Shapes:
    """Shapes of a packed row: as many response slots and images as such rows use on average, with
    a quarter to spare; packing then fills rows within them."""
    share = 1.25 * length / np.mean([size.prompt + sum(size.responses) for size in sizes])
    slots = np.mean([sum(size.responses) + size.trained for size in sizes])
    return dataclasses.replace(
        single,
        length=max(length, single.length),
        response_length=max(single.response_length, int(np.ceil(share * slots))),
        images=max(single.images, int(np.ceil(share * np.mean([s.images for s in sizes])))),
        patches=max(single.patches, int(np.ceil(share * np.mean([s.patches for s in sizes])))),
        media={
            name: (max(most, int(np.ceil(share * _mean_items(sizes, name)))), *shape)
            for name, (most, *shape) in single.media.items()
        },
    )


def _mean_items(sizes: Sequence[Sizes], name: str) -> float:
    """Entries of a media array per example."""
    return float(np.mean([size.media.get(name, (0,))[0] for size in sizes]))


def _prepare(
    row: Recipe,
    options: Mapping[str, Any],
    data: Any,
    shapes: Shapes,
    layout: str,
    processor: Processor,
    batch_rows: int,
    mesh: jax.sharding.Mesh,
    model: Model,
    params: Mapping[str, Any],
    cache: str | Path | None = None,
) -> tuple[Any, Callable]:
    """(data with all the loss reads, how it becomes a batch)."""
    twin, twin_shapes = row.twin(options), None
    if twin is not None:
        data = Judged(data, processor) if twin == "plain" else Mismatched(data)
        twin_shapes = {twin: data.twin_shapes(layout)}
    extras = row.extras(options)
    form = _form(shapes, layout, processor, extras, twin_shapes)
    if row.reference(options):
        values = reference_logps(model, params, data, form, batch_rows, mesh, cache=cache)
        data = WithColumn(data, "ref_logps", values)
        form = _form(shapes, layout, processor, (*extras, "ref_logps"), twin_shapes)
    return data, form


def _form(
    shapes: Shapes,
    layout: str,
    processor: Processor,
    extras: Sequence[str] = (),
    twin_shapes: Mapping[str, Shapes] | None = None,
) -> Callable:
    """`(items, batch_rows, length=None) -> batch`; a length replaces that of the shapes.

    A pair's extras are split where its rows are; reference log-probs of an example and its
    mismatched twin where those are.
    """

    def form(items: Sequence, batch_rows: int, length: int | None = None) -> dict[str, Any]:
        rest = dict(batch_rows=batch_rows, pad_id=processor.pad_id)
        fitting = shapes if length is None else dataclasses.replace(shapes, length=length)
        batch = collate(items, fitting, layout, extras=extras, **rest)
        if layout == "preference_rows":
            for name in extras:  # every row carries (chosen, rejected); it is one of the two
                rows = np.arange(len(batch[name]))
                batch[name] = batch[name][rows, rows % 2][:, None]
        for twin, its_shapes in (twin_shapes or {}).items():
            batch[twin] = collate([item.meta[twin] for item in items], its_shapes, layout, **rest)
            if "ref_logps" in batch:
                both = batch["ref_logps"]
                batch["ref_logps"], batch[twin]["ref_logps"] = both[:, :1], both[:, 1:]
        return batch

    return form


def _encode(examples: Any, processor: Processor, limits: Limits) -> Any:
    """Data with `shapes` and `report`; encoded data is taken as it is."""
    if hasattr(examples, "shapes"):
        return examples
    return EncodedExamples(examples, processor, limits)


def reference_logps(
    model: Model,
    params: Mapping[str, Any],
    data: Any,
    form: Callable,
    batch_rows: int,
    mesh: jax.sharding.Mesh,
    cache: str | Path | None = None,
) -> np.ndarray:
    """Summed log-probs under the initial model, [N, k] float32: of (chosen, rejected), or of a
    response and then its mismatched twin, if it has one.

    Computed once, before training, so that no second model is in memory during it.

    Args:
      model: the architecture.
      params: of the reference.
      data: encoded pairs.
      form: collates a list of them.
      batch_rows: pairs per batch.
      mesh: device mesh.
      cache: npz file; used if it was made by this very model from these parameters and pairs.
    """
    path = Path(cache) if cache else None
    key = _fingerprint(model, params, data) if path else ""
    if path and hosts.first(path.exists()):
        try:
            stored = np.load(path)
            if str(stored["key"]) == key:
                return stored["values"]
        except (OSError, ValueError, KeyError) as error:
            raise CheckpointError(
                f"{path} cannot be read as cached reference log-probs ({error}). Delete it; they "
                "are computed again."
            ) from error
        log.warning("%s belongs to another reference or other pairs; computing again.", path)
    one = objectives.compute_ref_logps(model)

    def both(params: Mapping[str, Any], batch: Mapping[str, Any]) -> jax.Array:
        parts = [one(params, batch)]
        if "mismatched" in batch:
            parts.append(one(params, batch["mismatched"]))
        return jax.numpy.concatenate(parts, axis=-1)

    compute = jax.jit(both)
    parts = []
    responses = len(data[0].responses)
    for batch in _in_order(data, form, batch_rows, mesh):
        columns = responses + ("mismatched" in batch)
        found = hosts.to_host(compute(params, batch)).reshape(-1, columns)
        parts.append(found[:batch_rows])  # what follows only fills up the devices
    values = np.concatenate(parts)[: len(data)].astype(np.float32)
    if path and hosts.index() == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.stem + ".partial.npz")
        np.savez(partial, key=key, values=values)
        partial.replace(path)
    return values


def _in_order(
    data: Any, form: Callable, batch_rows: int, mesh: jax.sharding.Mesh
) -> Iterator[dict[str, Any]]:
    """The data once, in batches on the mesh; each process makes its own rows of them."""
    own, multiple = share(mesh), batch_devices(mesh)
    loader = Loader(data, form, batch_rows, shuffle=False, share=own, multiple_of=multiple)
    for batch in loader:
        yield put_batch(batch, mesh, own)


def _fingerprint(model: Model, params: Mapping[str, Any], data: Any) -> str:
    """A hash of model, parameters and pairs: all that the cached numbers depend on."""
    # The parameters do not say how they are used: rope, norms, windows, an adapter's strength.
    used = f"{model.family} {model.dtype} {model.config} {model.variant}"
    digest = hashlib.sha256(used.encode())

    def add(name: str, array: Any) -> None:
        array = np.ascontiguousarray(array)
        digest.update(f"{name} {array.dtype} {array.shape} ".encode())
        digest.update(array.tobytes())

    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        add(jax.tree_util.keystr(path), hosts.to_host(leaf))
    for index in range(len(data)):
        item = data[index]
        twin = item.meta.get("mismatched")
        add("prompt", item.prompt)
        for response in (*item.responses, *(twin.responses if twin else ())):
            add("response", response)
        # Pixels are not all there is to a medium: the time between a video's frames is here.
        if item.positions is not None:
            add("positions", item.positions)
            add("next", np.int64(item.next_position))
        if item.media:
            add("feature_index", item.feature_index)
        for name in sorted(item.media):
            add(name, item.media[name])
    return digest.hexdigest()


def _evaluation(
    row: Recipe,
    model: Model,
    params: Mapping[str, Any],
    options: Mapping[str, Any],
    data: Any,
    layout: str,
    processor: Processor,
    batch_rows: int,
    mesh: jax.sharding.Mesh,
) -> Callable[[Mapping[str, Any], int], dict[str, float]]:
    """The objective's figures over held-out data, summed exactly over all its batches."""
    data, form = _prepare(
        row, options, data, data.shapes(layout), layout, processor, batch_rows, mesh, model, params
    )
    loss = jax.jit(row.objective(model, **options))

    def evaluate(state: Mapping[str, Any], step: int) -> dict[str, float]:
        sums = None
        for batch in _in_order(data, form, batch_rows, mesh):
            _, metrics = loss(state["params"], batch)
            metrics = jax.device_get(metrics)
            sums = metrics if sums is None else jax.tree.map(np.add, sums, metrics)
        # A loss may be several terms, each with a denominator of its own.
        return {name: float(losses.total_loss(terms)) for name, terms in sums.items()}

    return evaluate
