"""One optimizer update as one jitted function, exact whatever the micro-batches and devices."""

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from aa_jax.errors import ConfigError, DataError
from aa_jax.losses.base import Ratio
from aa_jax.sharding.batches import batch_shardings, rows
from aa_jax.sharding.mesh import BATCH_AXES, batch_devices
from aa_jax.training.offload import streamed
from aa_jax.training.optim import updates_done
from aa_jax.training.state import Params, TrainState, frozen_paths, merge, split

Objective = Callable[..., tuple[jax.Array, dict[str, Any]]]


def make_step(
    objective: Objective,
    tx: optax.GradientTransformation,
    *,
    mesh: Mesh,
    schedule: optax.Schedule | None = None,
    frozen: Sequence[str] = (),
    accumulation: int = 1,
) -> "Step":
    """Builds ``step(state, batch, **roles) -> (state, metrics)``.

    Args:
      objective: ``(params, batch, **roles) -> (loss, metrics)``. If it has a parameter called
        `rng` it is given a key that differs per step and micro-batch.
      tx: Optimizer.
      mesh: Device mesh; the state must lie on it (`init_state`).
      schedule: Learning rate by update count, only to report it.
      frozen: Globs of parameters without gradients, the same as the state's.
      accumulation: Number of micro-batches a batch is cut into, in row order.

    Accumulation is exact: the loss is the sum over its terms of total / count, where both are
    sums over the *whole* batch, never a mean of means. This needs ``metrics["loss"]`` as a Ratio,
    or a tuple of Ratios for terms with different denominators; their counts must not depend on
    the parameters.
    """
    if accumulation < 1:
        raise ConfigError(f"accumulation must be at least 1, got {accumulation}")
    return Step(objective, tx, mesh, schedule, tuple(frozen), accumulation)


class Step:
    """See `make_step`. The state handed in is consumed: its buffers become the new state's.

    Metrics are sums with their counts over the whole batch: those of the objective and
      grad_norm: global norm of the gradients before clipping;
      lr: learning rate of this update (if a schedule was given);
      skipped: 1 if the loss or a gradient was not finite; parameters and optimizer state are then
        exactly what they were;
      loss_gap: largest difference between the objective's loss and the mean(s) of
        ``metrics["loss"]``, 0 up to rounding if the objective keeps its contract.
    """

    def __init__(
        self,
        objective: Objective,
        tx: optax.GradientTransformation,
        mesh: Mesh,
        schedule: optax.Schedule | None,
        frozen: tuple[str, ...],
        accumulation: int,
    ):
        self.mesh, self.accumulation, self.frozen = mesh, accumulation, frozen
        self._objective, self._tx, self._schedule = objective, tx, schedule
        self._takes_rng = "rng" in inspect.signature(objective).parameters
        self._frozen_paths: frozenset[str] | None = None
        self._jitted: dict[Any, Any] = {}

    @property
    def rows_multiple(self) -> int:
        """The number of rows of a batch must be a multiple of this."""
        return batch_devices(self.mesh) * self.accumulation

    def __call__(
        self, state: TrainState, batch: Mapping[str, Any], **roles: Any
    ) -> tuple[TrainState, dict[str, Any]]:
        """Runs one update.

        Args:
          state: The train state; donated, except for its frozen parameters.
          batch: Arrays of [B, ...] on the mesh (`sharding.put_batch`) or on the host.
          **roles: Frozen parameter trees the objective asks for, e.g. reference=...
        """
        function, moving, held = self._prepare(state, batch, roles)
        with jax.set_mesh(self.mesh):
            moving, metrics = function(moving, held, dict(batch), roles)
        return {**moving, "params": merge(moving["params"], held)}, metrics

    def lower(self, state: TrainState, batch: Mapping[str, Any], **roles: Any) -> Any:
        """The lowered step, e.g. for ``.compile().memory_analysis()``; arguments may be abstract
        (`abstract_state`)."""
        return self.trace(state, batch, **roles).lower()

    def trace(self, state: TrainState, batch: Mapping[str, Any], **roles: Any) -> Any:
        """The traced step, with its ``jaxpr`` and ``lower()``; arguments may be abstract."""
        function, moving, held = self._prepare(state, batch, roles)
        with jax.set_mesh(self.mesh):
            return function.trace(moving, held, dict(batch), roles)

    def role_shardings(self, roles: Any) -> Any:
        """Where the arrays of roles lie; those from elsewhere go to every device."""

        def place(x: Any) -> NamedSharding:
            sharding = getattr(x, "sharding", None)
            on_mesh = isinstance(sharding, NamedSharding) and sharding.mesh == self.mesh
            return sharding if on_mesh else NamedSharding(self.mesh, P())

        return jax.tree.map(place, roles)

    def _prepare(self, state: TrainState, batch: Mapping[str, Any], roles: Any) -> tuple:
        if self._frozen_paths is None:
            self._frozen_paths = frozen_paths(state["params"], self.frozen)
        trainable, held = split(state["params"], self._frozen_paths)
        moving = {**state, "params": trainable}
        key = (jax.tree.structure((batch, roles)), jax.tree.structure(held))
        if key not in self._jitted:
            self._check_state(moving)
            places = jax.tree.map(lambda x: x.sharding, (moving, held))
            inputs = (*places, batch_shardings(batch, self.mesh), self.role_shardings(roles))
            outputs = (places[0], NamedSharding(self.mesh, P()))
            self._jitted[key] = jax.jit(
                functools.partial(self._update, places[0]["params"]),
                in_shardings=inputs,
                out_shardings=outputs,
                donate_argnums=0,
            )
        if rows(batch) % self.rows_multiple:
            raise DataError(
                f"a batch of {rows(batch)} rows cannot be divided into {self.accumulation} "
                f"micro-batches over {batch_devices(self.mesh)} devices: use a multiple of "
                f"{self.rows_multiple}, or pad it with sharding.pad_rows"
            )
        return self._jitted[key], moving, held

    def _check_state(self, moving: TrainState) -> None:
        expected = jax.eval_shape(self._tx.init, moving["params"])
        if jax.tree.structure(expected) != jax.tree.structure(moving["opt_state"]):
            raise ConfigError(
                "the optimizer state was made for another optimizer or other frozen globs than "
                f"this step's ({list(self.frozen)}): give init_state and make_step the same ones"
            )

    # ------------------------------------------------------------------ inside jit

    def _update(
        self, places: Any, moving: TrainState, held: Params, batch: Any, roles: Any
    ) -> tuple:
        params, opt_state = moving["params"], moving["opt_state"]
        key = jax.random.fold_in(jax.random.wrap_key_data(moving["rng"]), moving["step"])
        grads, metrics, gap = self._gradients(params, places, held, batch, roles, key)
        norm = optax.tree.norm(grads)
        loss = sum(term.mean for term in _terms(metrics["loss"]))
        finite = jnp.isfinite(norm) & jnp.isfinite(loss)

        def keep(new: jax.Array, old: jax.Array) -> jax.Array:
            return jnp.where(finite, new.astype(old.dtype), old)

        def update(opt_state: Any, params: Params, grads: Params) -> tuple:
            updates, new_opt = self._tx.update(grads, opt_state, params)
            new_params = optax.apply_updates(params, updates)
            return jax.tree.map(keep, new_opt, opt_state), jax.tree.map(keep, new_params, params)

        new_opt, new_params = streamed(update, opt_state, params, grads)
        one = jnp.float32(1.0)
        extra = {
            "grad_norm": Ratio(norm, one),
            "skipped": Ratio(1.0 - finite.astype(jnp.float32), one),
            "loss_gap": Ratio(gap, one),
        }
        if self._schedule is not None:
            count = updates_done(opt_state)
            count = moving["step"] if count is None else count
            extra["lr"] = Ratio(jnp.asarray(self._schedule(count), jnp.float32), one)
        moving = {
            "step": moving["step"] + 1,
            "params": new_params,
            "opt_state": new_opt,
            "rng": moving["rng"],
        }
        return moving, metrics | extra

    def _gradients(
        self, params: Params, places: Any, held: Params, batch: Any, roles: Any, key: jax.Array
    ) -> tuple[Any, dict[str, Any], jax.Array]:
        """(float32 gradients of the loss over the whole batch, summed metrics, loss gap)."""

        def evaluate(trainable: Params, micro: Any, index: jax.Array) -> tuple:
            extra = {"rng": jax.random.fold_in(key, index)} if self._takes_rng else {}
            loss, metrics = self._objective(merge(trainable, held), micro, **roles, **extra)
            return loss, _as_ratios(loss, metrics, self.accumulation)

        def counts_of(micro: Any, index: jax.Array) -> tuple:
            _, metrics = evaluate(params, micro, index)
            return tuple(term.count for term in _terms(metrics["loss"]))

        def loss_share(trainable: Params, micro: Any, index: jax.Array, counts: Any) -> tuple:
            loss, metrics = evaluate(trainable, micro, index)
            terms = _terms(metrics["loss"])
            means = sum(term.mean for term in terms)
            gap = jnp.abs(jax.lax.stop_gradient(loss.astype(jnp.float32) - means))
            if counts is None:
                return means, (metrics, gap)
            # This micro-batch's share of the mean over the whole batch.
            pairs = zip(terms, counts, strict=True)
            return sum(Ratio(term.total, count).mean for term, count in pairs), (metrics, gap)

        def widen(grads: Any) -> Any:
            # Pinned to where the parameters lie: no device holds all of them, even for a moment.
            grads = jax.tree.map(lambda g: g.astype(jnp.float32), grads)
            return jax.lax.with_sharding_constraint(grads, places)

        gradients = jax.grad(loss_share, has_aux=True)
        if self.accumulation == 1:
            grads, (metrics, gap) = gradients(params, batch, jnp.int32(0), None)
            return widen(grads), metrics, gap

        micros, single = self._cut(batch)
        indices = jnp.arange(self.accumulation)
        restore = lambda micro: {**single, **micro}  # noqa: E731

        # Counts do not depend on the parameters, so the compiler drops the model from this pass.
        def count_micro(_: None, xs: tuple) -> tuple:
            return None, counts_of(restore(xs[0]), xs[1])

        _, counts = jax.lax.scan(count_micro, None, (micros, indices))
        counts = jax.lax.stop_gradient(jax.tree.map(lambda c: jnp.sum(c, axis=0), counts))

        def add_micro(total: Any, xs: tuple) -> tuple:
            grads, aux = gradients(params, restore(xs[0]), xs[1], counts)
            return jax.tree.map(jnp.add, total, widen(grads)), aux

        zeros = widen(jax.tree.map(jnp.zeros_like, params))
        grads, (metrics, gaps) = jax.lax.scan(add_micro, zeros, (micros, indices))
        return grads, jax.tree.map(lambda m: jnp.sum(m, axis=0), metrics), jnp.max(gaps)

    def _cut(self, batch: Any) -> tuple[Any, Any]:
        """Consecutive rows stay in one micro-batch: a preference pair may be two rows."""
        place = NamedSharding(self.mesh, P(None, BATCH_AXES))

        def cut(x: jax.Array) -> jax.Array:
            x = x.reshape(self.accumulation, -1, *x.shape[1:])
            return jax.lax.with_sharding_constraint(x, place)

        single = {key: x for key, x in batch.items() if not isinstance(x, dict) and not x.ndim}
        by_row = {key: x for key, x in batch.items() if key not in single}
        return jax.tree.map(cut, by_row), single


def _terms(loss: Any) -> tuple[Ratio, ...]:
    return (loss,) if isinstance(loss, Ratio) else tuple(loss)


def _as_ratios(loss: jax.Array, metrics: Mapping[str, Any], accumulation: int) -> dict[str, Any]:
    """Metrics as float32 Ratios; a plain scalar counts once."""
    if "loss" not in metrics and accumulation > 1:
        raise ConfigError(
            "accumulation over micro-batches with unequal counts needs to know what the loss was "
            "divided by, but the objective's metrics have no 'loss'. Return "
            "metrics['loss'] = Ratio(total, count) (or a tuple of them, one per term), or use "
            "accumulation=1."
        )

    def ratio(value: Any) -> Any:
        if isinstance(value, tuple) and not isinstance(value, Ratio):
            return tuple(ratio(term) for term in value)
        total, count = value if isinstance(value, Ratio) else (value, 1.0)
        return Ratio(jnp.asarray(total, jnp.float32), jnp.asarray(count, jnp.float32))

    return {name: ratio(value) for name, value in {"loss": loss, **metrics}.items()}
