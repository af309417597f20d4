"""Reference log-probs kept in a file: found again for the same numbers, and for no others."""

import dataclasses

import jax
import numpy as np
import pytest

from aa_jax import models, recipes
from aa_jax.data.collate import collate, plan_shapes
from aa_jax.data.tokens import Encoded
from aa_jax.models import adapt
from aa_jax.sharding import make_mesh

CONFIG = {
    "architectures": ["LlamaForCausalLM"], "vocab_size": 20, "hidden_size": 8, "rope_theta": 1e4,
    "intermediate_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2,
}  # fmt: skip
PROMPT = np.arange(3, 11, dtype=np.int32)


def pair(**changes):
    responses = (np.array([4, 1], np.int32), np.array([9, 6, 1], np.int32))
    rest = dict(feature_index=np.full(8, -1, np.int32), trained=np.zeros(8, bool), images=0)
    return Encoded(PROMPT, responses, (True, True), media={}, **rest | changes)


def logps(model, params, item, cache=None):
    shapes = plan_shapes([item], "preference")

    def form(items, batch_rows, length=None):
        return collate(items, shapes, "preference", batch_rows=batch_rows)

    mesh = make_mesh(devices=jax.devices()[:1])
    return recipes.reference_logps(model, params, [item], form, 1, mesh, cache)


def test_the_same_parameters_in_another_model_are_another_reference(tmp_path, caplog):
    """Longer rotary wavelengths change every number, and no parameter."""
    cache, model = tmp_path / "reference.npz", models.build(CONFIG)
    params = jax.tree.map(lambda x: 20 * x, model.init(jax.random.key(0)))
    first = logps(model, params, pair(), cache)
    np.testing.assert_array_equal(logps(model, params, pair(), cache), first)
    assert not caplog.records
    other = models.build({**CONFIG, "rope_theta": 5.0})
    assert np.abs(logps(other, params, pair(), cache) - first).min() > 1e-3
    assert "belongs to another reference" in caplog.text


def axes(step):
    """M-RoPE positions of a film whose frames are so far apart."""
    return np.repeat(step * np.arange(8, dtype=np.int32)[:, None], 3, axis=1)


def film(step, at=0):
    """A pair whose prompt starts with one feature."""
    index = np.full(8, -1, np.int32)
    index[at] = 0
    media = {"tower_features": np.ones((1, 4), np.float32)}
    return dataclasses.replace(
        pair(positions=axes(step), next_position=7 * step + 1, feature_index=index), media=media
    )


def built(**options):
    return models.build(CONFIG, **options)


def adapted(alpha):
    return adapt.attach(built(), {}, rank=1, alpha=alpha, targets=["q_proj"])[0]


CHANGES = {
    "the compute type": lambda: (built(), pair(), built(dtype="bfloat16"), pair()),
    "an adapter's strength": lambda: (adapted(1.0), pair(), adapted(2.0), pair()),
    "the time between a film's frames": lambda: (built(), film(1), built(), film(2)),
    "where a feature stands": lambda: (built(), film(1), built(), film(1, at=1)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_all_that_decides_the_numbers_is_compared(change):
    model, item, other, another = CHANGES[change]()
    key = recipes._fingerprint(model, {}, [item])
    assert recipes._fingerprint(model, {}, [item]) == key
    assert recipes._fingerprint(other, {}, [another]) != key
