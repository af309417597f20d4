"""Where time and memory go: figures against what is known of them, and traces that open."""

import gzip
import json
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aa_jax.errors import ConfigError
from aa_jax.kernels.attention import tiled, xla
from aa_jax.losses.base import Ratio
from aa_jax.platforms.chips import CHIPS, find_chip
from aa_jax.sharding import make_mesh
from aa_jax.training import observe
from aa_jax.training.flops import matmul_flops
from aa_jax.training.loop import fit
from aa_jax.training.metrics import read_metrics
from aa_jax.training.observe import Observer
from aa_jax.training.optim import make_optimizer
from aa_jax.training.state import init_state
from aa_jax.training.step import make_step


class Batches:
    """Six batches of tokens; each takes a while to come."""

    def __init__(self, wait=0.0):
        self.position, self.wait = 0, wait

    def __next__(self):
        time.sleep(self.wait)
        self.position += 1
        if self.position > 6:
            raise StopIteration
        return {"tokens": np.ones((8, 4), np.int32)}

    def get_state(self):
        return {"position": self.position}

    def set_state(self, state):
        self.position = state["position"]


def run(workdir, wait=0.0, **options):
    mesh = make_mesh(devices=jax.devices()[:1])
    params = {"a": np.ones((16, 16), np.float32), "b": np.ones((16, 4), np.float32)}
    tx, schedule = make_optimizer(lr=1e-3, total_steps=6)

    def objective(params, batch):
        x = jnp.zeros((*batch["tokens"].shape, 16)) + 1.0
        loss = jnp.mean((x @ params["a"] @ params["b"]) ** 2)
        return loss, {"loss": Ratio(loss, 1.0)}

    state = init_state(params, tx, mesh=mesh, frozen=("b",))
    step = make_step(objective, tx, mesh=mesh, schedule=schedule, frozen=("b",))
    return fit(
        step=step, state=state, batches=Batches(wait), total_steps=6, workdir=workdir, **options
    )


def test_time_is_split_and_memory_is_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(observe, "find_chip", lambda kind: CHIPS["v5e"])
    run(tmp_path, wait=0.05, checkpoint_every=2, log_every=1)
    lines = read_metrics(tmp_path, stage="train")
    assert len(lines) == 6
    # A batch is fetched while the step before is in flight, so its time may count for that one.
    assert sum(line["data_seconds"] for line in lines) >= 6 * 0.05
    for line in lines:
        assert line["step_seconds"] == pytest.approx(
            line["data_seconds"] + line["compute_seconds"], rel=1e-6
        )
        assert 0.05 < line["memory_peak_gib"] < 100
        # 16 x 16 trained weights, 16 x 4 frozen ones.
        flops = 6 * 256 + 2 * 64
        expected = flops * line["tokens_per_second"] / (197e12 * jax.device_count())
        assert line["mfu"] == pytest.approx(expected)
    # Training stood still for the checkpoints of steps 2 and 4, not for those in between.
    waits = [line["checkpoint_seconds"] for line in lines]
    assert waits[2] > 0 and waits[4] > 0 and waits[1] == waits[3] == 0


def test_mfu_is_left_out_where_the_peak_is_unknown(tmp_path):
    run(tmp_path)
    assert all("mfu" not in line for line in read_metrics(tmp_path, stage="train"))


@pytest.mark.parametrize(
    ("kind", "name"),
    [("TPU v5 lite", "v5e"), ("TPU v5", "v5p"), ("TPU v6 lite", "v6e"), ("TPU v4", "v4"),
     ("NVIDIA H200 141GB HBM3e", "h200"), ("NVIDIA H100 80GB HBM3", "h100"), ("cpu", None)],
)  # fmt: skip
def test_chips_are_found_by_their_kind(kind, name):
    chip = find_chip(kind)
    assert (chip and chip.name) == name


def test_a_trace_of_three_steps_opens(tmp_path):
    run(tmp_path, profile=2)
    folder = tmp_path / "profile/train/plugins/profile"  # where TensorBoard and XProf look
    spaces = list(folder.glob("*/*.xplane.pb"))
    traces = list(folder.glob("*/*.trace.json.gz"))
    assert len(spaces) == 1 and len(traces) == 1
    data = jax.profiler.ProfileData.from_serialized_xspace(spaces[0].read_bytes())
    assert any("/host:CPU" in plane.name for plane in data.planes)
    events = json.loads(gzip.decompress(traces[0].read_bytes()))["traceEvents"]
    steps = [e["args"]["step_num"] for e in events if e.get("name") == "train"]
    assert sorted(int(n) for n in steps) == [2, 3, 4]


def test_a_trace_that_begins_before_the_run_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="profile is -1"):
        run(tmp_path, profile=-1)


def test_flops_of_loops_and_recomputation():
    """Against the products written out: 2 x 8 x 16 x 16 each."""
    x, w, one = jnp.ones((8, 16)), jnp.ones((4, 16, 16)), 2 * 8 * 16 * 16

    def layers(w, x, wrap=lambda body: body):
        body = wrap(lambda c, k: (jnp.tanh(c @ k), None))
        return jax.lax.scan(body, x, w)[0].sum()

    count = lambda f: matmul_flops(jax.make_jaxpr(f)(w, x)) / one  # noqa: E731
    assert count(layers) == 4
    assert count(jax.grad(layers)) == 4 * 3
    assert count(jax.grad(lambda w, x: layers(w, x, jax.checkpoint))) == 4 * 4
    assert count(jax.jit(layers)) == 4
    assert count(lambda w, x: (layers(w, x), x)[1]) == 0  # nothing depends on it
    image, kernel = jnp.ones((1, 3, 8, 8)), jnp.ones((4, 3, 2, 2))
    convolve = lambda k, x: jax.lax.conv(x, k, (1, 1), "VALID")  # noqa: E731
    assert matmul_flops(jax.make_jaxpr(convolve)(kernel, image)) == 2 * 4 * 7 * 7 * 3 * 4


def test_flops_of_tiles_and_of_what_devices_do_by_themselves():
    """A mask counts as if all was visible; over a mesh all devices together do the same."""
    B, T, H, D = 8, 64, 4, 16
    x = jnp.ones((B, T, H, D))
    steps = jnp.arange(T, dtype=jnp.int32)
    causal = jnp.stack([0 * steps, 0 * steps, 0 * steps, steps + 1], -1)[None]

    def attend(q):
        return jnp.sum(xla.attention(q, x, x, causal, 0.25, tiles=tiled.Tiles(16, 32)))

    product = 2 * B * H * T * T * D
    assert matmul_flops(jax.make_jaxpr(attend)(x)) == 2 * product
    with jax.set_mesh(make_mesh(fsdp=4, tensor=2)):
        assert matmul_flops(jax.make_jaxpr(attend)(x)) == 2 * product
        # Forward again is two, and five backward.
        assert matmul_flops(jax.make_jaxpr(jax.grad(attend))(x)) == 7 * product


def test_the_observer_reads_shapes_alone():
    state = {"params": {"a": jax.ShapeDtypeStruct((3, 5), jnp.float32)}}
    watch = Observer(state, (), "nowhere", "train")
    assert watch.flops_per_token == 6 * 15
