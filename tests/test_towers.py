"""A frozen tower's features from disk: the same losses, and no tower that runs in training."""

import importlib.util
import logging
from pathlib import Path

import jax
import numpy as np
import pytest

from aa_jax import models, recipes, towers
from aa_jax.data.example import Example, Part, message
from aa_jax.data.features import FeatureStore
from aa_jax.data.media import decode
from aa_jax.data.processor import Processor
from aa_jax.data.templates import find_template, read
from aa_jax.errors import CheckpointError, ConfigError
from aa_jax.models.names import flatten
from aa_jax.sharding import make_mesh
from aa_jax.training.metrics import read_metrics, series

TESTS = Path(__file__).parent


def sibling(path):
    spec = importlib.util.spec_from_file_location(Path(path).stem, TESTS / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def patches(folder):
    """A Qwen2.5-VL; two pictures, a film, and text alone."""
    media = sibling("rl/test_media.py")
    return (*media.patches(folder), "vision_tower")


def older_patches(folder):
    """A Qwen2-VL of the first generation; the same media."""
    return (*sibling("rl/test_media.py").older_patches(folder), "vision_tower")


def tiles(folder):
    """A LLaVA-NeXT; one or two pictures of several shapes, and text alone."""
    model, processor, _, rows = sibling("test_tower_restart.py").tiles(folder)
    params = jax.tree.map(lambda x: 3 * x, jax.jit(model.init)(jax.random.key(0)))
    read_row = find_template("AA_TI2T")
    pairs = [decode(pair) for row in rows for pair in read(read_row, "preference", row)]
    ask = message("user", "which digits?", [Part("image", index=i) for i in range(2)])
    pairs.append(Example((ask,), ("one", "two six"), (pairs[1].media[0], pairs[2].media[0])))
    pairs.append(Example((message("user", "which digits?"),), ("one", "two")))
    return model, params, processor, pairs, "vision_tower"


def clips(folder):
    """A Qwen2-Audio; one or two clips of different lengths."""
    return (*sibling("rl/test_media.py").clips(folder), "audio_tower")


def pictures(folder):
    """A LLaVA; one strip of digits each, some of them in two pairs."""
    from aa_jax.data import digits
    from aa_jax.llf.start import llava_config

    tiny = dict(vision_dim=16, vision_layers=2, vision_heads=2, dim=32, layers=2, heads=2,
                kv_heads=1, mlp_dim=48)  # fmt: skip
    processor = digits.write_processor(folder, max_digits=3, patch=8)
    model = models.build(llava_config(3, **tiny))
    params = jax.tree.map(lambda x: 3 * x, jax.jit(model.init)(jax.random.key(0)))
    rows = digits.preference_rows(5, 0, "train", annotator=digits.calibrated())
    pairs = [
        example for row in rows for example in read(find_template("AA_TI2T"), "preference", row)
    ]
    pairs.append(pairs[0].replace(responses=pairs[0].responses[::-1]))
    return model, params, Processor.from_pretrained(processor), pairs, "vision_tower"


@pytest.fixture(
    scope="module",
    params=[
        pictures,
        *(pytest.param(f, marks=pytest.mark.slow) for f in (tiles, patches, older_patches, clips)),
    ],
    ids=["pictures", "tiles", "patches", "older patches", "clips"],
)
def world(request, tmp_path_factory):
    return request.param(tmp_path_factory.mktemp(request.param.__name__) / "c")


@pytest.fixture
def tower_runs(world, monkeypatch):
    """Counts how often the tower's module is executed, not how often it is traced."""
    model = world[0]
    count = {"runs": 0}
    clip, qwen = ("clip.modeling", "ClipVision"), ("qwen2_vl.vision", "VisionTower")
    names = {"llava": clip, "llava_next": clip, "qwen2_vl": qwen, "qwen2_5_vl": qwen,
             "qwen2_audio": ("whisper.modeling", "AudioEncoder")}  # fmt: skip
    module, name = names[model.family]
    cls = getattr(importlib.import_module(f"aa_jax.models.{module}"), name)
    call = cls.__call__

    def counted(self, *args):
        jax.debug.callback(lambda: count.__setitem__("runs", count["runs"] + 1))
        return call(self, *args)

    monkeypatch.setattr(cls, "__call__", counted)
    return count


def fit(world, workdir, recipe="dpo", **options):
    """Losses of three updates."""
    model, params, processor, examples, tower = world
    kwargs = dict(
        model=model, params=params, processor=processor, examples=examples, workdir=workdir,
        mesh=make_mesh(devices=jax.devices()[:1]), batch_rows=2, steps=3, log_every=1, workers=0,
        optim={"lr": 1e-2}, frozen=(f"{tower}/*",),
    )  # fmt: skip
    trained, _ = recipes.train(recipe, **{**kwargs, **options})
    jax.effects_barrier()
    rows = read_metrics(workdir, stage="train")
    names = ("eval/loss", "grad_norm") if options.get("eval_every") else ("loss", "grad_norm")
    return np.asarray([series(rows, name)[1] for name in names]), trained


def encode(world, folder, **options):
    model, params, processor, examples, tower = world
    data = recipes._encode(examples, processor, recipes.Limits())
    kwargs = dict(
        processor=processor, frozen=(f"{tower}/*",), folder=folder,
        mesh=make_mesh(devices=jax.devices()[:1]), batch_rows=2,
    )  # fmt: skip
    return towers.computed_ahead(model, params, data, **{**kwargs, **options})


def test_losses_are_those_without_it_and_the_tower_rests(world, tower_runs, tmp_path):
    expected, trained = fit(world, tmp_path / "plain")
    assert tower_runs["runs"] > 3
    tower_runs["runs"] = 0
    encode(world, tmp_path / "cache")
    files = sorted(tmp_path.glob("cache/*/*/*.features"))
    # Every medium once: the last pair has the first one's.
    assert 0 < tower_runs["runs"] <= len(files)
    tower_runs["runs"] = 0
    got, ahead = fit(world, tmp_path / "ahead", tower_cache=tmp_path / "cache")
    assert tower_runs["runs"] == 0
    assert files == sorted(tmp_path.glob("cache/*/*/*.features"))
    np.testing.assert_allclose(got[0], expected[0], atol=1e-6, rtol=0)
    np.testing.assert_allclose(got[1], expected[1], rtol=1e-4)
    assert np.ptp(expected[0]) > 1e-3
    for name, leaf in flatten(trained).items():
        np.testing.assert_allclose(flatten(ahead)[name], leaf, atol=1e-5, err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "options"),
    [
        ("sft", dict(pack_length=160)),
        ("reward", {}),
        ("dpo", dict(share_prefix=False, accumulation=2)),
        ("dpo", dict(buckets=2)),
        ("dpo", dict(mesh=None)),
        ("dpo", dict(eval_examples=None)),
    ],
)
def test_every_layout(recipe, options, world, tmp_path):
    """Packed rows, a score head, two rows per pair, micro-batches, several lengths and devices."""
    if recipe == "sft":
        examples = [example.replace(responses=example.responses[:1]) for example in world[3]]
        options = {**options, "examples": examples}
    if "eval_examples" in options:
        options = {"eval_examples": world[3], "eval_every": 1}
    if "mesh" in options:
        options = {"mesh": make_mesh(data=4, fsdp=2), "batch_rows": 3}
    expected, _ = fit(world, tmp_path / "plain", recipe, **options)
    got, _ = fit(world, tmp_path / "ahead", recipe, **options, tower_cache=tmp_path / "cache")
    np.testing.assert_allclose(got[0], expected[0], atol=1e-6, rtol=0)


def test_features_are_the_towers(world, tmp_path):
    """Example by example what the tower gives for the example's own media."""
    model, params, processor, examples, _ = world
    data = encode(world, tmp_path)
    plain = recipes._encode(examples, processor, recipes.Limits())
    assert len(data) == len(plain) == len(examples)
    for index in range(len(data)):
        media, item = plain[index].media, data[index]
        assert item.sizes == data.sizes[index]
        np.testing.assert_array_equal(item.prompt, plain[index].prompt)
        if not media:
            assert not item.media
            continue
        expected = model.tower_features(params, {k: v[None] for k, v in media.items()})[0]
        found = item.media["tower_features"]
        counts = [len(x) for x in found] if found.ndim == 3 else []
        if "feature_lengths" in media:
            np.testing.assert_array_equal(item.media["feature_lengths"], media["feature_lengths"])
            counts = np.asarray(towers.pooled_length(jax.numpy.asarray(media["feature_lengths"])))
        close = dict(atol=2e-6 * np.abs(expected).max(), rtol=0)
        for number, count in enumerate(counts):
            np.testing.assert_allclose(found[number, :count], expected[number, :count], **close)
        if not len(counts):
            np.testing.assert_allclose(found, expected[: len(found)], **close)


def test_a_killed_run_goes_on_where_it_was(world, tower_runs, tmp_path, monkeypatch):
    put, written = FeatureStore.put, []

    def dies(self, key, features):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(key)
        put(self, key, features)

    monkeypatch.setattr(FeatureStore, "put", dies)
    with pytest.raises(KeyboardInterrupt):
        encode(world, tmp_path)
    monkeypatch.setattr(FeatureStore, "put", put)
    calls = []
    monkeypatch.setattr(FeatureStore, "put", lambda s, k, f: (calls.append(k), put(s, k, f)))
    encode(world, tmp_path)
    assert calls and not set(calls) & set(written)
    tower_runs["runs"] = 0
    encode(world, tmp_path)
    jax.effects_barrier()
    assert tower_runs["runs"] == 0


@pytest.mark.parametrize(
    "damage",
    [
        "cut",
        "bit",
        *(pytest.param(d, marks=pytest.mark.slow) for d in ("empty", "header", "swapped")),
    ],
)
def test_damaged_features_are_computed_again_aloud(damage, world, tmp_path, caplog):
    if damage != "bit" and world[0].family != "llava":
        pytest.skip("files are the same for all families")
    data = encode(world, tmp_path)
    files = sorted(tmp_path.glob("*/*/*.features"))
    whole = [file.read_bytes() for file in files]
    where = [i for i in range(len(data)) if data[i].media][0]
    for file, other in zip(files, whole[1:] + whole[:1], strict=True):
        good = file.read_bytes()
        file.write_bytes({
            "cut": good[:-5], "empty": b"", "bit": good[:-1] + bytes([good[-1] ^ 1]),
            "header": b"[" + good[1:], "swapped": other,
        }[damage])  # fmt: skip
    with pytest.raises(CheckpointError, match="damaged features of a tower.*Start the run again"):
        data[where]
    with caplog.at_level(logging.WARNING):
        encode(world, tmp_path)
    assert caplog.text.count("computing them again") == len(files) > 0
    assert [file.read_bytes() for file in files] == whole


def test_another_tower_has_features_of_its_own(world, tmp_path):
    """One weight of the tower, one number of its config or another type: another folder."""
    model, params, *_, tower = world
    keys = {towers.tower_key(model, params)}
    path = next(iter(flatten(params[tower])))
    for changed in (path, None):
        other = jax.tree.map(lambda x: x, params)
        node = other[tower] if changed else other["projector"]
        leaves = flatten(node)
        name = changed or next(iter(leaves))
        *parents, last = name.split("/")
        for parent in parents:
            node = node[parent]
        node[last] = node[last] + 1e-3
        keys.add(towers.tower_key(model, other))
    assert len(keys) == 2  # the projector is none of the tower's
    keys.add(towers.tower_key(models.build(model.hf_config, dtype="bfloat16"), params))
    keys.add(towers.tower_key(models.build({**model.hf_config, "pad_token_id": 7}), params))
    assert len(keys) == 4


def test_a_tower_that_trains_is_refused(world, tmp_path):
    tower = world[4]
    some = next(iter(flatten(world[1][tower])))
    for frozen in ((), (f"{tower}/layers/*",), (f"{tower}/[!{some[0]}]*",)):
        with pytest.raises(ConfigError, match=rf"(?s){tower}.*train.*train.frozen=\('{tower}/\*'"):
            fit(world, tmp_path / "run", tower_cache=tmp_path / "cache", frozen=frozen)
    assert not (tmp_path / "cache").exists()


def test_a_model_without_a_tower_is_refused(world, tmp_path):
    config = {"architectures": ["LlamaForCausalLM"], "vocab_size": 8, "hidden_size": 4,
              "intermediate_size": 4, "num_hidden_layers": 1, "num_attention_heads": 1}  # fmt: skip
    model = models.build(config)
    text = (model, model.abstract(), *world[2:])
    with pytest.raises(ConfigError, match="a llama model has no tower"):
        encode(text, tmp_path, frozen=())


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot be written.*train.tower_cache"):
        FeatureStore(tmp_path / "file" / "cache")


def test_what_a_killed_writer_left_is_removed(tmp_path):
    import os

    store = FeatureStore(tmp_path)
    store.put("ab12", np.ones((2, 3), np.float32))
    old, new = tmp_path / "ab/ab12.host.1.partial", tmp_path / "ab/ab12.host.2.partial"
    old.write_bytes(b"half"), new.write_bytes(b"half")
    os.utime(old, (0, 0))
    FeatureStore(tmp_path)
    assert not old.exists() and new.exists()
    np.testing.assert_array_equal(store.get("ab12"), np.ones((2, 3)))
