"""The rule table: parameters, optimizer state and activations placed by axis name."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from aa_jax.errors import ConfigError
from aa_jax.sharding import constrain, make_mesh, optimizer_shardings, replicated, shardings


def struct(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


ABSTRACT = {
    "embed": {"weight": struct(16, 8)},
    "layers": {"q": {"kernel": struct(2, 8, 4)}, "norm": {"scale": struct(2, 8)}},
    "projector": {"kernel": struct(12, 8)},
}
AXES = {
    "embed": {"weight": ("vocab", "embed")},
    "layers": {"q": {"kernel": ("layers", "embed", "heads")}, "norm": {"scale": ("layers", None)}},
    "projector": {"kernel": ("vision_embed", "embed")},
}


def test_names_become_mesh_axes():
    found = shardings(AXES, ABSTRACT, make_mesh(fsdp=2, tensor=2))
    specs = jax.tree.map(lambda s: s.spec, found)
    assert specs["embed"]["weight"] == P("tensor", "fsdp")
    assert specs["layers"]["q"]["kernel"] == P(None, "fsdp", "tensor")
    assert specs["layers"]["norm"]["scale"] == P(None, None)
    # both dimensions ask for fsdp; an array is cut by an axis once
    assert specs["projector"]["kernel"] == P("fsdp", None)
    for leaf, place in zip(jax.tree.leaves(ABSTRACT), jax.tree.leaves(found), strict=True):
        place.shard_shape(leaf.shape)  # raises if it does not divide


def test_a_dimension_that_does_not_divide_is_named_with_sizes_that_work():
    axes, arrays = {"head": {"kernel": ("embed", "vocab")}}, {"head": {"kernel": struct(8, 30)}}
    with pytest.raises(ConfigError) as error:
        shardings(axes, arrays, make_mesh(tensor=4))
    text = str(error.value)
    for words in [
        "head/kernel",
        "dimension 1",
        "'vocab'",
        "30",
        "tensor = 4",
        "3 or 5",
        "28 or 32",
    ]:
        assert words in text


@pytest.mark.parametrize(
    "axes, words",
    [
        ({"w": ("embed", "depth")}, ["w names the logical axis 'depth'", "vocab, embed"]),
        ({"w": ("embed",)}, ["w has shape (4, 6)", "one name, or None, per dimension"]),
        ({"v": ("embed", None)}, ["differ at v, w"]),
    ],
)
def test_wrong_axis_names(axes, words):
    with pytest.raises(ConfigError) as error:
        shardings(axes, {"w": struct(4, 6)}, make_mesh())
    for word in words:
        assert word in str(error.value)


def test_a_rule_to_an_unknown_mesh_axis():
    with pytest.raises(ConfigError, match="'model'; the mesh has data, fsdp"):
        shardings({"w": ("mlp",)}, {"w": struct(4)}, make_mesh(), {"mlp": "model"})


def test_optimizer_state_lies_where_its_parameters_lie():
    mesh = make_mesh(fsdp=2, tensor=2)
    places = shardings(AXES, ABSTRACT, mesh)
    tx = optax.chain(optax.adamw(1e-3), optax.trace(0.9))
    state = jax.eval_shape(tx.init, ABSTRACT)
    found = optimizer_shardings(state, ABSTRACT, places)
    adam = found[0][0]
    assert adam.count.spec == P()
    assert adam.mu == places and adam.nu == places and found[1].trace == places


def test_a_leaf_of_another_shape_is_replicated():
    mesh = make_mesh(fsdp=8)
    params = {"w": struct(256, 128)}
    places = {"w": NamedSharding(mesh, P("fsdp", None))}
    tx = optax.scale_by_factored_rms(min_dim_size_to_factor=64)
    found = optimizer_shardings(jax.eval_shape(tx.init, params), params, places)
    assert {s.spec for s in jax.tree.leaves(found)} == {P()}


def test_the_longest_path_wins():
    mesh = make_mesh(fsdp=8)
    params = {"bias": struct(8), "head": {"bias": struct(8)}}
    places = {
        "bias": NamedSharding(mesh, P("fsdp")),
        "head": {"bias": NamedSharding(mesh, P(None))},
    }
    found = optimizer_shardings({"mu": params}, params, places)
    assert found == {"mu": places}


def test_replicated():
    place = replicated({"w": struct(3)}, make_mesh())["w"]
    assert place.is_fully_replicated and place.mesh.size == 8


def test_constrain_pins_activations_inside_a_mesh_only():
    x = np.arange(48, dtype=np.float32).reshape(8, 2, 3)
    program = jax.jit(lambda x: constrain(x * 2, "batch", "seq", "act_embed"))
    np.testing.assert_array_equal(program(x), x * 2)
    mesh = make_mesh(data=2, fsdp=2, seq=2)
    with jax.set_mesh(mesh):
        out = program(x)
        assert out.sharding.is_equivalent_to(
            NamedSharding(mesh, P(("data", "fsdp"), "seq", None)), 3
        )
        np.testing.assert_array_equal(out, x * 2)
        # one row over four devices: left to the compiler
        np.testing.assert_array_equal(program(x[:1]), x[:1] * 2)
