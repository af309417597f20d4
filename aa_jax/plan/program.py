"""The train step of a config, built from shapes alone: no weights, no data, no device."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from aa_jax import models, recipes
from aa_jax.data.collate import Shapes, collate
from aa_jax.data.features import FEATURES
from aa_jax.errors import ConfigError
from aa_jax.models import Model, adapt, heads
from aa_jax.plan.presets import model_config, with_layers
from aa_jax.rl import objectives
from aa_jax.rl.algorithms import find_algorithm
from aa_jax.sharding import make_mesh, shardings
from aa_jax.training.optim import make_optimizer
from aa_jax.training.state import abstract_state, frozen_paths, split
from aa_jax.training.step import Step, make_step

_STEPS = 1000  # of the learning-rate schedule; the program does not depend on it


@dataclasses.dataclass(frozen=True)
class Layout:
    """Sizes of a row, where the config does not say.

    Attributes:
      length: T, tokens per row.
      response: R, slots of one response.
      images: per row, for models that read them.
      patches: per image where images are of any size: 1024 is 448 x 448 pixels in patches of 14.
    """

    length: int | None = None
    response: int | None = None
    images: int = 1
    patches: int = 1024


@dataclasses.dataclass(frozen=True)
class Program:
    """What one update runs, and what lies in memory beside it.

    Attributes:
      step: from `make_step`, as training builds it.
      state: abstract train state, with shardings.
      batch: abstract batch.
      resident: further trees that training keeps on the devices, by role.
      model: the policy's.
      mesh: the device mesh.
      sequence_tokens: tokens of a batch, padding included.
    """

    step: Step
    state: dict[str, Any]
    batch: dict[str, Any]
    resident: dict[str, Any]
    model: Model
    mesh: Mesh
    sequence_tokens: int

    def trainable(self) -> dict[str, Any]:
        """The abstract parameters that have gradients."""
        paths = frozen_paths(self.state["params"], self.step.frozen)
        return split(self.state["params"], paths)[0]


def build(
    config: Mapping[str, Any],
    model_name: str,
    devices: Sequence[Any],
    *,
    rows: int | None = None,
    accumulation: int | None = None,
    remat: str | None = None,
    layout: Layout | None = None,
    layers: int | None = None,
) -> Program:
    """The step that ``launch/train.py`` or ``launch/rl.py`` would run with this config.

    Args:
      config: resolved, of a training run (`recipe`) or of reinforcement learning (`algorithm`).
      model_name: of the policy, see `presets.model_config`.
      devices: to place it on; they may be those of a topology.
      rows: examples per update; None takes the config's.
      accumulation: micro-batches; None takes the config's.
      remat: policy; None takes the config's.
      layout: sizes of a row; what it leaves open follows from the config's limits.
      layers: of the decoder, instead of the model's own.

    Raises:
      ConfigError: the config names neither a recipe nor an algorithm.
    """
    options = {key: value for key, value in config["model"].items() if key != "path"}
    options |= {"remat": remat} if remat else {}
    mesh = make_mesh(**(config.get("mesh") or {}), devices=devices)
    hf_config = model_config(model_name)
    model = models.build(with_layers(hf_config, layers) if layers else hf_config, **options)
    if config.get("lora"):
        model, _ = adapt.attach(model, model.abstract(), **config["lora"])
    layout = layout or Layout()
    if "recipe" in config:
        return _supervised(config, model, mesh, rows, accumulation, layout)
    if "algorithm" in config:
        return _on_policy(config, model, mesh, rows, accumulation, layout, options)
    raise ConfigError(
        "a plan needs a config of one training: with a 'recipe' (launch/train.py) or an "
        f"'algorithm' (launch/rl.py); this one has {', '.join(config)}."
    )


def _supervised(
    config: Mapping[str, Any],
    model: Model,
    mesh: Mesh,
    rows: int | None,
    accumulation: int | None,
    layout: Layout,
) -> Program:
    train, row = config["train"], recipes.find_recipe(config["recipe"])
    objective = row.objective(model, **(config.get("objective") or {}))
    params, axes = model.abstract(), model.axes()
    frozen = [*model.frozen, *(train.get("frozen") or ())]
    options = config.get("objective") or {}
    if row.head:
        params, axes = _score_model(model, lambda: row.head(model, jax.random.key(0), options))
        frozen = [f"model/{glob}" for glob in frozen]
    limits = config["data"].get("limits") or {}
    length = layout.length or limits.get("max_length") or 2048
    response = layout.response or length // 4
    rows = rows or train.get("batch_rows", 8)
    batch = abstract_batch(model, row.layout, rows, length, response, layout)
    if train.get("tower_cache"):
        batch["media"] = _features(model, batch["media"])
    sequences = batch["sequence_mask"].shape
    if row.reference(options):
        batch["ref_logps"] = jax.ShapeDtypeStruct(sequences, jnp.float32)
    if twin := row.twin(options):
        batch[twin] = dict(batch)
    for name in row.extras(options):
        shape = (rows,) if row.layout == "supervised" else sequences
        batch[name] = jax.ShapeDtypeStruct(shape, jnp.float32)
    return _program(
        config, model, mesh, objective, params, axes, frozen,
        accumulation or train.get("accumulation", 1), batch, {},
    )  # fmt: skip


def _features(model: Model, media: Mapping[str, Any]) -> dict[str, Any]:
    """What a batch holds in the place of media when a frozen tower ran before (`towers`)."""
    lengths = {name: x for name, x in media.items() if name == "feature_lengths"}
    return {
        FEATURES: jax.eval_shape(model.tower_features, model.abstract(), dict(media)),
        **lengths,
    }


def _on_policy(
    config: Mapping[str, Any],
    model: Model,
    mesh: Mesh,
    rows: int | None,
    accumulation: int | None,
    layout: Layout,
    options: Mapping[str, Any],
) -> Program:
    kind, plan = find_algorithm(config["algorithm"]), config["rollout"]
    sampling, loss = config["sampling"], {"loss": kind.loss, **(config.get("objective") or {})}
    loss["temperature"] = sampling.get("temperature", 1.0)
    new, samples = sampling["max_new_tokens"], plan.get("samples", 1)
    if kind.loss == "dr_grpo":
        loss["budget"] = float(new)
    params, axes = model.abstract(), model.axes()
    frozen = [*model.frozen, *(config.get("frozen") or ())]
    if kind.critic:
        score, score_axes = _score_model(model)
        params, axes = {"policy": params, "critic": score}, {"policy": axes, "critic": score_axes}
        frozen = [f"{side}/{glob}" for side in ("policy", "critic/model") for glob in frozen]
        objective = objectives.actor_critic(model, model, **loss)
    else:
        objective = objectives.policy(model, **loss)
    limits = config["prompts"].get("limits") or {}
    prompt = limits.get("max_prompt_length") or 1536
    response = layout.response or new
    length = layout.length or prompt + samples * response
    rows = rows or plan["prompts"] // plan.get("minibatches", 1)
    batch = abstract_batch(model, "group", rows, length, response, layout, sequences=samples)
    priced = kind.kl == "reward" or bool(loss.get("kl_coef", kind.loss == "grpo"))
    more = ["advantages", "old_logps"] + ["returns", "old_values"] * kind.critic
    for name in more + ["ref_token_logps"] * priced:
        batch[name] = jax.ShapeDtypeStruct(batch["loss_mask"].shape, jnp.float32)
    reward_options = {"dtype": (config.get("reward") or {}).get("dtype", "float32")}
    judge = models.build(model.hf_config, **reward_options)
    resident = {"reward model": _score_model(judge)}
    return _program(
        config, model, mesh, objective, params, axes, frozen,
        accumulation or config.get("accumulation", 1), batch, resident, reference=True,
        lr_scales={"critic/*": (config.get("critic") or {}).get("lr_scale", 1.0)}
        if kind.critic else None,
    )  # fmt: skip


def _program(
    config: Mapping[str, Any],
    model: Model,
    mesh: Mesh,
    objective: Any,
    params: Any,
    axes: Any,
    frozen: Sequence[str],
    accumulation: int,
    batch: dict[str, Any],
    resident: Mapping[str, tuple[Any, Any]],
    reference: bool = False,
    **optim: Any,
) -> Program:
    places = shardings(axes, params, mesh)
    optim = {key: value for key, value in optim.items() if value} | dict(config["optim"])
    tx, schedule = make_optimizer(total_steps=_STEPS, **optim)
    offload = bool((config.get("train") or config).get("offload"))
    state = abstract_state(params, tx, mesh=mesh, shardings=places, frozen=frozen, offload=offload)
    step = make_step(
        objective, tx, mesh=mesh, schedule=schedule, frozen=frozen, accumulation=accumulation
    )
    kept = {name: _placed(tree, names, mesh) for name, (tree, names) in resident.items()}
    if reference:
        # Of it, the frozen part is shared with the train state, and a critic starts from it too.
        trained = split(state["params"], frozen_paths(state["params"], frozen))[0]
        kept["initial parameters"] = trained["policy"] if "policy" in trained else trained
    tokens = math.prod(batch["tokens"].shape)
    return Program(step, state, batch, kept, model, mesh, tokens)


def _score_model(model: Model, init: Callable[[], Any] | None = None) -> tuple[Any, Any]:
    """(abstract parameters, axes) of a score model on this backbone."""
    head = jax.eval_shape(init or (lambda: heads.init_score_head(model, jax.random.key(0))))
    return {"model": model.abstract(), "score_head": head}, heads.axes(model, head)


def _placed(tree: Any, axes: Any, mesh: Mesh) -> Any:
    return jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
        tree, shardings(axes, tree, mesh),
    )  # fmt: skip


def abstract_batch(
    model: Model,
    layout: str,
    rows: int,
    length: int,
    response: int,
    sizes: Layout,
    sequences: int = 1,
) -> dict[str, Any]:
    """A batch of the collator, in shapes.

    Args:
      model: decides which media a row holds.
      layout: of `collate`.
      rows: B.
      length: T.
      response: R.
      sizes: images and patches.
      sequences: S of the layout "group".
    """
    shapes = dict(length=length, response_length=response, sequences=sequences)
    if model.family in ("llava",):
        edge = model.config.vision.image_size
        shapes |= dict(images=sizes.images, image_size=(edge, edge))
    elif model.family in ("qwen2_vl", "qwen2_5_vl"):
        numbers = model.config.vision.patch_numbers
        patches = sizes.images * sizes.patches
        shapes |= dict(images=sizes.images, patches=patches, patch_numbers=numbers)
    elif model.family == "qwen2_audio":
        frames = 2 * model.config.audio.max_positions
        clip = (1, model.config.audio.num_mel_bins, frames)
        shapes |= dict(media={"input_features": clip, "feature_lengths": (1,)})
    one = collate([], Shapes(**shapes), layout, batch_rows=1)

    def grow(x: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((rows * x.shape[0], *x.shape[1:]), x.dtype)

    return jax.tree.map(grow, one)
