"""Optimizer state in the host's memory: the same training, elsewhere."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aa_jax.errors import ConfigError
from aa_jax.sharding import make_mesh, shardings
from aa_jax.sharding.rules import HOST, on_host
from aa_jax.training.loop import fit
from aa_jax.training.optim import make_optimizer
from aa_jax.training.state import abstract_state, as_abstract, init_state
from aa_jax.training.step import make_step


def kinds(tree):
    return {x.sharding.memory_kind for x in jax.tree.leaves(tree) if x.ndim}


def parts(tiny, offload):
    mesh = make_mesh(fsdp=4, tensor=2)
    params = tiny.make_params(jnp.bfloat16)
    tx, schedule = make_optimizer(1e-2, 30, warmup_steps=2, weight_decay=0.1)
    places = shardings(tiny.AXES, params, mesh)
    state = init_state(params, tx, mesh=mesh, shardings=places, offload=offload)
    shapes = abstract_state(params, tx, mesh=mesh, shardings=places, offload=offload)
    assert jax.tree.all(jax.tree.map(lambda a, b: a == b, shapes, as_abstract(state)))
    return {"step": make_step(tiny.sft, tx, mesh=mesh, schedule=schedule), "state": state}


def test_the_same_updates_bit_for_bit(tiny):
    made = {}
    for offload in (False, True):
        step, state = parts(tiny, offload).values()
        for seed in range(4):
            state, metrics = step(state, tiny.make_batch(seed))
        made[offload] = jax.device_get((state, metrics))
        held = kinds(state["opt_state"])
        assert held == {HOST} if offload else HOST not in held
        assert HOST not in kinds(state["params"])
    jax.tree.map(np.testing.assert_array_equal, made[True], made[False])
    # One parameter after the other, so that the device never holds the state of all.
    arrays = len(jax.tree.leaves(state["params"]))
    text = str(step.trace(state, tiny.make_batch(0)).jaxpr)
    assert text.count("optimization_barrier") == arrays - 1 == 3


class Numbered:
    """Batch n is made from seed n."""

    def __init__(self, make):
        self.make, self.position = make, 0

    def __next__(self):
        self.position += 1
        return self.make(self.position)

    def get_state(self):
        return {"position": self.position}

    def set_state(self, state):
        self.position = state["position"]


@pytest.mark.parametrize("first", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_run_goes_on_with_the_state_in_the_other_memory(first, tiny, tmp_path):
    def train(folder, offload, steps):
        return fit(
            **parts(tiny, offload), batches=Numbered(tiny.make_batch), total_steps=steps,
            workdir=tmp_path / folder, stage="sft", checkpoint_every=2,
        )  # fmt: skip

    whole = train("whole", False, 4)
    train("two", first, 2)
    state = train("two", not first, 4)
    assert (HOST in kinds(state["opt_state"])) != first
    jax.tree.map(np.testing.assert_array_equal, *jax.device_get((state, whole)))


def test_devices_without_such_memory_are_named():
    memory = SimpleNamespace(kind="hbm")
    device = SimpleNamespace(platform="npu", addressable_memories=lambda: [memory])
    mesh = SimpleNamespace(devices=np.array([device]))
    with pytest.raises(ConfigError, match=r"npu devices offer the memories \['hbm'\], but no"):
        on_host([SimpleNamespace(mesh=mesh)], [np.zeros(3)])
