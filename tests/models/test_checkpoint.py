"""Checkpoint folders in and out, against what transformers writes and reads."""

import copy
import json
import shutil

import jax
import ml_dtypes
import numpy as np
import pytest
import torch
import transformers
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from safetensors.numpy import load_file, save_file

from aa_jax import models
from aa_jax.errors import CheckpointError
from aa_jax.models import safetensors
from aa_jax.models.names import flatten


@pytest.fixture(scope="module")
def llava(world, tmp_path_factory):
    """(config, transformers model, its folder, our model, our parameters); read only."""
    folder = tmp_path_factory.mktemp("llava")
    config = world.llava_config()
    return config, *world.pair(config, folder), folder


def same_trees(left, right):
    left, right = flatten(left), flatten(right)
    assert left.keys() == right.keys()
    for path in left:
        assert left[path].dtype == right[path].dtype, path
        a, b = np.asarray(left[path]), np.asarray(right[path])
        np.testing.assert_array_equal(a.view(np.uint8), b.view(np.uint8), err_msg=path)


@pytest.mark.parametrize("stored", ["float32", "bfloat16", "float16"])
def test_save_and_load_are_bit_exact(llava, tmp_path, stored):
    _, _, model, params, _ = llava
    models.save(tmp_path / "a", model, params, dtype=stored)
    again, loaded = models.load(tmp_path / "a", param_dtype=stored)
    same_trees(loaded, jax.tree.map(lambda x: x.astype(stored), params))
    assert json.loads((tmp_path / "a" / "config.json").read_text())["dtype"] == stored
    models.save(tmp_path / "b", again, loaded)  # as stored
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in "ab"]
    assert files[0] == files[1]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", ["llama", "llava"])
def test_transformers_loads_our_export(family, tied, world, tmp_path):
    """No missing, unexpected or mismatched key, and every tensor's bits are ours."""
    if family == "llama":
        config = world.llama_config(tie_word_embeddings=tied, attention_bias=True)
    else:
        config = world.llava_config(text=dict(tie_word_embeddings=tied))
    model = models.build(config)
    params = model.init(jax.random.key(0))
    models.save(tmp_path / "out", model, params)
    cls = getattr(transformers, config["architectures"][0])
    reference, info = cls.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()), info
    ours = world.hf_named(model, params)
    for name, tensor in reference.state_dict().items():
        name = model.names.canonical(name)
        if name == (model.names.tied or ("",))[0] and tied:
            name = model.names.tied[1]
        np.testing.assert_array_equal(ours[name], tensor.numpy(), err_msg=name)
    batch = world.text_batch([7, 5], 8)
    with torch.no_grad():
        expected = world.torch_logits(reference, batch).numpy()
    out = np.asarray(world.logits(model, params, batch))
    np.testing.assert_allclose(out[world.real_mask(batch)], expected, atol=1e-4, rtol=0)


LAYOUTS = {
    # transformers up to 4.51, and llava-hf's own files
    "language_model.model, vision_model": lambda name: name,
    # what 5.x writes
    "flat tower": lambda name: name.replace("vision_tower.vision_model.", "vision_tower."),
    # state_dict() of 4.52 to 5.x
    "in memory": lambda name: {"language_model.lm_head.weight": "lm_head.weight"}.get(
        name,
        "model."
        + name.replace("language_model.model.", "language_model.").replace(
            "vision_tower.vision_model.", "vision_tower."
        ),
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_on_disk_is_read(layout, llava, world, tmp_path):
    """Buffers that old files hold are skipped."""
    _, _, model, params, folder = llava
    tensors = {
        LAYOUTS[layout](name): np.ascontiguousarray(tensor)
        for name, tensor in world.hf_named(model, params).items()
    }
    prefix = "model." if layout == "in memory" else ""
    middle = "model." if not prefix else ""
    tower = "vision_model." if "vision_model" in layout else ""
    tensors[f"{prefix}language_model.{middle}layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(2)
    tensors[f"{prefix}vision_tower.{tower}embeddings.position_ids"] = np.arange(5)[None]
    save_file(tensors, tmp_path / "model.safetensors")
    shutil.copyfile(folder / "config.json", tmp_path / "config.json")
    same_trees(models.load(tmp_path)[1], params)


def test_shards_of_transformers_are_read(llava, tmp_path):
    _, reference, _, params, _ = llava
    reference.save_pretrained(tmp_path, max_shard_size="4KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 3
    same_trees(models.load(tmp_path)[1], params)


@pytest.mark.parametrize("as_function", [False, True])
def test_loads_straight_into_shardings(llava, as_function):
    _, _, model, params, folder = llava
    mesh = jax.make_mesh((4, 2), ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)

    def shardings(model):
        def place(axes):
            names = {"embed": "fsdp", "vision_embed": "fsdp", "mlp": "tensor", "heads": "tensor"}
            return NamedSharding(mesh, P(*(names.get(axis) for axis in axes)))

        return jax.tree.map(place, model.axes(), is_leaf=lambda x: isinstance(x, tuple))

    _, loaded = models.load(folder, shardings=shardings if as_function else shardings(model))
    same_trees(loaded, params)
    kernel = loaded["language_model"]["layers"]["attn"]["q"]["kernel"]
    assert kernel.sharding.spec == P(None, "fsdp", "tensor")
    assert kernel.addressable_shards[0].data.shape == (2, 4, 8)


def test_a_stored_head_of_a_tied_model(world, tmp_path):
    """Accepted when it repeats the embedding, refused when it does not."""
    config = world.llama_config(tie_word_embeddings=True)
    model = models.build(config)
    params = model.init(jax.random.key(0))
    models.save(tmp_path, model, params)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    save_file(tensors, tmp_path / "model.safetensors")
    same_trees(models.load(tmp_path)[1], params)
    tensors["lm_head.weight"][0, 0] += 1
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="lm_head.weight.*tie_word_embeddings to false"):
        models.load(tmp_path)


def test_every_difference_is_in_one_error(llava, tmp_path):
    """Unmapped, unfilled, misshapen and quantised tensors: all named, with file and path."""
    _, _, _, _, folder = llava
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["language_model.model.norm.weight"]
    tensors["language_model.model.layers.2.mlp.up_proj.weight"] = np.zeros((24, 16), np.float32)
    tensors["multi_modal_projector.linear_1.weight"] = np.zeros((16, 13), np.float32)
    tensors["multi_modal_projector.linear_2.bias"] = np.zeros(16, np.int8)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError) as error:
        models.load(tmp_path)
    text = str(error.value)
    assert text.count("\n  - ") == 4 and str(tmp_path) in text
    for expected in (
        "language_model.model.norm.weight [16] (our language_model/norm/scale) is in no file",
        "language_model.model.layers.2.mlp.up_proj.weight [24, 16] in model.safetensors belongs",
        "linear_1.weight in model.safetensors has shape [16, 13], the config asks for [16, 12]",
        "multi_modal_projector.linear_2.bias in model.safetensors is stored as I8",
    ):
        assert expected in text


def damage_truncate(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    return r"model.safetensors is truncated: its tensors need \d+ bytes, it holds \d+"


def damage_header(folder):
    file = folder / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[8:12] = b"[[[["
    file.write_bytes(data)
    return "model.safetensors has a damaged header"


def damage_short(folder):
    (folder / "model.safetensors").write_bytes(b"abc")
    return "model.safetensors holds 3 bytes"


def damage_offsets(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes().replace(b'"shape":[16,12]', b'"shape":[16,11]', 1))
    return r"gives 768 bytes to a F32 tensor of shape \(16, 11\)"


def damage_overlap(folder):
    file = folder / "model.safetensors"
    data = file.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    spans = sorted(entry["data_offsets"] for name, entry in header.items() if name[0] != "_")
    begin, end = spans[1]
    old, new = f"[{begin},{end}]", f"[{begin - 8},{end - 8}]"
    text = data[8 : 8 + size].replace(old.encode(), new.ljust(len(old)).encode(), 1)
    file.write_bytes(data[:8] + text + data[8 + size :])
    return "model.safetensors has a damaged header .*overlaps"


def damage_appended(folder):
    with open(folder / "model.safetensors", "ab") as stream:
        stream.write(bytes(8))
    return r"model.safetensors holds \d+ bytes, but its tensors need only \d+; it is damaged"


def damage_entry(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes().replace(b'"shape":[16,12]', b'"shape":[16.,2]', 1))
    return "damaged header"


def damage_dtype(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes().replace(b'"dtype":"F32"', b'"dtype":"F99"', 1))
    return r"stores [\w.]+ as F99, which is not one of F64,"


def damage_no_weights(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    return "neither model.safetensors nor .*pytorch_model.bin.*converted to safetensors"


def damage_shard(folder):
    (folder / "model.safetensors").unlink()
    index = {"weight_map": {"a": "model-00001-of-00001.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return "model-00001-of-00001.safetensors is named in .* but missing"


def damage_index(folder):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text("{")
    return "model.safetensors.index.json is damaged"


def damage_index_values(folder):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": 5}}')
    return "index.json is damaged .*does not map tensors to files"


def damage_index_promise(folder):
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    index = {"weight_map": {"lost.weight": "model-00001-of-00001.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return "lost.weight is in model-00001-of-00001.safetensors says .*, but it is not"


def damage_no_config(folder):
    (folder / "config.json").unlink()
    return "has no config.json"


def damage_config(folder):
    (folder / "config.json").write_text("{'a'")
    return "config.json is not valid JSON"


def damage_config_folder(folder):
    (folder / "config.json").unlink()
    (folder / "config.json").mkdir()
    return "config.json is not valid JSON"


def damage_config_list(folder):
    (folder / "config.json").write_text("[]")
    return "does not hold a JSON object"


def damage_all(folder):
    shutil.rmtree(folder)
    return "is not a folder; give the local folder"


@pytest.mark.parametrize(
    "damage", [value for name, value in sorted(globals().items()) if name.startswith("damage_")]
)
def test_damaged_folders(damage, llava, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(llava[-1], folder)
    message = damage(folder)
    with pytest.raises(CheckpointError, match=message) as error:
        models.load(folder)
    # Nothing is said of tensors that may well be in a file that cannot be read.
    assert "is in no file" not in str(error.value)


def test_twice_stored_tensor(llava, tmp_path):
    _, reference, _, _, _ = llava
    reference.save_pretrained(tmp_path, max_shard_size="16KB")
    first, second = sorted(tmp_path.glob("model-*.safetensors"))[:2]
    tensors = load_file(first)
    name = next(iter(tensors))
    save_file({**load_file(second), name: tensors[name]}, second)
    with pytest.raises(CheckpointError, match=f"{name} in {second.name} is stored twice"):
        models.load(tmp_path)


def test_saving_is_whole_or_not_at_all(llava, tmp_path):
    """An existing folder is refused, replaced only on request, and untouched by a failed save."""
    _, _, model, params, folder = llava
    target = tmp_path / "model"
    models.save(target, model, params)
    (target / "note.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="exists and is not empty.*overwrite=True"):
        models.save(target, model, params)
    with pytest.raises(CheckpointError, match="holds no tokenizer"):
        models.save(target, model, params, tmp_path, overwrite=True)
    assert (target / "note.txt").read_text() == "mine"
    (target / "tokenizer.json").write_text("{}")
    (target / "chat_template.jinja").write_text("x")
    models.save(target, model, params, target, overwrite=True)
    kept = ["chat_template.jinja", "config.json", "model.safetensors", "tokenizer.json"]
    assert sorted(p.name for p in target.iterdir()) == kept
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
    same_trees(models.load(target)[1], params)


def test_saving_another_models_parameters(llava, world, tmp_path):
    _, _, model, params, _ = llava
    other = models.build(world.llama_config())
    with pytest.raises(CheckpointError, match="not those of the llama model.*embed/weight"):
        models.save(tmp_path / "x", other, params)
    wrong = jax.tree.map(lambda x: x, params)
    wrong["projector"]["linear_1"]["bias"] = np.zeros(3, np.float32)
    with pytest.raises(CheckpointError, match=r"linear_1/bias \[3\], expected \[16\]"):
        models.save(tmp_path / "x", model, wrong)
    assert not list(tmp_path.iterdir())


def test_float16_files_are_widened_exactly(llava, tmp_path):
    """A half-precision release loads into fp32 parameters without a change of value."""
    _, reference, _, _, _ = llava
    copy.deepcopy(reference).to(torch.bfloat16).save_pretrained(tmp_path)
    _, params = models.load(tmp_path)
    for path, leaf in flatten(params).items():
        leaf = np.asarray(leaf)
        assert leaf.dtype == np.float32
        np.testing.assert_array_equal(leaf, leaf.astype(ml_dtypes.bfloat16), err_msg=path)


@pytest.mark.parametrize("stored", ["bfloat16", "float16", "float32", "float64"])
@pytest.mark.parametrize("wanted", ["bfloat16", "float16", "float32"])
def test_blockwise_copies_are_numpys(stored, wanted):
    """Transposed or not, of whole blocks or not: the bits of an ordinary assignment."""
    rng = np.random.default_rng(0)
    for shape in ((130, 65), (64, 64), (1, 200), (200, 1), (3, 5, 7), (9,), (0, 4), ()):
        values = rng.normal(size=shape).astype(stored)
        for source in (values, values.T, values[::-1] if values.ndim else values):
            expected = np.empty(source.shape, wanted)
            expected[...] = source
            found = safetensors.aligned(source.shape, wanted)
            safetensors.fill(found, source)
            assert found.tobytes() == expected.tobytes() and found.dtype == wanted


def test_loaded_arrays_are_the_memory_they_were_read_into():
    host = safetensors.aligned((33, 7), "float32")
    host[...] = 1
    assert jax.device_put(host, jax.devices()[0]).unsafe_buffer_pointer() == host.ctypes.data
