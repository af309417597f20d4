"""One update: exact over micro-batches and devices, frozen parts untouched, bad steps skipped."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from aa_jax.errors import ConfigError, DataError
from aa_jax.losses.base import Ratio
from aa_jax.sharding import make_mesh, pad_rows, put_batch, shardings
from aa_jax.training.optim import make_optimizer
from aa_jax.training.state import abstract_state, init_state
from aa_jax.training.step import make_step


def sgd(lr):
    return optax.sgd(lr)


def one_device():
    return make_mesh(devices=jax.devices()[:1])


def mean(metric):
    return sum(float(t.total) / float(t.count) for t in _terms(metric))


def _terms(metric):
    return [metric] if isinstance(metric, Ratio) else metric


# ------------------------------------------------------------------ accumulation


def regression(params, batch):
    """sum m (x w - y)^2 / sum m  +  sum_rows r |w|^2-free row term / sum r, two denominators."""
    residual = jnp.einsum("btd,d->bt", batch["x"], params["w"]) - batch["y"]
    mask, rows = batch["mask"], batch["rows"]
    per_row = jnp.sum(residual * mask, axis=1)
    terms = (
        Ratio(jnp.sum(jnp.square(residual) * mask), jnp.sum(mask)),
        Ratio(jnp.sum(jnp.square(per_row) * rows), jnp.sum(rows)),
    )
    return terms[0].mean + terms[1].mean, {"loss": terms}


def regression_batch():
    rng = np.random.default_rng(1)
    lengths = np.array([1, 1, 9, 2, 9, 9, 1, 0])
    return {
        "x": rng.normal(size=(8, 9, 4)).astype(np.float32),
        "y": rng.normal(size=(8, 9)).astype(np.float32),
        "mask": (np.arange(9)[None] < lengths[:, None]).astype(np.float32),
        "rows": (lengths > 0).astype(np.float32),
    }


@pytest.mark.parametrize("accumulation", [1, 2, 4, 8])
def test_update_is_the_closed_form_whatever_the_micro_batches(accumulation):
    batch, w, lr = regression_batch(), np.arange(1.0, 5.0, dtype=np.float32) / 4, 0.1
    x, y, m, r = (batch[k].astype(np.float64) for k in ("x", "y", "mask", "rows"))
    residual = x @ w - y
    per_row = (residual * m).sum(1)
    gradient = 2 * np.einsum("bt,btd->d", residual * m, x) / m.sum()
    gradient += 2 * np.einsum("b,bt,btd->d", per_row * r, m, x) / r.sum()
    loss = (residual**2 * m).sum() / m.sum() + (per_row**2 * r).sum() / r.sum()

    step = make_step(regression, sgd(lr), mesh=one_device(), accumulation=accumulation)
    state = init_state({"w": w}, sgd(lr), mesh=one_device())
    state, metrics = step(state, batch)
    np.testing.assert_allclose(state["params"]["w"], w - lr * gradient, atol=1e-6)
    assert mean(metrics["loss"]) == pytest.approx(loss, rel=1e-6)
    assert [float(t.count) for t in metrics["loss"]] == [m.sum(), r.sum()]
    assert float(metrics["grad_norm"].total) == pytest.approx(np.linalg.norm(gradient), rel=1e-6)
    assert float(metrics["loss_gap"].total) < 1e-6
    # The usual mean of means is far from it, so the test can tell.
    halves = [slice(0, 4), slice(4, 8)]
    means = np.mean([(residual[h] ** 2 * m[h]).sum() / m[h].sum() for h in halves])
    assert abs(means - (residual**2 * m).sum() / m.sum()) > 0.02


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
def test_accumulation_in_a_model(tiny, dtype):
    finals = []
    for accumulation in (1, 4):
        step, state = tiny.setup(
            tiny.two_terms, accumulation=accumulation, params=tiny.make_params(dtype)
        )
        for i in range(2):
            state, metrics = step(state, tiny.make_batch(i, empty=3))
        finals.append(state["params"])
        assert float(metrics["rows"].total) == 5.0
    # In bfloat16 the micro-batches' gradients are rounded before they are added.
    assert tiny.worst(*finals) < (1e-6 if dtype == np.float32 else 2e-2)
    assert finals[0]["head"]["kernel"].dtype == dtype


def test_counting_pass_does_not_run_the_model():
    """The model's tanh is compiled as often with the counting pass as without."""

    def objective(params, batch):
        values = jnp.tanh(batch["x"] * params["w"])
        term = Ratio(jnp.sum(values * batch["mask"]), jnp.sum(batch["mask"]))
        return term.mean, {"loss": term}

    batch = {"x": np.ones((8, 3), np.float32), "mask": np.ones((8, 3), np.float32)}
    found = []
    for accumulation in (1, 4):
        step = make_step(objective, sgd(0.1), mesh=one_device(), accumulation=accumulation)
        state = init_state({"w": np.float32(1)}, sgd(0.1), mesh=one_device())
        found.append(len(re.findall(r" tanh\(", step.lower(state, batch).compile().as_text())))
    assert found[0] == found[1] > 0


def test_consecutive_rows_stay_together():
    """A preference pair may be two rows: rows 2i and 2i + 1 must meet in one micro-batch."""

    def pairs(params, batch):
        first, second = batch["id"].reshape(-1, 2).T
        term = Ratio(params["w"] * jnp.sum(jnp.abs(second - first)), jnp.float32(len(first)))
        return term.mean, {"loss": term}

    batch = {"id": np.arange(16, dtype=np.float32)}
    for mesh, accumulation in [(one_device(), 4), (make_mesh(data=4, fsdp=2), 2)]:
        step = make_step(pairs, sgd(0.1), mesh=mesh, accumulation=accumulation)
        _, metrics = step(init_state({"w": np.float32(1)}, sgd(0.1), mesh=mesh), batch)
        assert float(metrics["loss"].total) == 8.0  # every pair differs by 1


def test_plain_loss_only_without_accumulation():
    def plain(params, batch):
        return jnp.mean(batch["x"] * params["w"]), {"accuracy": jnp.float32(0.5)}

    batch = {"x": np.full((4,), 3.0, np.float32)}
    state = init_state({"w": np.float32(2)}, sgd(0.1), mesh=one_device())
    with pytest.raises(ConfigError, match=r"Ratio\(total, count\).*accumulation=1"):
        make_step(plain, sgd(0.1), mesh=one_device(), accumulation=2)(state, batch)
    state, metrics = make_step(plain, sgd(0.1), mesh=one_device())(state, batch)
    assert mean(metrics["accuracy"]) == 0.5 and mean(metrics["loss"]) == 6.0
    assert float(state["params"]["w"]) == pytest.approx(2 - 0.1 * 3)


# ------------------------------------------------------------------ devices


def train_three_steps(tiny, mesh, accumulation):
    step, state = tiny.setup(tiny.two_terms, mesh=mesh, accumulation=accumulation)
    before = jax.tree.map(lambda x: x.sharding, state)
    for i in range(3):
        # 13 rows: padded to what the devices need
        batch = pad_rows(tiny.make_batch(i, n=13), step.rows_multiple)
        batch = put_batch(batch, step.mesh)
        with jax.transfer_guard("disallow"):
            state, metrics = step(state, batch)
    assert jax.tree.map(lambda x: x.sharding, state) == before
    return tiny.host(state["params"]), mean(metrics["loss"])


@pytest.fixture(scope="module")
def on_one_device(tiny):
    return train_three_steps(tiny, one_device(), 1)


@pytest.mark.parametrize(
    "sizes, accumulation",
    [
        ({"data": 8}, 1),
        ({"data": 2, "fsdp": 2, "tensor": 2}, 1),
        ({"data": 1, "fsdp": 4, "tensor": 2}, 2),
    ],
)
def test_one_device_and_eight_agree(tiny, on_one_device, sizes, accumulation):
    params, loss = train_three_steps(tiny, make_mesh(**sizes), accumulation)
    assert tiny.worst(params, on_one_device[0]) < 1e-6
    assert loss == pytest.approx(on_one_device[1], rel=1e-6)


def test_rows_must_divide(tiny):
    step, state = tiny.setup(mesh=make_mesh(data=4, tensor=2), accumulation=2)
    assert step.rows_multiple == 8
    with pytest.raises(DataError, match="12 rows.*2 micro-batches over 4 devices.*multiple of 8"):
        step(state, tiny.make_batch(0, n=12))


# ------------------------------------------------------------------ frozen parts and roles


def test_frozen_parameters_do_not_move_and_have_no_state(tiny):
    params = jax.tree.map(jnp.asarray, tiny.make_params())
    start = tiny.host(params)
    frozen = ("embed/*", "layers/down/*")
    step, state = tiny.setup(tiny.two_terms, params=params, frozen=frozen)
    for i in range(3):
        # the very parameters training started from serve as the reference
        state, _ = step(state, tiny.make_batch(i), reference=params)
    tiny.assert_same(state["params"]["embed"], start["embed"])
    tiny.assert_same(state["params"]["layers"]["down"], start["layers"]["down"])
    tiny.assert_same(params, start)
    assert tiny.worst(state["params"]["head"], start["head"]) > 1e-3
    assert tiny.worst(state["params"]["layers"]["up"], start["layers"]["up"]) > 1e-3
    trained = sum(x.size for x in jax.tree.leaves(start))
    trained -= start["embed"]["weight"].size + start["layers"]["down"]["kernel"].size
    moments = [x.size for x in jax.tree.leaves(state["opt_state"]) if x.ndim]
    assert sum(moments) == 2 * trained


def test_the_state_is_donated_but_not_its_frozen_part():
    def product(params, batch):
        return jnp.mean(batch["x"]) * jnp.sum(params["a"]["w"] * params["b"]["w"]), {}

    params = {"a": {"w": np.ones(3, np.float32)}, "b": {"w": np.ones(3, np.float32)}}
    tx = optax.adam(0.1)
    state = init_state(params, tx, mesh=one_device(), frozen=("b/*",))
    step = make_step(product, tx, mesh=one_device(), frozen=("b/*",))
    new, _ = step(state, {"x": np.ones(2, np.float32)})
    assert state["params"]["a"]["w"].is_deleted()
    assert all(x.is_deleted() for x in jax.tree.leaves(state["opt_state"]) if x.ndim)
    assert new["params"]["b"]["w"] is state["params"]["b"]["w"]


def test_state_made_for_other_globs(tiny):
    _, state = tiny.setup(frozen=("embed/*",))
    step, _ = tiny.setup()
    with pytest.raises(ConfigError, match="same ones"):
        step(state, tiny.make_batch(0))


def test_frozen_glob_errors_reach_the_user(tiny):
    with pytest.raises(ConfigError, match="'vision/.*embed, head, layers"):
        tiny.setup(frozen=("vision/*",))


# ------------------------------------------------------------------ numbers reported, bad steps


def scalar_setup():
    """Minimises the mean of x * w."""
    mesh = one_device()
    tx, schedule = make_optimizer(1e-2, 30, warmup_steps=2)

    def objective(params, batch):
        term = Ratio(jnp.sum(batch["x"] * params["w"]), jnp.float32(batch["x"].size))
        return term.mean, {"loss": term}

    step = make_step(objective, tx, mesh=mesh, schedule=schedule)
    return step, init_state({"w": np.float32(1)}, tx, mesh=mesh)


def test_learning_rate_and_step_count():
    step, state = scalar_setup()
    rates = []
    for _ in range(4):
        state, metrics = step(state, {"x": np.ones(2, np.float32)})
        rates.append(float(metrics["lr"].total))
    assert int(state["step"]) == 4
    # warm-up of 2, then cosine over 28: 0, 0.005, 0.01, 0.01 * (1 + cos(pi / 28)) / 2
    np.testing.assert_allclose(rates, [0.0, 0.005, 0.01, 0.00996857], rtol=1e-5)


@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_a_step_that_is_not_finite_changes_nothing(tiny, poison):
    step, state = scalar_setup()
    clean = {"x": np.ones(2, np.float32)}
    state, metrics = step(state, clean)
    assert mean(metrics["skipped"]) == 0.0
    before = tiny.host(state)
    state, metrics = step(state, {"x": np.array([1.0, poison], np.float32)})
    assert mean(metrics["skipped"]) == 1.0
    tiny.assert_same(state["params"], before["params"])
    tiny.assert_same(state["opt_state"], before["opt_state"])
    assert int(state["step"]) == 2
    state, metrics = step(state, clean)
    # the schedule did not move either: this is the second update
    assert float(metrics["lr"].total) == pytest.approx(0.005)


def test_random_objectives_get_a_key_per_step_and_micro_batch():
    def noisy(params, batch, rng):
        noise = jax.random.normal(rng)
        term = Ratio(params["w"] * noise, jnp.float32(1.0))
        return term.mean, {"loss": term, "square": Ratio(noise**2, jnp.float32(1.0))}

    def draws(seed):
        mesh = one_device()
        step = make_step(noisy, sgd(0.0), mesh=mesh, accumulation=2)
        state = init_state({"w": np.float32(1)}, sgd(0.0), mesh=mesh, seed=seed)
        out = []
        for _ in range(2):
            state, metrics = step(state, {"x": np.zeros((2, 1), np.float32)})
            out.append((float(metrics["loss"].total), float(metrics["square"].total)))
        return out

    first = draws(0)
    assert first == draws(0) and first != draws(1) and first[0] != first[1]
    total, square = first[0]
    assert total**2 != pytest.approx(2 * square)  # the two micro-batches' draws differ


def test_lowers_from_shapes_alone():
    mesh = make_mesh(fsdp=2, tensor=2)
    shapes = {"w": jax.ShapeDtypeStruct((8, 4), jnp.float32)}
    places = shardings({"w": ("embed", "mlp")}, shapes, mesh)
    state = abstract_state(shapes, sgd(0.1), mesh=mesh, shardings=places)
    step = make_step(
        lambda params, batch: (jnp.mean(batch["x"] @ params["w"]), {}), sgd(0.1), mesh=mesh
    )
    batch = {"x": jax.ShapeDtypeStruct((8, 8), jnp.float32)}
    memory = step.lower(state, batch).compile().memory_analysis()
    # a quarter of w, two rows of x, the step number and the key
    assert memory.argument_size_in_bytes == 8 * 4 * 4 // 4 + 2 * 8 * 4 + 4 + 8


def test_accumulation_must_be_positive(tiny):
    with pytest.raises(ConfigError, match="at least 1, got 0"):
        tiny.setup(accumulation=0)


def test_without_a_copy_training_takes_the_callers_arrays():
    """The default leaves them alone; a frozen part is shared either way."""
    mesh, tx = one_device(), sgd(0.1)
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())

    def squared(params, batch):
        error = batch["x"] @ (params["w"] + params["v"])
        loss = Ratio(jnp.sum(error**2), jnp.float32(len(error)))
        return loss.mean, {"loss": loss}

    for copy in (True, False):
        params = jax.device_put({"w": np.ones(3, np.float32), "v": np.ones(3, np.float32)}, place)
        state = init_state(params, tx, mesh=mesh, frozen=("v",), copy=copy)
        step = make_step(squared, tx, mesh=mesh, frozen=("v",))
        state, _ = step(state, {"x": np.ones((2, 3), np.float32)})
        assert params["w"].is_deleted() is not copy and not params["v"].is_deleted()
