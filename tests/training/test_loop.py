"""The one loop: what it writes, how it stops, and that stopping changes nothing."""

import json
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aa_jax.errors import AaJaxError, CheckpointError, ConfigError, DataError
from aa_jax.losses.base import Ratio
from aa_jax.sharding import make_mesh
from aa_jax.training.loop import count_tokens, fit
from aa_jax.training.metrics import MetricWriter, read_metrics
from aa_jax.training.optim import make_optimizer
from aa_jax.training.state import init_state
from aa_jax.training.step import make_step


class Batches:
    """Numbered batches of one column x, kept in memory."""

    def __init__(self, *columns, each=lambda position: None):
        self._columns, self._each, self.position = columns, each, 0

    def __next__(self):
        if self.position == len(self._columns):
            raise StopIteration
        x = np.asarray(self._columns[self.position], np.float32)
        self.position += 1
        self._each(self.position)
        return {"x": x, "sequence_mask": np.ones((len(x), 1), np.float32)}

    def get_state(self):
        return {"position": self.position}

    def set_state(self, state):
        self.position = state["position"]


def objective(params, batch):
    """Mean over real rows of (w - x)^2 / 2."""
    mask = batch["sequence_mask"][:, 0]
    term = Ratio(jnp.sum(jnp.square(params["w"] - batch["x"]) / 2 * mask), jnp.sum(mask))
    return term.mean, {"loss": term}


def build(objective=objective, mesh=None, lr=0.5):
    mesh = mesh or make_mesh(devices=jax.devices()[:1])
    tx, schedule = make_optimizer(
        lr, 100, name="sgd", schedule="constant", warmup_steps=0, clip_norm=None
    )
    step = make_step(objective, tx, mesh=mesh, schedule=schedule)
    return {"step": step, "state": init_state({"w": np.float32(0)}, tx, mesh=mesh)}


def run(workdir, batches, total=4, *, parts=None, stage="sft", **options):
    with MetricWriter(workdir, stage, tensorboard=False) as writer:
        return fit(
            **(parts or build()),
            batches=batches,
            total_steps=total,
            workdir=workdir,
            stage=stage,
            writer=writer,
            **options,
        )


def columns(n, rows=4):
    return [np.full(rows, i, np.float32) for i in range(1, n + 1)]


def position_after(targets, lr=0.5):
    """Gradient descent on (w - x)^2 / 2: w moves a share `lr` of the way."""
    w = 0.0
    for x in targets:
        w += lr * (x - w)
    return w


# ------------------------------------------------------------------ the plain run


def test_trains_writes_and_returns_at_once_when_called_again(tmp_path):
    state = run(tmp_path, Batches(*columns(4)), config={"lr": 0.5})
    assert float(state["params"]["w"]) == pytest.approx(position_after([1, 2, 3, 4]))
    lines = read_metrics(tmp_path, "sft")
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    w = [position_after(range(1, i)) for i in range(1, 5)]
    expected = [(i - w[i - 1]) ** 2 / 2 for i in range(1, 5)]
    assert [line["loss"] for line in lines] == pytest.approx(expected)
    assert {"lr", "grad_norm", "skipped", "step_seconds", "data_seconds", "compute_seconds"} <= set(
        lines[0]
    )
    untouched = Batches(*columns(4))
    again = run(tmp_path, untouched, config={"lr": 0.5})
    assert untouched.position == 0
    assert float(again["params"]["w"]) == float(state["params"]["w"])
    assert len(read_metrics(tmp_path, "sft")) == 4


def test_last_partial_batch_and_end_of_data(tmp_path, caplog):
    """13 rows in batches of 8 on 8 devices; the run ends with the data and stays ended."""
    parts = build(mesh=make_mesh())
    rows = np.arange(13, dtype=np.float32)
    with caplog.at_level(logging.INFO, "aa_jax"):
        state = run(tmp_path, Batches(rows[:8], rows[8:]), total=9, parts=parts)
    w = position_after([rows[:8].mean(), rows[8:].mean()])
    assert float(state["params"]["w"]) == pytest.approx(w)
    assert any("data ended after 2 steps" in r.getMessage() for r in caplog.records)
    assert len(read_metrics(tmp_path)) == 2
    again = run(tmp_path, Batches(), total=9, parts=build(mesh=make_mesh()))
    assert float(again["params"]["w"]) == float(state["params"]["w"]) and int(again["step"]) == 2


def test_sums_over_log_every_survive_a_restart(tmp_path):
    sizes = [4, 1, 3, 2, 4, 1]
    data = [np.full(n, i, np.float32) for i, n in enumerate(sizes)]

    def interrupt(position):
        if position == 4:  # in the middle of the second interval
            os.kill(os.getpid(), signal.SIGTERM)

    run(tmp_path / "whole", Batches(*data), total=6, log_every=3)
    with pytest.raises(SystemExit):
        run(tmp_path / "broken", Batches(*data, each=interrupt), total=6, log_every=3)
    run(tmp_path / "broken", Batches(*data), total=6, log_every=3)
    whole, broken = read_metrics(tmp_path / "whole"), read_metrics(tmp_path / "broken")
    assert [line["step"] for line in whole] == [line["step"] for line in broken] == [3, 6]
    assert [line["loss"] for line in whole] == [line["loss"] for line in broken]
    # total over count of the three steps, not a mean of means
    w = [position_after(range(i)) for i in range(6)]
    total = sum(sizes[i] * (i - w[i]) ** 2 / 2 for i in (3, 4, 5))
    assert whole[1]["loss"] == pytest.approx(total / 7)


def test_evaluations_and_the_best_checkpoint(tmp_path):
    def evaluate(state, step):
        return {"distance": abs(float(state["params"]["w"]) - 2.0)}

    options = {
        "evaluate": evaluate,
        "eval_every": 2,
        "checkpoint_every": 2,
        "keep_last": 1,
        "keep_best": "distance",
    }
    run(tmp_path, Batches(*columns(7)), total=7, **options)
    lines = [line for line in read_metrics(tmp_path) if "eval/distance" in line]
    assert [line["step"] for line in lines] == [2, 4, 6, 7]
    assert lines[0]["eval/distance"] == pytest.approx(2 - position_after([1, 2]))
    # w is 1.25 after step 2 and 3.06 after step 4: step 2 is the best, 7 the last
    kept = sorted(p.name for p in (tmp_path / "checkpoints/sft").iterdir() if p.is_dir())
    assert kept == ["2", "7"]
    run(tmp_path, Batches(*columns(7)), total=7, **options)
    assert len([line for line in read_metrics(tmp_path) if "eval/distance" in line]) == 4


def test_on_policy_batches_get_the_current_parameters(tmp_path):
    class OnPolicy(Batches):
        seen = []

        def set_params(self, params):
            self.seen.append(float(params["w"]))

    run(tmp_path, OnPolicy(*columns(3)), total=3)
    assert OnPolicy.seen == pytest.approx([0.0, 0.5, 1.25])


def test_stages_share_a_run_directory(tmp_path):
    run(tmp_path, Batches(*columns(2)), total=2, stage="sft")
    run(tmp_path, Batches(*columns(3)), total=3, stage="dpo")
    assert [line["stage"] for line in read_metrics(tmp_path)] == ["sft"] * 2 + ["dpo"] * 3


def test_tokens_are_those_that_see_themselves():
    intervals = np.zeros((2, 4, 4), np.int32)
    intervals[0, :3, 3] = [1, 2, 3]
    assert count_tokens({"tokens": np.zeros((2, 4)), "intervals": intervals}) == 3
    assert count_tokens({"tokens": np.zeros((2, 4))}) == 8
    assert count_tokens({"x": np.zeros(3)}) == 0


# ------------------------------------------------------------------ stopping and going on


@pytest.mark.parametrize(
    "number, kind, code", [("SIGTERM", SystemExit, 143), ("SIGINT", KeyboardInterrupt, None)]
)
def test_a_signal_saves_and_ends_and_the_next_call_goes_on(tmp_path, number, kind, code):
    def interrupt(position):
        if position == 3:
            os.kill(os.getpid(), getattr(signal, number))

    before = signal.getsignal(getattr(signal, number))
    with pytest.raises(kind) as stopped:
        run(tmp_path, Batches(*columns(6), each=interrupt), total=6)
    assert getattr(stopped.value, "code", None) == code
    assert signal.getsignal(getattr(signal, number)) == before
    assert (tmp_path / "checkpoints/sft/3").is_dir()
    rest = Batches(*columns(6))
    state = run(tmp_path, rest, total=6)
    assert rest.position == 6
    assert float(state["params"]["w"]) == pytest.approx(position_after(range(1, 7)))
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 3, 4, 5, 6]


def test_lines_after_the_checkpoint_are_written_once(tmp_path):
    def crash(position):
        if position == 6:
            raise RuntimeError("power cut")

    with pytest.raises(RuntimeError):
        run(tmp_path, Batches(*columns(8), each=crash), total=8, checkpoint_every=3)
    assert [line["step"] for line in read_metrics(tmp_path)][-1] > 3
    run(tmp_path, Batches(*columns(8)), total=8, checkpoint_every=3)
    assert [line["step"] for line in read_metrics(tmp_path)] == list(range(1, 9))


def test_another_configuration_is_refused(tmp_path):
    mesh = make_mesh(devices=jax.devices()[:1])
    run(tmp_path, Batches(*columns(2)), total=2, config={"lr": 0.5, "log": 1})
    other = build() | {"state": init_state({"w": np.ones(3)}, build()["step"]._tx, mesh=mesh)}
    with pytest.raises(CheckpointError, match="lr: 0.5 -> 0.1"):
        # the key that differs is the cause, and named before the shapes that follow from it
        run(tmp_path, Batches(*columns(2)), total=2, config={"lr": 0.1, "log": 1}, parts=other)
    with pytest.raises(CheckpointError, match="another model.*params/w"):
        other["state"] = init_state({"w": np.ones(3)}, other["step"]._tx, mesh=mesh)
        run(tmp_path, Batches(*columns(2)), total=2, config={"lr": 0.5, "log": 1}, parts=other)
    options = {"config": {"lr": 0.5, "log": 2}, "may_differ": ["log"]}
    assert int(run(tmp_path, Batches(*columns(3)), total=3, **options)["step"]) == 3


def test_reference_survives_resuming(tmp_path):
    """Resuming frees the fresh state before reading the old one, but not what roles share;
    a role on the host is put on the devices once."""
    mesh = make_mesh(devices=jax.devices()[:1])
    params = {"a": jnp.ones(3), "tower": {"b": jnp.full(3, 2.0)}}
    tx, _ = make_optimizer(0.1, 10, name="sgd", warmup_steps=0)

    def with_reference(params, batch, reference, scale):
        values = params["a"] * params["tower"]["b"] + reference["tower"]["b"]
        return jnp.mean(batch["x"]) * jnp.sum(values * scale["s"]), {}

    roles = {"reference": params, "scale": {"s": np.ones(3, np.float32)}}
    for total in (2, 4):
        state = init_state(params, tx, mesh=mesh, frozen=["tower/*"])
        step = make_step(with_reference, tx, mesh=mesh, frozen=["tower/*"])
        parts = {"step": step, "state": state, "roles": roles}
        final = run(tmp_path, Batches(*columns(4)), total=total, parts=parts)
    assert int(final["step"]) == 4 and not params["a"].is_deleted()
    assert final["params"]["tower"]["b"] is state["params"]["tower"]["b"]


# ------------------------------------------------------------------ what goes wrong


def test_not_finite_stops_and_names_the_step(tmp_path):
    data = [*columns(2), np.array([1, np.nan, 1, 1]), *columns(2)]
    with pytest.raises(AaJaxError, match="step 3: the loss is nan.*skip_nonfinite=True"):
        run(tmp_path, Batches(*data), total=5, checkpoint_every=1)
    assert (tmp_path / "checkpoints/sft/2").is_dir()
    assert not (tmp_path / "checkpoints/sft/3").exists()


def test_not_finite_can_be_skipped_and_is_counted(tmp_path):
    data = [*columns(2), np.array([1, np.nan, 1, 1]), *columns(2)]
    state = run(tmp_path, Batches(*data), total=5, skip_nonfinite=True, checkpoint_every=1)
    assert float(state["params"]["w"]) == pytest.approx(position_after([1, 2, 1, 2]))
    lines = read_metrics(tmp_path)
    assert [line["skipped"] for line in lines] == [0, 0, 1, 1, 1]
    assert np.isnan(lines[2]["loss"]) and np.isfinite(lines[3]["loss"])


def test_a_loss_that_is_not_its_metrics_is_refused(tmp_path):
    def forgets_a_term(params, batch):
        loss, metrics = objective(params, batch)
        return loss + jnp.square(params["w"] - 1), metrics

    with pytest.raises(ConfigError, match=r"step 1: the objective's loss.*differ by 1"):
        run(tmp_path, Batches(*columns(2)), total=2, parts=build(forgets_a_term))


def test_a_batch_that_cannot_be_padded(tmp_path):
    class NoMask(Batches):
        def __next__(self):
            batch = super().__next__()
            return {"x": batch["x"]}

    with pytest.raises(DataError, match="sequence_mask"):
        run(tmp_path, NoMask(np.ones(5)), parts=build(mesh=make_mesh()))


@pytest.mark.parametrize("name", ["total_steps", "log_every"])
def test_counts_must_be_positive(tmp_path, name):
    options = {"total": 0} if name == "total_steps" else {"log_every": 0}
    with pytest.raises(ConfigError, match=f"{name} must be at least 1, got 0"):
        run(tmp_path, Batches(), **options)


# ------------------------------------------------------------------ killed without warning


def train_until_done(tmp_path, seed, kills):
    """Runs tiny.py, killing it `kills` times at random moments; (number of kills, workdirs)."""
    rng = np.random.default_rng(seed)
    workdir, reference = tmp_path / "killed", tmp_path / "whole"
    root = Path(__file__).parents[2]
    environment = os.environ | {
        "PYTHONPATH": str(root),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=1",
    }
    command = [sys.executable, str(Path(__file__).with_name("tiny.py")), workdir, reference]
    killed = 0
    for _ in range(kills + 1):
        log = (tmp_path / f"log{killed}").open("w")
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        if killed < kills:
            wait_for_lines(workdir, process, lines=int(rng.integers(4, 15)))
            time.sleep(float(rng.uniform(0, 0.06)))
            process.kill()
            killed += process.poll() is None or process.wait() == -signal.SIGKILL
        code = process.wait()
        log.close()
        assert code in (0, -signal.SIGKILL), (tmp_path / log.name).read_text()[-3000:]
    assert code == 0
    return killed, workdir, reference


def wait_for_lines(workdir, process, lines):
    path = workdir / "metrics.jsonl"
    until = time.monotonic() + 120
    while time.monotonic() < until and process.poll() is None:
        # lines of an earlier attempt count only once training has passed them again
        if path.exists() and path.read_text().count("\n") >= lines and changed_lately(path):
            return
        time.sleep(0.005)


def changed_lately(path):
    return time.time() - path.stat().st_mtime < 0.5


def assert_as_if_never_killed(workdir, reference):
    with np.load(workdir / "final.npz") as ours, np.load(reference / "final.npz") as theirs:
        assert ours.files == theirs.files and len(ours.files) > 8
        for name in ours.files:
            np.testing.assert_array_equal(ours[name], theirs[name])
    timing = (
        "time", "step_seconds", "data_seconds", "compute_seconds", "tokens_per_second",
        "checkpoint_seconds", "memory_peak_gib",
    )  # fmt: skip
    ours, theirs = (
        [{k: v for k, v in json.loads(line).items() if k not in timing} for line in text]
        for text in ((d / "metrics.jsonl").read_text().splitlines() for d in (workdir, reference))
    )
    assert [line["step"] for line in ours] == list(range(1, 24))
    assert ours == theirs


def test_killed_once_is_bit_identical(tmp_path):
    killed, workdir, reference = train_until_done(tmp_path, seed=0, kills=1)
    assert killed == 1
    assert_as_if_never_killed(workdir, reference)


@pytest.mark.slow
def test_killed_many_times_is_bit_identical(tmp_path):
    killed, workdir, reference = train_until_done(tmp_path, seed=1, kills=8)
    assert killed >= 4
    assert_as_if_never_killed(workdir, reference)
