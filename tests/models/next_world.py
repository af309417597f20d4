"""Rows of text and images of any size for LLaVA-NeXT, as both sides read them."""

import numpy as np
import torch
import transformers

from aa_jax.data.anyres import AnyresProcessor

EDGE, PATCH = 8, 4
SIDE = EDGE // PATCH
POINTS = [[8, 16], [16, 8], [16, 16], [24, 8], [8, 24]]
ORDER = AnyresProcessor.from_dict(
    {
        "image_processor_type": "LlavaNextImageProcessor",
        "size": {"shortest_edge": EDGE},
        "crop_size": {"height": EDGE, "width": EDGE},
        "image_grid_pinpoints": POINTS,
    }
)


def config(world, text=None, mistral=False, window=None, **changes):
    """A tiny checkpoint config."""
    named = "LlavaNextForConditionalGeneration"
    world.CLASSES[named] = (transformers.LlavaNextConfig, getattr(transformers, named))
    made = world.llava_config(text=text)
    if mistral:
        made["text_config"] |= {"model_type": "mistral", "sliding_window": window}
    return {
        **made,
        "architectures": [named],
        "model_type": "llava_next",
        "image_grid_pinpoints": POINTS,
        **changes,
    }


def batch(world, rows, width, seed=0):
    """Rows of images, each given by its (height, width): text, image, text, image, ..., text."""
    orders = [[ORDER.features(*shape, SIDE) for shape in shapes] for shapes in rows]
    lengths = [2 + sum(len(order) + 1 for order in row) for row in orders]
    out = world.text_batch(lengths, width, seed=seed)
    tiles = [[ORDER.tiles(*shape) for shape in shapes] for shapes in rows]
    rng = np.random.default_rng(seed + 1)
    most = max(map(sum, tiles))
    pixels = rng.normal(size=(len(rows), most, 3, EDGE, EDGE)).astype(np.float32)
    index = np.full((len(rows), width), -1, np.int32)
    for row, (counts, places) in enumerate(zip(tiles, orders, strict=True)):
        at = done = 0
        for count, order in zip(counts, places, strict=True):
            at += 1
            out["tokens"][row, at : at + len(order)] = world.IMAGE
            index[row, at : at + len(order)] = done * (SIDE * SIDE + 1) + order
            at, done = at + len(order), done + count
        pixels[row, done:] = 0
    return {**out, "feature_index": index, "media": {"pixel_values": pixels}}


def torch_inputs(world, batch, rows, pad_left=0):
    """What transformers takes for the same rows: every image's tiles, padded to the most."""
    inputs, mask = world.torch_inputs(batch, pad_left=pad_left)
    shapes = [shape for row in rows for shape in row]
    most = max(ORDER.tiles(*shape) for shape in shapes)
    pixels = np.zeros((len(shapes), most, 3, EDGE, EDGE), np.float32)
    number = 0
    for row, images in enumerate(rows):
        at = 0
        for shape in images:
            count = ORDER.tiles(*shape)
            pixels[number, :count] = batch["media"]["pixel_values"][row, at : at + count]
            number, at = number + 1, at + count
    inputs["pixel_values"] = torch.tensor(pixels)
    inputs["image_sizes"] = torch.tensor(shapes)
    return inputs, torch.tensor(mask)


def torch_logits(world, model, batch, rows, pad_left=0):
    """Logits of the real tokens, all rows end to end [N, V], with their graph."""
    inputs, mask = torch_inputs(world, batch, rows, pad_left)
    return model(**inputs).logits[mask]
