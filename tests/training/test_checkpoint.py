"""Checkpoints: bit-exact, verified, atomic, and errors that say what to do."""

import json
import logging
import shutil
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from aa_jax.errors import CheckpointError
from aa_jax.sharding import make_mesh, shardings
from aa_jax.training.checkpoint import Checkpointer, check_fingerprint
from aa_jax.training.jsonable import digest, from_json, to_json
from aa_jax.training.optim import make_optimizer
from aa_jax.training.state import abstract_state, as_abstract, init_state


def small(value, mesh=None):
    place = NamedSharding(mesh or make_mesh(), P("data"))
    w = np.random.default_rng(value).normal(size=(8, 64)).astype(np.float32)
    return {"params": {"w": jax.device_put(w, place)}, "step": jnp.int32(value)}


def save_three(folder, make=small):
    with Checkpointer(folder) as saver:
        for step in (1, 2, 3):
            saver.save(step, make(step), {"position": step}, {"note": step})


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
def test_round_trip_is_bit_exact_and_opens_on_another_mesh(tiny, tmp_path, dtype):
    params = tiny.make_params(dtype)
    tx, _ = make_optimizer(1e-2, 10)
    # Chains, named tuples, empty states and integer keys: structure must come back as it was.
    tx = optax.chain(tx, optax.masked(optax.trace(0.9), {**dict.fromkeys(params, True), "head": 0}))

    def state_on(mesh, make):
        places = shardings(tiny.AXES, params, mesh)
        return make(params, tx, mesh=mesh, shardings=places, frozen=("layers/up/*",))

    state = state_on(make_mesh(fsdp=2, tensor=2), init_state)
    rng = np.random.default_rng(0)
    noisy = jax.tree.map(
        lambda x: jax.device_put(rng.normal(size=x.shape).astype(x.dtype), x.sharding), state
    )
    data = {"next": 7, "buffer": rng.normal(size=(3, 2)), "raw": b"\x00\xff", "none": None}
    with Checkpointer(tmp_path) as saver:
        saver.save(5, noisy, data, {"config": {"lr": 0.1}})
    for sizes in ({"fsdp": 2, "tensor": 2}, {"fsdp": 8}, {"devices": jax.devices()[:1]}):
        wanted = state_on(make_mesh(**sizes), abstract_state)
        with Checkpointer(tmp_path) as saver:
            found, data_state, meta = saver.restore(wanted)
        tiny.assert_same(found, noisy)
        assert jax.tree.structure(found) == jax.tree.structure(state)
        for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
            assert x.dtype == y.dtype and x.sharding.is_equivalent_to(y.sharding, x.ndim)
    np.testing.assert_array_equal(data_state.pop("buffer"), data.pop("buffer"))
    assert data_state == data and meta == {"config": {"lr": 0.1}}


def test_saving_goes_on_while_the_state_is_overwritten(tmp_path):
    """The arrays may be donated as soon as save returns."""
    state = {"w": jax.device_put(np.arange(1 << 20, dtype=np.float32))}
    scale = jax.jit(lambda s: jax.tree.map(lambda x: x * 2, s), donate_argnums=0)
    with Checkpointer(tmp_path, keep_last=3) as saver:
        for step in range(3):
            saver.save(step, state)
            state = scale(state)
        for step in range(3):
            (found, _, _) = saver.restore(as_abstract(state), step=step)
            np.testing.assert_array_equal(
                found["w"], np.arange(1 << 20, dtype=np.float32) * 2**step
            )


def test_nothing_there(tmp_path):
    with Checkpointer(tmp_path / "new") as saver:
        assert saver.steps() == [] and saver.restore(as_abstract(small(0))) is None


def test_keeps_the_last_and_the_best(tmp_path):
    def keep(folder, mode):
        with Checkpointer(folder, keep_last=2, keep_best="score", best_mode=mode) as saver:
            for step, score in enumerate([3.0, 1.0, 5.0, 4.0, 2.0]):
                saver.save(step, small(0), metrics={"score": score})
            return saver.steps()

    assert keep(tmp_path / "min", "min") == [1, 3, 4]
    assert keep(tmp_path / "max", "max") == [2, 3, 4]
    # what was best is known again after a restart
    with Checkpointer(tmp_path / "max", keep_last=1, keep_best="score", best_mode="max") as saver:
        saver.save(9, small(0), metrics={"score": 0.0})
        saver.wait()
        assert saver.steps() == [2, 9]


def test_partial_restore_reads_only_what_is_named(tmp_path):
    save_three(tmp_path)
    wanted = as_abstract({"params": small(0)["params"]})
    with Checkpointer(tmp_path) as saver:
        found, _, meta = saver.restore(wanted, partial=True)
        assert meta == {"note": 3}
        np.testing.assert_array_equal(found["params"]["w"], small(3)["params"]["w"])
        with pytest.raises(CheckpointError, match="step:.*missing here"):
            saver.restore(wanted)
        older, _, _ = saver.restore(wanted, step=2, partial=True)
        np.testing.assert_array_equal(older["params"]["w"], small(2)["params"]["w"])
        with pytest.raises(CheckpointError, match=r"no checkpoint of step 1, only \[2, 3\]"):
            saver.restore(wanted, step=1)


def test_arrays_that_hold_the_saved_values_are_kept(tmp_path):
    state = small(3)
    save_three(tmp_path)
    with Checkpointer(tmp_path) as saver:
        found, _, _ = saver.restore(state)
        assert found["params"]["w"] is state["params"]["w"]
        found, _, _ = saver.restore(small(4))
        np.testing.assert_array_equal(found["params"]["w"], state["params"]["w"])


# ------------------------------------------------------------------ damage


def lone(value):
    """One array on one device: when one read fails, orbax abandons its siblings, whose answers
    then meet a closed event loop, which pytest reports in whatever test comes next."""
    return {"w": jax.device_put(np.random.default_rng(value).normal(size=4096), jax.devices()[0])}


def files_of(step_folder, what):
    if what == "record":
        return [step_folder / "record" / "metadata"]
    return [p for p in (step_folder / "state").rglob("d/*") if p.is_file()]


def damage(paths, how):
    assert paths
    for path in paths:
        data = path.read_bytes()
        middle = len(data) // 2
        if how == "truncated":
            path.write_bytes(data[:middle])
        elif how == "missing":
            path.unlink()
        else:  # one bit
            path.write_bytes(data[:middle] + bytes([data[middle] ^ 4]) + data[middle + 1 :])


@pytest.mark.parametrize("how", ["truncated", "missing", "one bit"])
@pytest.mark.parametrize("what", ["arrays", "record"])
def test_a_damaged_newest_checkpoint_gives_way_to_the_one_before(tmp_path, caplog, what, how):
    save_three(tmp_path, lone)
    damage(files_of(tmp_path / "3", what), how)
    with Checkpointer(tmp_path) as saver:
        with caplog.at_level(logging.WARNING, "aa_jax"):
            found, data_state, _ = saver.restore(as_abstract(lone(0)))
        assert data_state == {"position": 2}
        np.testing.assert_array_equal(found["w"], lone(2)["w"])
        messages = [r.getMessage() for r in caplog.records if r.name.startswith("aa_jax")]
        assert any("/3 is damaged" in m for m in messages)
        assert any("resuming from step 2" in m for m in messages)
        # the run reaches step 3 again
        saver.save(3, lone(3))
        saver.wait()
        assert saver.steps() == [2, 3]
    assert (tmp_path / "damaged" / "3").is_dir()


def test_when_every_checkpoint_is_damaged_nothing_restarts_silently(tmp_path):
    save_three(tmp_path, lone)
    for step in (2, 3):
        damage(files_of(tmp_path / str(step), "arrays"), "truncated")
    with Checkpointer(tmp_path) as saver:
        with pytest.raises(CheckpointError, match="newest, step 3, fails.*start over"):
            saver.restore(as_abstract(lone(0)))
        assert saver.steps() == [2, 3]


def test_what_a_killed_save_leaves_is_ignored(tmp_path):
    save_three(tmp_path)
    shutil.copytree(tmp_path / "3", tmp_path / "4.orbax-checkpoint-tmp")
    with Checkpointer(tmp_path) as saver:
        assert saver.steps() == [2, 3]
        assert saver.restore(as_abstract(small(0)))[1] == {"position": 3}
    assert not (tmp_path / "4.orbax-checkpoint-tmp").exists()


# ------------------------------------------------------------------ the wrong checkpoint


def test_another_model_is_named_leaf_by_leaf(tmp_path):
    save_three(tmp_path)
    w = jax.ShapeDtypeStruct((8, 32), jnp.float32)
    v = jax.ShapeDtypeStruct((2,), jnp.bfloat16)
    wanted = {"params": {"w": w, "v": v}, "step": jax.ShapeDtypeStruct((), jnp.int32)}
    with Checkpointer(tmp_path) as saver:
        with pytest.raises(CheckpointError) as error:
            saver.restore(wanted)
        for words in [
            "params/v: missing in the checkpoint, (2,) bfloat16 here",
            "params/w: (8, 64) float32 in the checkpoint, (8, 32) float32 here",
            "another model",
            "another workdir",
        ]:
            assert words in str(error.value)
        assert saver.steps() == [2, 3]


def test_another_dtype_is_not_cast(tmp_path):
    save_three(tmp_path)
    wanted = as_abstract(small(0))
    wanted["params"]["w"] = wanted["params"]["w"].update(dtype=jnp.bfloat16)
    with Checkpointer(tmp_path) as saver, pytest.raises(CheckpointError, match="bfloat16 here"):
        saver.restore(wanted)


def test_another_dtype_on_request(tmp_path):
    """fp32 -> bf16 and back, on another mesh; a whole number stays what it is."""
    save_three(tmp_path / "a")
    places = [NamedSharding(make_mesh(fsdp=4), P("fsdp")), NamedSharding(make_mesh(), P())]
    half, full = (
        {
            "params": {"w": jax.ShapeDtypeStruct((8, 64), dtype, sharding=place)},
            "step": jax.ShapeDtypeStruct((), jnp.int32, sharding=places[1]),
        }
        for dtype, place in zip([jnp.bfloat16, jnp.float32], places, strict=True)
    )
    w = np.asarray(small(3)["params"]["w"])
    with Checkpointer(tmp_path / "a") as saver:
        found, data_state, _ = saver.restore(half, cast=True)
    assert found["params"]["w"].dtype == jnp.bfloat16 and found["step"].dtype == jnp.int32
    assert found["params"]["w"].sharding.is_equivalent_to(places[0], 2)
    assert data_state == {"position": 3}
    np.testing.assert_array_equal(found["params"]["w"], w.astype(jnp.bfloat16))
    with Checkpointer(tmp_path / "b") as saver:
        saver.save(1, found)
        again, _, _ = saver.restore(full, cast=True)
    assert again["params"]["w"].dtype == jnp.float32
    np.testing.assert_array_equal(again["params"]["w"], w.astype(jnp.bfloat16).astype(np.float32))
    wanted = {"params": half["params"], "step": jax.ShapeDtypeStruct((), jnp.float32)}
    with Checkpointer(tmp_path / "a") as saver:
        with pytest.raises(CheckpointError, match="step: .* int32 in the checkpoint.* float32"):
            saver.restore(wanted, cast=True)


def test_another_optimizer_is_called_that(tmp_path):
    params = {"w": np.ones((4, 2), np.float32)}
    mesh = make_mesh()
    with Checkpointer(tmp_path) as saver:
        saver.save(1, init_state(params, optax.adam(1e-3), mesh=mesh))
        with pytest.raises(CheckpointError, match="another optimizer or other frozen"):
            saver.restore(abstract_state(params, optax.sgd(1e-3), mesh=mesh))


def test_fingerprint_names_the_keys():
    saved = {"model": {"path": "a", "layers": 2}, "lr": 1e-3, "log_every": 1, "betas": (0.9, 0.95)}
    same = json.loads(json.dumps(saved))
    check_fingerprint(saved, same)
    other = {"model": {"path": "b", "layers": 2, "remat": True}, "lr": 1e-3, "betas": [0.9, 0.95]}
    with pytest.raises(CheckpointError) as error:
        check_fingerprint(saved, other, ignore=["log_*"])
    text = str(error.value)
    assert "model.path: 'a' -> 'b'" in text and "model.remat: (not set) -> True" in text
    assert "layers" not in text and "log_every" not in text and "betas" not in text


# ------------------------------------------------------------------ storage that fails


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="file/x cannot be opened.*writable"):
        Checkpointer(tmp_path / "file" / "x")


DISK_FULL = """
    import logging, resource, signal, sys
    import jax, numpy as np
    from aa_jax.errors import CheckpointError
    from aa_jax.training.checkpoint import Checkpointer

    logging.getLogger("absl").setLevel(logging.CRITICAL)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    state = {"w": jax.device_put(np.random.default_rng(0).normal(size=(256, 256)))}
    with Checkpointer(sys.argv[1], keep_last=1) as saver:
        saver.save(1, state)
        saver.wait()
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
        try:
            saver.save(2, state)
            saver.wait()
        except CheckpointError as error:
            assert "disk is not full" in str(error) and "File too large" in str(error), error
        else:
            raise AssertionError("nothing was raised")
        assert saver.steps() == [1]
        found, _, _ = saver.restore(state)
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
        saver.save(2, state)
        saver.wait()
        assert saver.steps() == [2]
"""


def test_a_full_disk_loses_nothing(tmp_path):
    command = [sys.executable, "-c", textwrap.dedent(DISK_FULL), str(tmp_path / "c")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_keep_last_must_be_positive(tmp_path):
    with pytest.raises(CheckpointError, match="keep_last must be at least 1"):
        Checkpointer(tmp_path, keep_last=0)


# ------------------------------------------------------------------ JSON


def test_json_keeps_arrays_bytes_and_floats():
    value = {
        "f": 0.1 + 0.2,
        "nested": [{"b": b"\x01"}, None, True, "x"],
        "bf": np.arange(3).astype(jnp.bfloat16),
        "i": np.int64(4),
        "keys": np.array([[1, 2]], np.uint32),
    }
    text = json.dumps(to_json(value))
    found = from_json(json.loads(text))
    assert found["f"] == 0.1 + 0.2 and found["nested"] == value["nested"] and found["i"] == 4
    for name in ("bf", "keys"):
        assert found[name].dtype == value[name].dtype
        np.testing.assert_array_equal(found[name], value[name])
    assert digest(json.loads(text)) == digest(to_json(value))


@pytest.mark.parametrize("value, words", [({"a": {1, 2}}, "/a is a set"), ({"a": {1: 2}}, "key 1")])
def test_json_refuses_what_it_would_lose(value, words):
    with pytest.raises(CheckpointError, match=words):
        to_json(value)
