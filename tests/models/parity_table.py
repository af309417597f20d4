"""Prints the parity table of docs/models.md: python tests/models/parity_table.py

Every family as a tiny random model on both sides, fp32 on the CPU: the largest difference of a
logit, the largest relative error of a tensor's gradient, and how many of 64 greedy tokens are the
same when decoded with a cache.
"""

import importlib.util
import os
import tempfile
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers


def load(name):
    path = Path(__file__).with_name(name + ".py")
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


world, vl, tiles = load("world"), load("vl_world"), load("next_world")
clips, drawings = load("test_qwen2_audio"), load("test_chameleon")
for name in ("Qwen2Audio", "Chameleon"):
    world.CLASSES[name + "ForConditionalGeneration"] = (
        getattr(transformers, name + "Config"),
        getattr(transformers, name + "ForConditionalGeneration"),
    )
NEW = 64


def text(config):
    batch = world.text_batch([9, 6], 10)
    return (
        config,
        batch,
        lambda m, **k: world.torch_logits(m, batch, **k),
        (lambda: world.torch_inputs(batch, pad_left=1)[0]),
    )


def pictures(config, batch, images):
    return (
        config,
        batch,
        lambda m, **k: world.torch_logits(m, batch, images, **k),
        (lambda: world.torch_inputs(batch, images, pad_left=1)[0]),
    )


def llava():
    config, images = world.llava_config(text=dict(max_position_embeddings=128)), [2, 1]
    return pictures(config, world.image_batch(config, [13, 9], 14, images), images)


def llava_next():
    config = tiles.config(world, text=dict(max_position_embeddings=256))
    rows = [[(9, 30)], [(12, 13), (30, 9)]]
    batch = tiles.batch(world, rows, 60)
    return (
        config,
        batch,
        lambda m, **k: tiles.torch_logits(world, m, batch, rows, **k),
        (lambda: tiles.torch_inputs(world, batch, rows, pad_left=1)[0]),
    )


def qwen_vl(generation):
    config = vl.config(world, generation, text=dict(max_position_embeddings=128))
    step = 2.0 if generation == "qwen2_5_vl" else 1.0
    rows = [[2, ("image", 1, 4, 6), 3, ("video", 2, 2, 4, step), 2], [1, ("image", 1, 2, 6), 4]]
    batch = vl.batch(config, rows, 26)

    def inputs():
        made, _, steps = vl.torch_inputs(batch, rows, pad_left=1)
        return {**made, "second_per_grid_ts": steps} if step == 2.0 else made

    return config, batch, lambda m, **k: vl.torch_logits(m, batch, rows, **k), inputs


def qwen2_audio():
    config = clips.audio_config(world, text=dict(max_position_embeddings=128))
    batch = clips.audio_batch(world, [[48, 13, 3], [20]], 24)

    def logits(model):
        inputs, real = clips.torch_audio(world, batch)
        return model(**inputs).logits[real]

    return config, batch, logits, lambda: clips.torch_audio(world, batch, pad_left=1)[0]


def chameleon():
    config, images = drawings.chameleon_config(world, max_position_embeddings=128), [2, 1]
    return pictures(config, drawings.pixel_batch(world, [38, 21], 39, images), images)


FAMILIES = {
    "Llama": lambda: text(world.llama_config(max_position_embeddings=128)),
    "Mistral, window of 4": lambda: text(world.mistral_config(max_position_embeddings=128)),
    "Qwen2, Qwen2.5": lambda: text(world.qwen2_config(max_position_embeddings=128)),
    "Qwen3": lambda: text(world.qwen3_config(max_position_embeddings=128)),
    "LLaVA-1.5": llava,
    "LLaVA-NeXT": llava_next,
    "Qwen2-VL": lambda: qwen_vl("qwen2_vl"),
    "Qwen2.5-VL": lambda: qwen_vl("qwen2_5_vl"),
    "Qwen2-Audio": qwen2_audio,
    "Chameleon, tokens of pixels": chameleon,
}


def said(model, logits):
    """Logits without image tokens: Chameleon's in transformers have the lowest number there."""
    images = getattr(model.config, "images", None)
    ids = np.asarray([] if images is None else images.token_ids, int)
    return logits.at[..., ids].set(jnp.finfo(jnp.float32).min)


def greedy(model, params, batch):
    """64 tokens per row, decoded with the cache."""
    last = batch["last_positions"][:, 0]
    rows = jnp.arange(len(last))

    @jax.jit
    def run(params, batch):
        head = model.head(params)
        hidden, cache = model.prefill(params, batch, batch["tokens"].shape[1] + NEW)
        first = jnp.argmax(said(model, hidden[rows, last] @ head.T), axis=-1).astype(jnp.int32)

        def step(carry, _):
            before, cache = carry
            hidden, cache = model.decode(params, before, cache)
            token = jnp.argmax(said(model, hidden @ head.T), axis=-1)
            return (token.astype(jnp.int32), cache), before

        return jax.lax.scan(step, (first, cache), length=NEW)[1].T

    return np.asarray(run(params, batch))


def measure(make):
    """-> (largest logit difference, largest gradient error, smallest share of equal tokens)."""
    config, batch, torch_logits, inputs = make()
    with tempfile.TemporaryDirectory() as folder:
        reference, model, params = world.pair(config, folder)
    real = world.real_mask(batch)
    labels = np.random.default_rng(9).integers(0, 40, real.shape).astype(np.int32)
    logits = lambda *args: said(model, world.logits(*args))  # noqa: E731
    out, grads = world.evaluate(model, logits)(params, batch, labels)
    expected = torch_logits(reference)
    difference = np.abs(np.asarray(out)[real] - expected.detach().numpy()).max()
    world.torch_cross_entropy(expected, labels[real].astype(np.int64)).backward()
    gradient = max(world.gradient_errors(model, grads, reference).values())
    given = inputs()
    given.pop("position_ids", None)  # generate derives them from the mask
    reference.generation_config.eos_token_id = None
    with torch.no_grad():
        theirs = reference.generate(**given, max_new_tokens=NEW, do_sample=False, pad_token_id=0)
    theirs = theirs[:, given["input_ids"].shape[1] :].numpy()
    same = (greedy(model, params, batch) == theirs).sum(1).min()
    return difference, gradient, same


def main():
    print("| family | logits, largest difference | gradients, largest relative error | greedy |")
    print("|---|---|---|---|")
    for name, make in FAMILIES.items():
        logits, gradient, same = measure(make)
        print(f"| {name} | {logits:.1e} | {gradient:.1e} | {same} of {NEW} |", flush=True)


if __name__ == "__main__":
    main()
