"""A small language model with stacked layers, its objectives and its data, shared by the tests.

Also a program: ``python tiny.py WORKDIR REFERENCE`` trains in WORKDIR until it is done, then once
more without interruption in REFERENCE, for the kill-and-resume test.
"""

import os
import sys
import time
from pathlib import Path

import grain
import jax
import jax.numpy as jnp
import numpy as np

from aa_jax.losses.base import Ratio
from aa_jax.sharding import make_mesh, shardings
from aa_jax.training.loop import fit
from aa_jax.training.metrics import MetricWriter
from aa_jax.training.optim import make_optimizer
from aa_jax.training.state import init_state
from aa_jax.training.step import make_step

V, D, F, L, T = 16, 8, 16, 2, 6

AXES = {
    "embed": {"weight": ("vocab", "embed")},
    "layers": {
        "up": {"kernel": ("layers", "embed", "mlp")},
        "down": {"kernel": ("layers", "mlp", "embed")},
    },
    "head": {"kernel": ("embed", "vocab")},
}


def make_params(dtype=np.float32, seed=0):
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return (0.3 * rng.normal(size=shape)).astype(dtype)

    return {
        "embed": {"weight": normal(V, D)},
        "layers": {
            "up": {"kernel": normal(L, D, F)},
            "down": {"kernel": normal(L, F, D)},
        },
        "head": {"kernel": normal(D, V)},
    }


def make_batch(seed, n=8, empty=0):
    """Rows with very different numbers of targets; the last `empty` have none."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, T + 1, n)
    lengths[n - empty :] = 0
    mask = np.arange(T)[None] < lengths[:, None]
    return {
        "tokens": rng.integers(0, V, (n, T), dtype=np.int32),
        "targets": rng.integers(0, V, (n, T), dtype=np.int32),
        "loss_mask": mask.astype(np.float32),
        "sequence_mask": (lengths[:, None] > 0).astype(np.float32),
    }


def logps(params, batch):
    x = params["embed"]["weight"][batch["tokens"]]

    def layer(x, p):
        return x + jnp.tanh(x @ p["up"]["kernel"]) @ p["down"]["kernel"], None

    x, _ = jax.lax.scan(layer, x, params["layers"])
    logits = (x @ params["head"]["kernel"]).astype(jnp.float32)
    picked = jnp.take_along_axis(logits, batch["targets"][..., None], axis=-1)[..., 0]
    return picked - jax.nn.logsumexp(logits, axis=-1)


def sft(params, batch):
    mask = batch["loss_mask"]
    term = Ratio(-jnp.sum(logps(params, batch) * mask), jnp.sum(mask))
    return term.mean, {"loss": term}


def two_terms(params, batch, reference=None):
    """A token mean plus a sequence mean: two denominators."""
    mask, rows = batch["loss_mask"], batch["sequence_mask"][:, 0]
    values = logps(params, batch)
    if reference is not None:
        values = values - logps(reference, batch)
    tokens = Ratio(-jnp.sum(values * mask), jnp.sum(mask))
    sums = jnp.sum(values * mask, axis=-1)
    sequences = Ratio(jnp.sum(jnp.square(sums) * rows), jnp.sum(rows))
    metrics = {"loss": (tokens, sequences), "rows": Ratio(jnp.sum(rows), jnp.float32(1))}
    return tokens.mean + sequences.mean, metrics


def setup(
    objective=sft,
    *,
    mesh=None,
    params=None,
    accumulation=1,
    frozen=(),
    tx=None,
    schedule=None,
):
    """(step, state) on one device unless a mesh is given."""
    mesh = make_mesh(devices=jax.devices()[:1]) if mesh is None else mesh
    params = make_params() if params is None else params
    if tx is None:
        tx, schedule = make_optimizer(1e-2, 30, warmup_steps=2, weight_decay=0.1)
    places = shardings(AXES, params, mesh)
    state = init_state(params, tx, mesh=mesh, shardings=places, frozen=frozen)
    step = make_step(
        objective, tx, mesh=mesh, schedule=schedule, frozen=frozen, accumulation=accumulation
    )
    return step, state


def host(tree):
    return jax.tree.map(np.asarray, tree)


def assert_same(a, b):
    """Bit for bit."""
    jax.tree.map(np.testing.assert_array_equal, host(a), host(b))


def worst(a, b):
    """Largest absolute difference between two trees."""
    pairs = zip(jax.tree.leaves(host(a)), jax.tree.leaves(host(b)), strict=True)
    return max(float(np.abs(np.float64(x) - np.float64(y)).max()) for x, y in pairs)


def grain_batches(n=20, batch_size=8, epochs=3, seed=3):
    """Shuffled rows in batches; the last batch of all is partial."""
    rows = [{k: v[0] for k, v in make_batch(i, 1).items()} for i in range(n)]
    data = grain.MapDataset.source(rows).seed(seed).shuffle().repeat(epochs)
    return iter(data.to_iter_dataset().batch(batch_size, drop_remainder=False))


class Slow:
    """The same batches at a pace at which a run can be killed."""

    def __init__(self, batches, seconds):
        self._batches, self._seconds = batches, seconds

    def __next__(self):
        time.sleep(self._seconds)
        return next(self._batches)

    def get_state(self):
        return self._batches.get_state()

    def set_state(self, state):
        self._batches.set_state(state)


def train(workdir, seconds=0.0, **options):
    step, state = setup(accumulation=2)
    options = {"total_steps": 24, "stage": "sft", "checkpoint_every": 3} | options
    with MetricWriter(workdir, options["stage"], tensorboard=False) as writer:
        return fit(
            step=step,
            state=state,
            batches=Slow(grain_batches(n=61, epochs=3), seconds),
            workdir=workdir,
            writer=writer,
            **options,
        )


if __name__ == "__main__":
    os.environ["AA_JAX_PROGRESS"] = "0"
    for name, seconds in zip(sys.argv[1:3], (0.03, 0.0), strict=True):
        final = train(name, seconds)
        leaves = [np.asarray(x) for x in jax.tree.leaves(final)]
        np.savez(Path(name) / "final.npz", *leaves)
