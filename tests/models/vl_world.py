"""Rows of text, images and videos for Qwen2-VL, as both sides read them."""

import numpy as np
import torch

from aa_jax.data.mrope import Grid, mrope_positions

IMAGE, VIDEO, START, END = 5, 6, 7, 8
MERGE = 2


def config(world, generation, text=None, vision=None, **changes):
    """A tiny checkpoint config; ``generation`` is "qwen2_vl" or "qwen2_5_vl"."""
    text = world.llama_config(
        **{
            "hidden_size": 32,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 100.0,
                "mrope_section": [2, 1, 1],
            },
            **(text or {}),
        }
    )
    text["model_type"] = generation + "_text"
    del text["architectures"]
    if generation == "qwen2_vl":
        tower = {"embed_dim": 16, "mlp_ratio": 2, "hidden_size": 32}
        name = "Qwen2VLForConditionalGeneration"
    else:
        tower = {
            "hidden_size": 16,
            "intermediate_size": 20,
            "out_hidden_size": 32,
            "window_size": 8,
            "fullatt_block_indexes": [1],
            "tokens_per_second": 2,
        }
        name = "Qwen2_5_VLForConditionalGeneration"
    shared = {"depth": 3, "num_heads": 2, "patch_size": 2, "model_type": generation + "_vision"}
    return {
        "architectures": [name],
        "model_type": generation,
        "image_token_id": IMAGE,
        "video_token_id": VIDEO,
        "vision_start_token_id": START,
        "vision_end_token_id": END,
        "text_config": text,
        "vision_config": {**shared, **tower, **(vision or {})},
        **changes,
    }


def batch(config, rows, width, seed=0, patches=None):
    """Rows of pieces: a number is so much text, ("image" | "video", frames, rows, columns[, step])
    a medium between its start and end tokens."""
    rng = np.random.default_rng(seed)
    vision = config["vision_config"]
    numbers = 3 * 2 * vision["patch_size"] ** 2
    out = {
        "tokens": np.zeros((len(rows), width), np.int32),
        "positions": np.zeros((len(rows), width, 3), np.int32),
        "intervals": np.zeros((len(rows), width, 4), np.int32),
        "feature_index": np.full((len(rows), width), -1, np.int32),
        "last_positions": np.zeros((len(rows), 1), np.int32),
    }
    grids = [[Grid(*p[1:]) for p in pieces if not isinstance(p, int)] for pieces in rows]
    most = max(sum(g.patches for g in row) for row in grids) if patches is None else patches
    items = max(max(map(len, grids)), 1)
    pixels = np.zeros((len(rows), max(most, 4), numbers), np.float32)
    table = np.zeros((len(rows), items, 3), np.int32)
    for b, pieces in enumerate(rows):
        ids, index, patch, item = [], [], 0, 0
        for piece in pieces:
            if isinstance(piece, int):
                ids += rng.integers(9, 40, piece).tolist()
                index += [-1] * piece
                continue
            grid = grids[b][item]
            count, done = grid.features(MERGE), sum(i >= 0 for i in index)
            ids += [START, *[IMAGE if piece[0] == "image" else VIDEO] * count, END]
            index += [-1, *range(done, done + count), -1]
            pixels[b, patch : patch + grid.patches] = rng.normal(size=(grid.patches, numbers))
            table[b, item] = grid.frames, grid.rows, grid.columns
            patch, item = patch + grid.patches, item + 1
        n = len(ids)
        assert n <= width, (n, width)
        out["tokens"][b, :n], out["feature_index"][b, :n] = ids, index
        out["positions"][b, :n] = mrope_positions(np.array(index), grids[b], MERGE)[0]
        out["intervals"][b, :n, 3] = np.arange(n) + 1
        out["last_positions"][b] = n - 1
    out["media"] = {"pixel_values": pixels, "grid_thw": table}
    return out


def torch_inputs(batch, rows, pad_left=0):
    """What transformers takes for the same rows; it works the positions out by itself."""
    lengths = batch["last_positions"][:, 0] + 1
    wide = batch["tokens"].shape[1] + pad_left
    ids = np.zeros((len(rows), wide), np.int64)
    mask = np.zeros((len(rows), wide), np.int64)
    parts = {"image": ([], []), "video": ([], [])}
    steps = []
    for b, (n, pieces) in enumerate(zip(lengths, rows, strict=True)):
        where = slice(wide - n, wide) if pad_left else slice(0, n)
        ids[b, where], mask[b, where] = batch["tokens"][b, :n], 1
        patch = 0
        for piece in (p for p in pieces if not isinstance(p, int)):
            grid = Grid(*piece[1:])
            pixels, table = parts[piece[0]]
            pixels.append(batch["media"]["pixel_values"][b, patch : patch + grid.patches])
            table.append([grid.frames, grid.rows, grid.columns])
            patch += grid.patches
            steps += [grid.step / 2] if piece[0] == "video" else []  # 2 tokens per second
    kinds = np.where(ids == IMAGE, 1, np.where(ids == VIDEO, 2, 0))
    inputs = {
        "input_ids": torch.tensor(ids),
        "attention_mask": torch.tensor(mask),
        "mm_token_type_ids": torch.tensor(kinds),
    }
    names = {"image": ("pixel_values", "image_grid_thw")}
    names["video"] = ("pixel_values_videos", "video_grid_thw")
    for kind, (pixels, table) in parts.items():
        if pixels:
            inputs[names[kind][0]] = torch.tensor(np.concatenate(pixels))
            inputs[names[kind][1]] = torch.tensor(table)
    return inputs, mask.astype(bool), torch.tensor(steps)


def torch_logits(model, batch, rows, pad_left=0):
    """Logits of the real tokens, all rows end to end [N, V], with their graph."""
    inputs, mask, steps = torch_inputs(batch, rows, pad_left)
    if "video_grid_thw" in inputs and model.config.model_type == "qwen2_5_vl":
        inputs["position_ids"] = model.model.get_rope_index(
            inputs["input_ids"],
            inputs["mm_token_type_ids"],
            inputs.get("image_grid_thw"),
            inputs["video_grid_thw"],
            second_per_grid_ts=steps,
            attention_mask=inputs["attention_mask"],
        )[0]
    return model(**inputs).logits[torch.tensor(mask)]
