"""Batches of similar lengths: nothing lost, less padding, the same loss."""

import itertools

import jax
import numpy as np
import pytest

from aa_jax import models, recipes
from aa_jax.data import digits
from aa_jax.data.buckets import bucket_lengths
from aa_jax.data.encoded import EncodedExamples
from aa_jax.data.loader import Loader
from aa_jax.data.processor import Processor
from aa_jax.errors import ConfigError, DataError
from aa_jax.llf.start import llava_config
from aa_jax.sharding import make_mesh
from aa_jax.training.metrics import read_metrics, series

LENGTHS = np.random.default_rng(0).integers(5, 200, size=203).tolist()


def form(items, batch_rows, length=None):
    return {"rows": np.array([*items, *[-1] * (batch_rows - len(items))]), "length": length}


def loader(**changes):
    settings = dict(epochs=2, seed=3, lengths=LENGTHS, buckets=bucket_lengths(LENGTHS, 4))
    return Loader(range(203), form, 4, **{**settings, **changes})


def test_every_example_once_an_epoch_in_the_shortest_bucket_that_holds_it():
    made = list(loader())
    edges = bucket_lengths(LENGTHS, 4)
    assert len(made) == 2 * 51 and len(edges) == 4
    epochs = made[:51], made[51:]
    orders = []
    for epoch in epochs:
        rows = [r for batch in epoch for r in batch["rows"] if r >= 0]
        assert sorted(rows) == list(range(203))
        orders.append(rows)
        for batch in epoch:
            longest = max(LENGTHS[r] for r in batch["rows"] if r >= 0)
            assert batch["length"] == min(edge for edge in edges if edge >= longest)
    assert orders[0] != orders[1]
    padded = sum(4 * batch["length"] for batch in made) / (2 * sum(LENGTHS))
    plain = 4 * 51 * edges[-1] / sum(LENGTHS)
    assert padded < 1.3 < 1.8 < plain
    # The batches are not in the order of their lengths.
    assert np.abs(np.corrcoef(np.arange(51), [b["length"] for b in epochs[0]])[0, 1]) < 0.5


def test_a_resumed_run_sees_the_same_batches():
    whole = [batch["rows"].tolist() for batch in loader()]
    batches = iter(loader())
    for _ in range(60):
        next(batches)
    state = batches.get_state()
    again = iter(loader())
    again.set_state(state)
    assert [batch["rows"].tolist() for batch in again] == whole[60:]
    with pytest.raises(DataError, match="belongs to another run: by_length"):
        iter(Loader(range(203), form, 4, seed=3, lengths=LENGTHS)).set_state(
            {k: v for k, v in state.items() if k != "by_length"}
        )


def test_edges_are_quantiles():
    assert bucket_lengths([8, 8, 8, 8], 4) == (8,)
    assert bucket_lengths(range(1, 101), 4) == (32, 56, 80, 104)
    assert bucket_lengths([5], 3, multiple_of=1) == (5,)


def test_mistakes_are_named():
    with pytest.raises(DataError, match="2 lengths for 203 rows"):
        loader(lengths=[1, 2])
    with pytest.raises(DataError, match="the longest bucket, 16 tokens"):
        loader(buckets=(8, 16))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Figures of one epoch at a learning rate of nothing, by number of buckets."""
    folder = tmp_path_factory.mktemp("buckets")
    digits.write_processor(folder, max_digits=3)
    processor = Processor.from_pretrained(folder)
    model = models.build(llava_config(3, vision_dim=16, vision_layers=2, vision_heads=2, dim=16,
                                      layers=1, heads=2, kv_heads=2, mlp_dim=24))  # fmt: skip
    params = jax.jit(model.init)(jax.random.key(0))
    rng = np.random.default_rng(0)
    examples = []
    for example in itertools.islice(digits.evaluation_prompts(64, 0, "train"), 30):
        texts = {digits.sample_response(example.task, rng).text for _ in range(20)}
        examples.append(example.to_data_example(tuple(sorted(texts)[:2])))
    examples = [e for e in examples if len(e.responses) == 2][:20]

    def train(buckets, **changes):
        workdir = folder / f"run_{buckets}_{len(changes)}"
        recipes.train(
            "dpo", model=model, params=params, processor=processor,
            examples=EncodedExamples(examples, processor), workdir=workdir,
            mesh=make_mesh(devices=jax.devices()[:1]), batch_rows=5, log_every=1,
            optim=dict(lr=1e-30, schedule="constant", warmup_steps=0), buckets=buckets,
            objective={"variant": "simpo"}, **changes,
        )  # fmt: skip
        rows = read_metrics(workdir, stage="train")
        return np.mean(series(rows, "loss")[1])

    return train


@pytest.mark.slow
def test_the_loss_is_that_without_buckets(trained):
    assert trained(2) == pytest.approx(trained(1), rel=1e-6)


def test_buckets_and_packing_exclude_each_other(trained):
    with pytest.raises(ConfigError, match="buckets is 1 or more"):
        trained(0)
