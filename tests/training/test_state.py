"""What trains, what is frozen, and where the state lies."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aa_jax.errors import ConfigError
from aa_jax.sharding import make_mesh, shardings
from aa_jax.training.optim import make_optimizer
from aa_jax.training.state import (
    abstract_state,
    as_abstract,
    frozen_paths,
    init_state,
    merge,
    split,
)

PARAMS = {
    "vision_tower": {"layers": {"q": {"kernel": np.ones((2, 3))}}, "norm": {"scale": np.ones(3)}},
    "projector": {"kernel": np.ones((3, 4))},
    "head": {"kernel": np.ones((4, 5))},
}


def test_globs_reach_below_slashes():
    assert frozen_paths(PARAMS, ["vision_tower/*"]) == {
        "vision_tower/layers/q/kernel",
        "vision_tower/norm/scale",
    }
    assert frozen_paths(PARAMS, ["*/kernel"]) == {
        "vision_tower/layers/q/kernel",
        "projector/kernel",
        "head/kernel",
    }
    assert frozen_paths(PARAMS, []) == frozenset()


def test_a_glob_without_match_lists_the_top_level():
    with pytest.raises(ConfigError) as error:
        frozen_paths(PARAMS, ["vision_tower"])
    for words in ["'vision_tower'", "head, projector, vision_tower", "branch/*"]:
        assert words in str(error.value)


def test_nothing_left_to_train():
    with pytest.raises(ConfigError, match="nothing is left to train"):
        frozen_paths(PARAMS, ["*"])


def test_split_and_merge_are_inverse():
    trainable, held = split(PARAMS, frozen_paths(PARAMS, ["vision_tower/norm/*", "head/*"]))
    assert set(trainable) == {"vision_tower", "projector"} and set(held) == {"vision_tower", "head"}
    assert set(trainable["vision_tower"]) == {"layers"}
    whole = merge(trainable, held)
    assert jax.tree.structure(whole) == jax.tree.structure(PARAMS)
    assert all(a is b for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(PARAMS), strict=True))


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
def test_init_and_abstract_agree(tiny, dtype):
    mesh = make_mesh(fsdp=2, tensor=2)
    params = tiny.make_params(dtype)
    places = shardings(tiny.AXES, params, mesh)
    tx, _ = make_optimizer(1e-3, 10)
    frozen = ("embed/*",)
    state = init_state(params, tx, mesh=mesh, shardings=places, frozen=frozen, seed=7)
    shapes = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype), params)
    expected = abstract_state(shapes, tx, mesh=mesh, shardings=places, frozen=frozen)
    found = as_abstract(state)
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        assert a.sharding.is_equivalent_to(b.sharding, len(a.shape))
    np.testing.assert_array_equal(state["rng"], jax.random.key_data(jax.random.key(7)))
    paths = [str(path) for path, _ in jax.tree_util.tree_flatten_with_path(state["opt_state"])[0]]
    assert not any("embed" in path for path in paths) and any("head" in path for path in paths)


def test_trainable_is_copied_and_frozen_is_shared(tiny):
    mesh = make_mesh(devices=jax.devices()[:1])
    params = jax.tree.map(jnp.asarray, tiny.make_params())
    tx, _ = make_optimizer(1e-3, 10)
    state = init_state(params, tx, mesh=mesh, frozen=("head/*",))

    def pointer(x):
        return x.unsafe_buffer_pointer()

    ours, theirs = state["params"], params
    assert pointer(ours["head"]["kernel"]) == pointer(theirs["head"]["kernel"])
    assert pointer(ours["embed"]["weight"]) != pointer(theirs["embed"]["weight"])
