"""The functional boundary: plain trees, one structure everywhere, initial scales, remat."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from flax import nnx

from aa_jax import models
from aa_jax.errors import ModelError
from aa_jax.models.functional import functional
from aa_jax.models.names import Names, Rule, flatten

AXES = {
    *("vocab", "embed", "mlp", "heads", "kv_heads", "layers", "patch"),
    *("vision_embed", "vision_mlp", "vision_heads", None),
}


@pytest.mark.parametrize("family", ["llama", "llava"])
def test_trees_agree(family, world):
    """init, abstract and axes: the same plain nested dict with string keys."""
    config = getattr(world, family + "_config")()
    model = models.build(config, param_dtype="bfloat16")
    params = jax.jit(model.init)(jax.random.key(0))
    abstract, axes = flatten(model.abstract()), flatten(model.axes())
    assert flatten(params).keys() == abstract.keys() == axes.keys()
    for path, leaf in flatten(params).items():
        assert isinstance(leaf, jax.Array) and leaf.dtype == jnp.bfloat16
        assert (leaf.shape, leaf.dtype) == (abstract[path].shape, abstract[path].dtype)
        assert len(axes[path]) == leaf.ndim and set(axes[path]) <= AXES
        assert ("layers/" in path) == (axes[path][0] == "layers")
    keys = jax.tree_util.tree_leaves_with_path(params)
    assert all(isinstance(part.key, str) for path, _ in keys for part in path)
    roots = {"llama": {"embed", "layers", "norm", "head"}}
    roots["llava"] = {"vision_tower", "projector", "language_model"}
    assert params.keys() == roots[family]
    decoder = params if family == "llama" else params["language_model"]
    assert decoder.keys() == roots["llama"]


def test_tied_head_is_the_embedding(world):
    model = models.build(world.llama_config(tie_word_embeddings=True))
    params = model.init(jax.random.key(0))
    assert "head" not in params
    np.testing.assert_array_equal(model.head(params), params["embed"]["weight"])


def test_initial_scales_are_transformers(world):
    """Standard deviation of every tensor of a wide model, within sampling error (4 sigma)."""
    config = world.llava_config(
        text=dict(hidden_size=64, intermediate_size=96, initializer_range=0.05, mlp_bias=True),
        vision=dict(hidden_size=48, intermediate_size=64, image_size=12, initializer_factor=2.0),
    )
    make_config, make = world.CLASSES["LlavaForConditionalGeneration"]
    kwargs = {k: v for k, v in config.items() if k not in ("architectures", "model_type")}
    transformers.set_seed(0)
    reference = make(make_config(**kwargs))
    model = models.build(config)
    ours = world.hf_named(model, model.init(jax.random.key(0)))
    for name, theirs in reference.state_dict().items():
        mine, theirs = ours[model.names.canonical(name)], theirs.numpy()
        assert mine.shape == theirs.shape
        if theirs.std() == 0:  # norms and biases
            np.testing.assert_array_equal(mine, theirs, err_msg=name)
        else:
            # torch's randn for the class embedding ignores the scale until _init_weights runs
            tolerance = 4 * np.sqrt(1 / mine.size)
            assert abs(mine.std() / theirs.std() - 1) < tolerance, name
            assert abs(mine.mean()) < tolerance * mine.std(), name


def test_remat_changes_no_gradient(world):
    config = world.llama_config()
    batch = world.text_batch([7], 8)
    drawn = jax.jit(models.build(config).init)(jax.random.key(0))
    params = jax.tree.map(lambda x: 5 * x, drawn)

    def gradient(remat):
        model = models.build(config, remat=remat)
        return jax.jit(jax.grad(lambda p: jnp.sum(model.hidden_states(p, batch)[..., 0])))(params)

    plain = flatten(gradient("none"))
    for remat in ("full", "dots"):
        again = flatten(gradient(remat))
        for path, leaf in plain.items():
            scale = max(float(jnp.abs(leaf).max()), 1e-3)
            np.testing.assert_allclose(again[path], leaf, atol=1e-5 * scale, err_msg=path)


def test_only_parameters_are_allowed(world):
    """A module that holds any other state is refused when the model is built."""

    class Counting(nnx.Module):
        def __init__(self, config, *, rngs, dtype, param_dtype, remat):
            self.weight = nnx.Param(jnp.zeros(2))
            self.count = nnx.Variable(jnp.zeros(()))

    kwargs = dict(hf_config={}, dtype="float32", param_dtype="float32", remat="none")
    with pytest.raises(ValueError, match="[Nn]on-exhaustive"):
        functional(Counting, family="x", config=None, names=Names(()), **kwargs)


def test_a_leaf_without_a_rule_is_named(world):
    model = models.build(world.llama_config())
    leaves = flatten(model.abstract())
    rules = tuple(rule for rule in model.names.rules if rule.path != "norm/scale")
    with pytest.raises(ModelError, match=r"no row for \['norm/scale'\]"):
        Names(rules).for_leaves(leaves)
    flat = Rule("norm", "norm/scale", None, ())
    with pytest.raises(ModelError, match=r"wrong axis count for \['norm/scale'\]"):
        Names((*rules, flat)).for_leaves(leaves)


def test_sharded_on_eight_devices(world):
    """Batch over data, weights over tensor: the same hidden states as on one device."""
    config = world.llava_config()
    model = models.build(config)
    params = jax.tree.map(lambda x: 5 * x, model.init(jax.random.key(0)))
    batch = world.image_batch(config, [12, 10, 9, 12], 12, [1, 1, 1, 1])
    expected = jax.jit(model.hidden_states)(params, batch)
    auto = (jax.sharding.AxisType.Auto,) * 2
    mesh = jax.make_mesh((4, 2), ("data", "tensor"), axis_types=auto)
    spread = {"heads": "tensor", "kv_heads": "tensor", "mlp": "tensor", "vocab": "tensor"}

    def place(axes):
        spec = jax.sharding.PartitionSpec(*(spread.get(axis) for axis in axes))
        return jax.sharding.NamedSharding(mesh, spec)

    layout = jax.tree.map(place, model.axes(), is_leaf=lambda x: isinstance(x, tuple))
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    got = jax.jit(model.hidden_states)(jax.device_put(params, layout), jax.device_put(batch, rows))
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)  # values reach 10
