"""Optimizers: an optax chain with its learning-rate schedule."""

import math
from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from typing import Any

import jax
import jax.numpy as jnp
import optax

from aa_jax.errors import ConfigError
from aa_jax.sharding.rules import path_name

_EXEMPT = ("bias", "scale")


def make_optimizer(
    lr: float,
    total_steps: int,
    *,
    name: str = "adamw",
    schedule: str = "cosine",
    warmup_ratio: float = 0.03,
    warmup_steps: int | None = None,
    end_lr_ratio: float = 0.0,
    b1: float = 0.9,
    b2: float = 0.95,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    clip_norm: float | None = 1.0,
    momentum: float = 0.0,
    moment_dtype: str | None = None,
    master_weights: bool = True,
    lr_scales: Mapping[str, float] | None = None,
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """An optimizer and the learning rate it uses at each of its updates.

    Args:
      lr: Peak learning rate.
      total_steps: Number of optimizer updates; the schedule ends here.
      name: "adamw" (Loshchilov & Hutter 2019, decay times learning rate as in torch), "sgd", or
        "adafactor" (Shazeer & Stern 2018).
      schedule: After the warm-up: "cosine", "linear" or "constant".
      warmup_ratio: Share of `total_steps` over which the rate rises linearly from 0, rounded up.
      warmup_steps: The same in steps; overrides `warmup_ratio`.
      end_lr_ratio: Rate at `total_steps` as a share of `lr` (cosine, linear).
      b1: AdamW decay of the first moment.
      b2: AdamW decay of the second moment.
      eps: AdamW term outside the square root.
      weight_decay: Not applied to biases, norms and one-dimensional parameters, see `decay_mask`.
      clip_norm: Largest global gradient norm; None for no clipping.
      momentum: SGD momentum.
      moment_dtype: Type AdamW keeps its first moment in, "bfloat16" or "float32"; None is that of
        the gradients. The second moment stays float32: with a decay of 0.95 or more, bfloat16
        would round its changes away.
      master_weights: Keep a float32 copy of bfloat16/float16 parameters in the optimizer state,
        so that updates smaller than their rounding are not lost.
      lr_scales: Factor of the learning rate for the parameters whose path matches a glob, e.g.
        {"critic/*": 0.5}; the first match counts.

    Returns:
      (transformation, schedule: update count -> learning rate)

    Raises:
      ConfigError: An unknown name or schedule, or a warm-up longer than the run.
    """
    if name not in _OPTIMIZERS:
        raise ConfigError(f"optimizer {name!r} is unknown; there are {', '.join(_OPTIMIZERS)}")
    rate = make_schedule(
        lr,
        total_steps,
        schedule=schedule,
        warmup_ratio=warmup_ratio,
        warmup_steps=warmup_steps,
        end_lr_ratio=end_lr_ratio,
    )
    parts = [optax.clip_by_global_norm(clip_norm)] if clip_norm else []
    if moment_dtype not in (None, "float32", "bfloat16") or (moment_dtype and name != "adamw"):
        raise ConfigError(
            f"moment_dtype={moment_dtype!r} with {name!r}: the first moment of adamw is kept in "
            "'float32' or 'bfloat16'; leave it out for other optimizers."
        )
    parts += _OPTIMIZERS[name](b1=b1, b2=b2, eps=eps, momentum=momentum, mu_dtype=moment_dtype)
    if weight_decay:
        parts.append(optax.add_decayed_weights(weight_decay, mask=decay_mask))
    if lr_scales:
        parts.append(_scale_by_path(lr_scales))
    tx = optax.chain(*parts, optax.scale_by_learning_rate(rate))
    return (with_master_weights(tx) if master_weights else tx), rate


_OPTIMIZERS: dict[str, Callable[..., list[optax.GradientTransformation]]] = {
    "adamw": lambda b1, b2, eps, mu_dtype, **_: [
        optax.scale_by_adam(b1=b1, b2=b2, eps=eps, mu_dtype=mu_dtype)
    ],
    "sgd": lambda momentum, **_: [optax.trace(decay=momentum)] if momentum else [],
    "adafactor": lambda **_: [
        optax.scale_by_factored_rms(),
        optax.clip_by_block_rms(1.0),
        optax.scale_by_param_block_rms(),
    ],
}


def _scale_by_path(scales: Mapping[str, float]) -> optax.GradientTransformation:
    """Multiplies updates, decay included, by the factor of the first glob their path matches."""

    def scale(updates: Any, params: Any = None) -> Any:
        def one(path: Any, update: jax.Array) -> jax.Array:
            name = path_name(path)
            factors = (factor for glob, factor in scales.items() if fnmatchcase(name, glob))
            return update * next(factors, 1.0)

        return jax.tree_util.tree_map_with_path(one, updates)

    return optax.stateless(scale)


def make_schedule(
    lr: float,
    total_steps: int,
    *,
    schedule: str = "cosine",
    warmup_ratio: float = 0.03,
    warmup_steps: int | None = None,
    end_lr_ratio: float = 0.0,
) -> optax.Schedule:
    """Update count -> learning rate; see `make_optimizer`. Count 0 is the first update."""
    warmup = math.ceil(total_steps * warmup_ratio) if warmup_steps is None else warmup_steps
    if total_steps < 1 or not 0 <= warmup <= total_steps:
        raise ConfigError(
            f"a schedule of {total_steps} steps cannot have {warmup} warm-up steps: lower "
            "warmup_steps or warmup_ratio, or train longer"
        )
    rest = max(total_steps - warmup, 1)
    decays = {
        "cosine": lambda: optax.cosine_decay_schedule(lr, rest, alpha=end_lr_ratio),
        "linear": lambda: optax.linear_schedule(lr, lr * end_lr_ratio, rest),
        "constant": lambda: optax.constant_schedule(lr),
    }
    if schedule not in decays:
        raise ConfigError(f"schedule {schedule!r} is unknown; there are {', '.join(decays)}")
    if not warmup:
        return decays[schedule]()
    rise = optax.linear_schedule(0.0, lr, warmup)
    return optax.join_schedules([rise, decays[schedule]()], [warmup])


def decay_mask(params: Any) -> Any:
    """True for the parameters weight decay applies to.

    By name, because stacked layers give norms and biases a second dimension: no decay for leaves
    called bias or scale, anything inside a norm, and arrays of at most one dimension.
    """

    def decays(path: Any, leaf: Any) -> bool:
        parts = path_name(path).split("/")
        exempt = parts[-1] in _EXEMPT or any("norm" in part for part in parts)
        return not exempt and leaf.ndim > 1

    return jax.tree_util.tree_map_with_path(decays, params)


def with_master_weights(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """Runs an optimizer in float32 whatever the dtype of the parameters.

    The state holds ``{"master": {path: float32 copy of each low-precision parameter}, "inner"}``.
    The update it returns takes the parameters exactly to the rounded master copy.
    """

    def init(params: Any) -> dict[str, Any]:
        flat, _ = jax.tree_util.tree_flatten_with_path(params)
        low = {path_name(path): _widen(p) for path, p in flat if _is_low(p)}
        return {"master": low, "inner": tx.init(jax.tree.map(_widen, params))}

    def update(grads: Any, state: dict[str, Any], params: Any = None) -> tuple[Any, Any]:
        master = state["master"]
        wide = jax.tree_util.tree_map_with_path(
            lambda path, p: master.get(path_name(path), p), params
        )
        updates, inner = tx.update(jax.tree.map(_widen, grads), state["inner"], wide)
        new = jax.tree.map(lambda w, u: w + u, wide, updates)
        flat, _ = jax.tree_util.tree_flatten_with_path(new)
        kept = {name: w for path, w in flat if (name := path_name(path)) in master}
        updates = jax.tree.map(
            lambda p, w, u: _widen(w.astype(p.dtype)) - _widen(p) if _is_low(p) else u,
            params,
            new,
            updates,
        )
        return updates, {"master": kept, "inner": inner}

    return optax.GradientTransformation(init, update)


def updates_done(opt_state: Any) -> jax.Array | None:
    """The update count the learning-rate schedule is at; None if the optimizer has no schedule."""
    is_schedule = lambda node: isinstance(node, optax.ScaleByScheduleState)  # noqa: E731
    nodes = jax.tree.leaves(opt_state, is_leaf=is_schedule)
    return next((node.count for node in nodes if is_schedule(node)), None)


def _is_low(p: Any) -> bool:
    return jnp.issubdtype(p.dtype, jnp.floating) and jnp.dtype(p.dtype).itemsize < 4


def _widen(p: Any) -> Any:
    return p.astype(jnp.float32) if _is_low(p) else p
