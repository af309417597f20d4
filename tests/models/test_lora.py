"""Low-rank adapters against torch and PEFT: forward, gradients, updates, folders both ways."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import peft as hf_peft
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file
from scipy import stats

from aa_jax import models
from aa_jax.errors import AaJaxError, CheckpointError, ConfigError, ModelError
from aa_jax.models import adapt, peft
from aa_jax.models.names import flatten, unflatten
from aa_jax.training.state import frozen_paths, merge, split

# What peft does to transformers 5 is not ours to mend.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")

EVERY = [
    *("llama", "llava", "llava_next", "qwen2_5_vl", "qwen2_audio", "chameleon"),
    # Their layers are those of others in this list.
    *(pytest.param(name, marks=pytest.mark.slow) for name in ("qwen2", "qwen3", "qwen2_vl")),
]


def case(world, family):
    """(config, batch, ``torch model -> logits`` of the real tokens)."""
    if family in ("llama", "qwen2", "qwen3"):
        batch = world.text_batch([9, 6], 10)
        return getattr(world, f"{family}_config")(), batch, lambda m: world.torch_logits(m, batch)
    if family == "llava":
        config, images = world.llava_config(), [2, 1]
        batch = world.image_batch(config, [13, 9], 14, images)
        return config, batch, lambda m: world.torch_logits(m, batch, images)
    if family == "llava_next":
        tiles, rows = world.sibling("next_world"), [[(9, 30)], [(12, 13)]]
        config, batch = tiles.config(world), tiles.batch(world, rows, 32)
        return config, batch, lambda m: tiles.torch_logits(world, m, batch, rows)
    if family.endswith("vl"):
        vl = world.sibling("vl_world")
        config = vl.config(world, family)
        rows = [[2, ("image", 1, 4, 6), 3], [1, ("image", 1, 2, 6), 4]]
        batch = vl.batch(config, rows, 16)
        return config, batch, lambda m: vl.torch_logits(m, batch, rows)
    other = world.sibling(f"test_{family}")
    name = {"qwen2_audio": "Qwen2Audio", "chameleon": "Chameleon"}[family]
    cls = f"{name}ForConditionalGeneration"
    world.CLASSES[cls] = (getattr(transformers, f"{name}Config"), getattr(transformers, cls))
    if family == "chameleon":
        config = other.chameleon_config(world)
        batch = other.token_batch(world, [9, 6], 10)
        return config, batch, lambda m: world.torch_logits(m, batch)
    config = other.audio_config(world)
    batch = other.audio_batch(world, [[48, 13], [20]], 20)

    def torch_logits(m):
        inputs, mask = other.torch_audio(world, batch)
        return m(**inputs).logits[mask]

    return config, batch, torch_logits


def moved(params, seed=0, scale=0.3):
    """The parameters with every B away from zero."""
    rng = np.random.default_rng(seed)
    return unflatten(
        {
            path: jnp.asarray(scale * rng.normal(size=x.shape).astype(np.float32))
            if path.endswith("lora/b")
            else x
            for path, x in flatten(params).items()
        }
    )


def our_logits(world, model, params, batch):
    out = np.asarray(jax.jit(lambda p: world.logits(model, p, batch))(params))
    return out[world.real_mask(batch)]


def text_only(logits, family):
    """Chameleon's torch class hides image tokens behind the lowest number."""
    return logits[:, :40] if family == "chameleon" else logits


@pytest.mark.parametrize("family", EVERY)
def test_logits_of_every_family_are_pefts(family, world, tmp_path):
    """Adapters on every linear layer of every tower; the folder written here, read by peft."""
    config, batch, torch_logits = case(world, family)
    reference, model, params = world.pair(config, tmp_path / "base")
    adapted, params = adapt.attach(model, params, rank=3, alpha=5.0, targets="*")
    params = moved(params)
    linear = {n for n, m in reference.named_modules() if isinstance(m, torch.nn.Linear)}
    peft.save(tmp_path / "adapter", adapted, params, base=tmp_path / "base")
    wrapped = hf_peft.PeftModel.from_pretrained(reference, tmp_path / "adapter").eval()
    found = {n for n, m in reference.named_modules() if isinstance(m, hf_peft.tuners.lora.Linear)}
    assert found == linear - {"lm_head"}
    with torch.no_grad():
        expected = text_only(torch_logits(wrapped).numpy(), family)
    ours = text_only(our_logits(world, adapted, params, batch), family)
    np.testing.assert_allclose(ours, expected, atol=1e-4, rtol=0)
    base = text_only(our_logits(world, adapted, adapt.base(params), batch), family)
    assert np.abs(base - expected).max() > 0.1


@pytest.mark.parametrize(
    "family, rslora",
    [("llama", True), ("llava", False), pytest.param("llava", True, marks=pytest.mark.slow)],
)
def test_gradients_and_updates_are_pefts(family, rslora, world, tmp_path):
    """Four Adam updates of A and B alone, from PEFT's own initial adapter."""
    config, batch, torch_logits = case(world, family)
    reference, model, params = world.pair(config, tmp_path / "base")
    options = hf_peft.LoraConfig(
        r=4, lora_alpha=8, use_rslora=rslora, target_modules=["q_proj", "v_proj", "down_proj"]
    )
    wrapped = hf_peft.get_peft_model(reference, options)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.2, generator=torch.Generator().manual_seed(len(name)))
    wrapped.save_pretrained(tmp_path / "start")
    adapted, params = adapt.attach(model, params, path=tmp_path / "start")
    assert adapted.variant.lora.scale == pytest.approx(4.0 if rslora else 2.0)

    real = world.real_mask(batch)
    labels = np.random.default_rng(9).integers(0, 40, real.shape).astype(np.int32)
    trainable, held = split(params, frozen_paths(params, adapted.frozen))
    assert all(path.endswith(("lora/a", "lora/b")) for path in flatten(trainable))

    def loss(trainable, held):
        out = jax.nn.log_softmax(world.logits(adapted, merge(trainable, held), batch))
        picked = jnp.take_along_axis(out, labels[..., None], axis=-1)[..., 0]
        return -jnp.sum(jnp.where(real, picked, 0)) / jnp.sum(real)

    gradient = jax.jit(jax.grad(loss))
    tx = optax.adam(1e-2)
    state, update = tx.init(trainable), jax.jit(tx.update)
    theirs = [p for p in wrapped.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(theirs, lr=1e-2)
    for step in range(4):
        optimizer.zero_grad()
        world.torch_cross_entropy(torch_logits(wrapped), labels[real].astype(np.int64)).backward()
        grads = gradient(trainable, held)
        if step == 0:
            named, floor = peft_named(adapted, merge(grads, held)), 1e-3 * largest(theirs)
            wanted = {n: p.grad for n, p in wrapped.named_parameters() if p.requires_grad}
            assert len(named) == len(wanted) > 0
            for name, gradient_ in wanted.items():
                ours = named[name.replace(".default", "")]
                if gradient_ is None:  # the last layer of the tower is not read
                    assert not ours.any()
                    continue
                error = np.linalg.norm(ours - gradient_.numpy())
                error /= max(np.linalg.norm(gradient_.numpy()), floor)
                assert error < 1e-4, f"{name}: relative gradient error {error:.1e}"
        updates, state = update(grads, state, trainable)
        trainable = optax.apply_updates(trainable, updates)
        optimizer.step()
    named = peft_named(adapted, merge(trainable, held))
    for name, parameter in wrapped.named_parameters():
        if parameter.requires_grad:
            # Adam divides by the gradient's size, so an entry near 0 may differ by rounding.
            got = named[name.replace(".default", "")]
            np.testing.assert_allclose(got, parameter.detach().numpy(), atol=2e-4, rtol=0)
    with torch.no_grad():
        expected = torch_logits(wrapped).numpy()
    ours = our_logits(world, adapted, merge(trainable, held), batch)
    np.testing.assert_allclose(ours, expected, atol=2e-3, rtol=0)


def largest(parameters):
    return max(p.grad.norm().item() for p in parameters if p.grad is not None)


def peft_named(model, params):
    """Adapter leaves under PEFT's names and in its layout."""
    leaves, rules = flatten(params), peft._rules(model)
    pieces = peft._pieces(model, model.variant.lora, rules, leaves)
    return {
        name: piece.transform.to_hf(
            np.asarray(
                leaves[piece.leaf] if piece.layer is None else leaves[piece.leaf][piece.layer]
            )
        )
        for name, piece in pieces.items()
    }


def test_first_adapters_are_drawn_as_peft_draws_them(world):
    config = world.llama_config(hidden_size=64, intermediate_size=96)
    model = models.build(config)
    adapted, params = adapt.attach(model, jax.jit(model.init)(jax.random.key(0)), rank=16)
    wrapped = hf_peft.get_peft_model(
        world.torch_model(config), hf_peft.LoraConfig(r=16, target_modules="all-linear")
    )
    theirs = dict(wrapped.named_parameters())
    ours = peft_named(adapted, params)
    assert {name.replace(".default", "") for name in theirs if "lora_" in name} == ours.keys()
    for name, value in ours.items():
        other = theirs[name.replace(".weight", ".default.weight")].detach().numpy()
        assert value.shape == other.shape
        if "lora_B" in name:
            assert not value.any() and not other.any()
        else:
            assert abs(value).max() <= 1 / np.sqrt(value.shape[1])
            assert stats.ks_2samp(value.ravel(), other.ravel()).pvalue > 1e-4, name
    layers = (
        ours[next(n for n in ours if "layers.0" in n)],
        ours[next(n for n in ours if "layers.1" in n)],
    )
    assert not np.array_equal(*layers)


@pytest.mark.parametrize("full", [(), ("projector/*", "language_model/head/*")])
def test_folders_go_both_ways(full, world, tmp_path):
    """Ours -> peft -> ours is bit exact; transformers reads the merged folder."""
    config, batch, torch_logits = case(world, "llava")
    reference, model, params = world.pair(config, tmp_path / "base")
    adapted, params = adapt.attach(model, params, rank=4, full=full)
    params = moved(params)
    for path in adapted.variant.lora.full:
        node = params
        *parents, last = path.split("/")
        for key in parents:
            node = node[key]
        node[last] = 1.25 * node[last]
    expected = our_logits(world, adapted, params, batch)
    peft.save(tmp_path / "ours", adapted, params)
    wrapped = hf_peft.PeftModel.from_pretrained(reference, tmp_path / "ours").eval()
    with torch.no_grad():
        np.testing.assert_allclose(torch_logits(wrapped).numpy(), expected, atol=1e-4, rtol=0)
    wrapped.save_pretrained(tmp_path / "theirs")
    plain, start = models.load(tmp_path / "base")
    again, back = adapt.attach(plain, start, path=tmp_path / "theirs")
    assert again.variant == adapted.variant
    jax.tree.map(np.testing.assert_array_equal, back, params)
    models.save(tmp_path / "merged", adapted, params)
    merged = world.CLASSES[config["architectures"][0]][1].from_pretrained(tmp_path / "merged")
    with torch.no_grad():
        np.testing.assert_allclose(torch_logits(merged.eval()).numpy(), expected, atol=1e-4, rtol=0)
    target, dense = adapt.dense(adapted, params)
    assert target.variant == model.variant
    np.testing.assert_allclose(our_logits(world, target, dense, batch), expected, atol=1e-4, rtol=0)


def test_a_tied_head_goes_with_its_embedding(world, tmp_path):
    """peft copies every module it trains in full, so the head must be in the folder too; a folder
    whose head stayed behind is another model than a tied one."""
    config, batch = world.llama_config(tie_word_embeddings=True), world.text_batch([9, 6], 10)
    reference, model, params = world.pair(config, tmp_path / "base")
    adapted, params = adapt.attach(model, params, rank=2, targets=["q_proj"], full=["embed/*"])
    params = moved(params)
    params["embed"]["weight"] = 1.25 * params["embed"]["weight"]
    peft.save(tmp_path / "ours", adapted, params)
    wrapped = hf_peft.PeftModel.from_pretrained(reference, tmp_path / "ours").eval()
    expected = our_logits(world, adapted, params, batch)
    with torch.no_grad():
        theirs = world.torch_logits(wrapped, batch).numpy()
    np.testing.assert_allclose(theirs, expected, atol=1e-4, rtol=0)
    wrapped.save_pretrained(tmp_path / "theirs")
    plain, start = models.load(tmp_path / "base")
    again, back = adapt.attach(plain, start, path=tmp_path / "theirs")
    assert again.variant == adapted.variant
    jax.tree.map(np.testing.assert_array_equal, back, params)
    file = tmp_path / "theirs" / "adapter_model.safetensors"
    tensors, head = load_file(file), "base_model.model.lm_head.weight"
    for other in ({head: 0.8 * tensors[head]}, {}):
        save_file({k: v for k, v in tensors.items() if k != head} | other, file)
        with pytest.raises(CheckpointError, match="lm_head.weight and model.embed.* are one here"):
            adapt.attach(plain, start, path=tmp_path / "theirs")


def test_the_reference_is_the_base_on_the_same_arrays(world, tmp_path):
    config, batch, _ = case(world, "llava")
    _, model, params = world.pair(config, tmp_path)
    adapted, both = adapt.attach(model, params, rank=2)
    reference = adapt.base(moved(both))
    given, kept = flatten(params), flatten(reference)
    assert given.keys() == kept.keys()
    assert all(kept[path] is given[path] for path in given)
    added = {p: x for p, x in flatten(both).items() if p not in given}
    assert added and all(path.endswith(("lora/a", "lora/b")) for path in added)
    hidden = jax.jit(adapted.hidden_states)
    plain = jax.jit(model.hidden_states)(params, batch)
    np.testing.assert_array_equal(hidden(reference, batch), plain)
    np.testing.assert_allclose(hidden(both, batch), plain, atol=1e-6)  # B is 0 at first


def test_decoding_with_a_cache_reads_the_adapters(world, tmp_path):
    config, _, _ = case(world, "llama")
    _, model, params = world.pair(config, tmp_path)
    adapted, params = adapt.attach(model, params, rank=2)
    params, batch = moved(params), world.text_batch([8, 8], 8)
    whole = adapted.hidden_states(params, batch)
    short = {**{k: v[:, :6] for k, v in batch.items()}, "last_positions": np.full((2, 1), 5)}
    _, cache = adapted.prefill(params, short, 8)
    for at in (6, 7):
        hidden, cache = adapted.decode(params, jnp.asarray(batch["tokens"][:, at]), cache)
        np.testing.assert_allclose(hidden, whole[:, at], atol=1e-5)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"rank": 0}, ["rank is 0"]),
        ({"alpha": -1.0}, ["alpha -1"]),
        ({"dropout": 0.1}, ["dropout is 0.1", "only 0"]),
        ({"targets": ("q_prj",)}, ["'q_prj'", "q_proj", "layers/attn/q"]),
        ({"targets": ("embed/*",)}, ["'embed/*'", "no linear layer"]),
        ({"full": ("layers/attn/q/*",)}, ["layers/attn/q/kernel", "has an adapter"]),
        ({"full": ("*/bias",), "biased": True}, ["layers/attn/k/bias", "has an adapter"]),
        ({"full": ("projectr/*",)}, ["'projectr/*'"]),
    ],
)
def test_wrong_options_name_the_key(options, words, world):
    biased = options.pop("biased", False)
    model = models.build(world.llama_config(attention_bias=biased))
    with pytest.raises(ConfigError) as caught:
        adapt.attach(model, model.abstract(), **options)
    assert all(word in str(caught.value) for word in words), str(caught.value)


@pytest.fixture
def adapter(world, tmp_path):
    """(model, params, a good PEFT folder)."""
    _, model, params = world.pair(world.llama_config(), tmp_path / "base")
    wrapped = hf_peft.get_peft_model(
        world.torch_model(world.llama_config()),
        hf_peft.LoraConfig(r=2, target_modules=["q_proj"]),
    )
    wrapped.save_pretrained(tmp_path / "adapter")
    return model, params, tmp_path / "adapter"


@pytest.mark.parametrize(
    "change, words",
    [
        ({"use_dora": True}, ["use_dora = True", "merge_and_unload"]),
        ({"bias": "all"}, ["bias = 'all'"]),
        ({"init_lora_weights": "pissa_niter_4"}, ["pissa"]),
        ({"peft_type": "IA3"}, ["'IA3'"]),
        ({"r": 3}, ["has shape [2, 16]", "r = 3"]),
        ({"rank_pattern": {"q_proj": 4}}, ["rank_pattern"]),
    ],
)
def test_adapters_of_another_kind_are_refused(change, words, adapter):
    model, params, folder = adapter
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(CheckpointError) as caught:
        adapt.attach(model, params, path=folder)
    assert all(word in str(caught.value) for word in words), str(caught.value)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"rank": 4}, ["lora.rank is 4", "has 2"]),
        ({"alpha": 4.0}, ["lora.alpha is 4.0", "has 8.0"]),
        ({"targets": ("v_proj",)}, ["layers/attn/v", "layers/attn/q"]),
        ({"rslora": True}, ["lora.rslora is True"]),
        ({"full": ("norm/*",)}, ["lora.full is ('norm/scale',)"]),
    ],
)
def test_options_beside_a_folder_must_agree_with_it(options, words, adapter):
    model, params, folder = adapter
    same = {"rank": 2, "alpha": 8.0, "targets": ("q_proj",)}
    assert adapt.attach(model, params, path=folder, **same)[0].variant.lora.rank == 2
    with pytest.raises(ConfigError) as caught:
        adapt.attach(model, params, path=folder, **options)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_damaged_and_foreign_folders_are_refused(adapter, world, tmp_path):
    model, params, folder = adapter
    larger = models.build(world.llama_config(num_hidden_layers=3))
    with pytest.raises(CheckpointError, match=r"layers\.2\.self_attn\.q_proj.*missing"):
        adapt.attach(larger, larger.abstract(), path=folder)
    other = models.build(world.llama_config(num_hidden_layers=1))
    with pytest.raises(CheckpointError, match=r"layers\.1\.self_attn\.q_proj.*no layer"):
        adapt.attach(other, other.abstract(), path=folder)
    shutil.copytree(folder, tmp_path / "cut")
    weights = tmp_path / "cut" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4])
    with pytest.raises(CheckpointError, match="truncated"):
        adapt.attach(model, params, path=tmp_path / "cut")
    with pytest.raises(CheckpointError, match="adapter_config.json"):
        adapt.attach(model, params, path=tmp_path / "nothing")
    adapted, both = adapt.attach(model, params, targets=("v_proj",), full=("layers/attn/q/*",))
    peft.save(tmp_path / "whole", adapted, both)
    few_bits = models.build(world.llama_config(), quantize={})
    with pytest.raises(CheckpointError, match="layers/attn/q/kernel, whose layer is quantised"):
        adapt.attach(few_bits, few_bits.abstract(), path=tmp_path / "whole")
    with pytest.raises(ModelError, match="no adapters"):
        peft.save(tmp_path / "new", model, params)
    adapted, both = adapt.attach(model, params)
    with pytest.raises(CheckpointError, match="not empty"):
        peft.save(folder, adapted, both)
    with pytest.raises(AaJaxError, match="already"):
        adapt.attach(adapted, both)
    with pytest.raises(ModelError, match="unknown"):
        model.hidden_states(both, world.text_batch([3], 4))
