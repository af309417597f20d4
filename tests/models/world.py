"""Small random transformers models, the batches both sides read, and their comparison."""

import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers

from aa_jax import models
from aa_jax.models.names import flatten

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
torch.set_num_threads(1)


def sibling(name):
    """Another file of this folder, which is not a package."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


IMAGE = 5  # the placeholder token
PAD = 0

CLASSES = {
    "LlamaForCausalLM": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
    "MistralForCausalLM": (transformers.MistralConfig, transformers.MistralForCausalLM),
    "Qwen2ForCausalLM": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
    "Qwen3ForCausalLM": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
    "Qwen2VLForConditionalGeneration": (
        transformers.Qwen2VLConfig,
        transformers.Qwen2VLForConditionalGeneration,
    ),
    "Qwen2_5_VLForConditionalGeneration": (
        transformers.Qwen2_5_VLConfig,
        transformers.Qwen2_5_VLForConditionalGeneration,
    ),
    "LlavaForConditionalGeneration": (
        transformers.LlavaConfig,
        transformers.LlavaForConditionalGeneration,
    ),
}


def llama_config(**changes):
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 40,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        **changes,
    }


def mistral_config(**changes):
    named = {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": 4}
    return llama_config(**{**named, **changes})


def qwen2_config(**changes):
    return llama_config(**{"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", **changes})


def qwen3_config(**changes):
    named = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "head_dim": 6}
    return llama_config(**{**named, **changes})


def llava_config(text=None, vision=None, **changes):
    text = llama_config(**(text or {}))
    text.pop("architectures")
    return {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "image_token_index": IMAGE,
        "text_config": text,
        "vision_config": {
            "model_type": "clip_vision_model",
            "hidden_size": 12,
            "intermediate_size": 20,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "image_size": 8,
            "patch_size": 4,
            **(vision or {}),
        },
        **changes,
    }


def torch_model(config, seed=0):
    """A transformers model whose every parameter is random: norms and biases too."""
    make_config, make = CLASSES[config["architectures"][0]]
    kwargs = {k: v for k, v in config.items() if k not in ("architectures", "model_type")}
    model = make(make_config(**kwargs)).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            norm = "norm" in name and name.endswith("weight")
            parameter.copy_(1 + 0.2 * noise if norm else 0.25 * noise)
    return model


def pair(config, folder, seed=0, **build_kwargs):
    """The same weights on both sides: (transformers model, our model, our parameters)."""
    reference = torch_model(config, seed)
    reference.save_pretrained(folder)
    return reference, *models.load(folder, **build_kwargs)


def text_batch(lengths, width, vocab=40, seed=0):
    """Right-padded rows of random tokens without the placeholder."""
    rng = np.random.default_rng(seed)
    rows = len(lengths)
    real = np.arange(width)[None, :] < np.asarray(lengths)[:, None]
    tokens = np.where(real, rng.integers(IMAGE + 1, vocab, (rows, width)), PAD).astype(np.int32)
    steps = np.broadcast_to(np.arange(width, dtype=np.int32), (rows, width))
    intervals = np.zeros((rows, width, 4), np.int32)
    intervals[..., 3] = np.where(real, steps + 1, 0)
    return {
        "tokens": tokens,
        "positions": np.where(real, steps, 0).astype(np.int32),
        "intervals": intervals,
        "last_positions": np.asarray(lengths, np.int32)[:, None] - 1,
    }


def image_batch(config, lengths, width, images, seed=0):
    """As `text_batch` with ``images[b]`` images in row b; the last rows' slots stay zero."""
    batch = text_batch(lengths, width, seed=seed)
    vision = config["vision_config"]
    size = vision["image_size"]
    full = config.get("vision_feature_select_strategy", "default") == "full"
    num = (size // vision["patch_size"]) ** 2 + full
    rng = np.random.default_rng(seed + 1)
    rows, most = len(lengths), max(images)
    pixels = rng.normal(size=(rows, most, 3, size, size)).astype(np.float32)
    index = np.full((rows, width), -1, np.int32)
    for row, count in enumerate(images):
        pixels[row, count:] = 0
        for image in range(count):
            start = 1 + image * (num + 1)  # a text token between two images
            assert start + num < lengths[row]
            batch["tokens"][row, start : start + num] = IMAGE
            index[row, start : start + num] = image * num + np.arange(num)
    return {**batch, "feature_index": index, "media": {"pixel_values": pixels}}


def real_mask(batch):
    return batch["intervals"][..., 3] > 0


def torch_inputs(batch, images=None, pad_left=0):
    """What the transformers model takes for the same rows; optionally padded on the left."""
    real = real_mask(batch)
    rows, width = real.shape
    lengths = real.sum(1)
    wide = width + pad_left
    ids = np.full((rows, wide), PAD)
    mask = np.zeros((rows, wide), np.int64)
    positions = np.zeros((rows, wide), np.int64)
    for row, n in enumerate(lengths):
        where = slice(wide - n, wide) if pad_left else slice(0, n)
        ids[row, where], mask[row, where] = batch["tokens"][row, :n], 1
        positions[row, where] = np.arange(n)
    inputs = {
        "input_ids": torch.tensor(ids),
        "attention_mask": torch.tensor(mask),
        "position_ids": torch.tensor(positions),
    }
    if images is not None:
        pixels = batch["media"]["pixel_values"]
        stacked = np.concatenate([pixels[row, :count] for row, count in enumerate(images)])
        inputs["pixel_values"] = torch.tensor(stacked)
    return inputs, mask.astype(bool)


def torch_logits(model, batch, images=None, pad_left=0):
    """Logits of the real tokens, all rows end to end [N, V], with their graph."""
    inputs, mask = torch_inputs(batch, images, pad_left)
    return model(**inputs).logits[torch.tensor(mask)]


def logits(model, params, batch):
    hidden = model.hidden_states(params, batch)
    return jnp.einsum("btd,vd->btv", hidden, model.head(params))


def torch_cross_entropy(logits, labels):
    return torch.nn.functional.cross_entropy(logits, torch.tensor(labels))


def evaluate(model, logits=logits):
    """jitted ``(params, batch, labels [B,T]) -> (logits, gradients)``, loss over real tokens."""

    def loss(params, batch, labels):
        out = logits(model, params, batch)
        real = real_mask(batch)
        picked = jnp.take_along_axis(jax.nn.log_softmax(out), labels[..., None], axis=-1)[..., 0]
        return -jnp.sum(jnp.where(real, picked, 0)) / jnp.sum(real), out

    def run(params, batch, labels):
        (_, out), grads = jax.value_and_grad(loss, has_aux=True)(params, batch, labels)
        return out, grads

    return jax.jit(run)


def hf_named(model, params):
    """Our tree under the checkpoint's tensor names and layout."""
    leaves = flatten(params)
    named = {}
    for path, rule in model.names.for_leaves(leaves).items():
        leaf = np.asarray(leaves[path])
        layers = leaf if rule.stacked else [leaf]
        for name, layer in zip(rule.hf_names(leaf.shape), layers, strict=True):
            named[name] = rule.transform.to_hf(layer)
    return named


def gradient_errors(model, grads, reference):
    """Error of every tensor's gradient relative to the reference's norm; unused ones must be 0.

    A key bias without rotary positions shifts all scores of a query alike, so its gradient is 0
    up to rounding on both sides; the floor on the norm keeps that noise from being compared.
    """
    ours = hf_named(model, grads)
    norms = [p.grad.norm().item() for p in reference.parameters() if p.grad is not None]
    floor = 1e-3 * max(norms)
    errors = {}
    for name, parameter in reference.named_parameters():
        name = model.names.canonical(name)
        if parameter.grad is None:
            assert not np.any(ours[name]), f"{name} has a gradient, torch has none"
            errors[name] = 0.0
            continue
        theirs = parameter.grad.numpy()
        errors[name] = np.linalg.norm(ours[name] - theirs) / max(np.linalg.norm(theirs), floor)
    assert errors.keys() == ours.keys()
    return errors


def assert_same_gradients(model, grads, reference, most=1e-4):
    """Every tensor's gradient is the reference's."""
    for name, error in gradient_errors(model, grads, reference).items():
        assert error <= most, f"{name}: relative gradient error {error:.2e}"


def assert_parity(config, folder, batch, images=None):
    """Logits <= 1e-4 and gradients <= 1e-4 relative, against the transformers model."""
    reference, model, params = pair(config, folder)
    real = real_mask(batch)
    labels = np.random.default_rng(9).integers(0, 40, real.shape).astype(np.int32)
    out, grads = evaluate(model)(params, batch, labels)
    expected = torch_logits(reference, batch, images)
    np.testing.assert_allclose(np.asarray(out)[real], expected.detach().numpy(), atol=1e-4, rtol=0)
    torch_cross_entropy(expected, labels[real].astype(np.int64)).backward()
    assert_same_gradients(model, grads, reference)
    with torch.no_grad():
        left = torch_logits(reference, batch, images, pad_left=3)
    np.testing.assert_allclose(np.asarray(out)[real], left.numpy(), atol=1e-4, rtol=0)
