"""The starting point of the digits world: a small LLaVA whose vision tower already sees digits.

LLaVA starts from a CLIP tower that was pre-trained on images. Nothing can be downloaded here, so
the small tower gets the same head start from the world itself: a linear probe on its patch features
must name the digit in every cell (training images only). After this the tower is frozen, as in
LLaVA-1.5's instruction tuning, and projector and language model start at random.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from aa_jax import models
from aa_jax.data.digits import load_digits, vocabulary, write_processor
from aa_jax.data.digits.images import CELL
from aa_jax.data.digits.scenes import sample_scene
from aa_jax.data.processor import Processor
from aa_jax.losses.base import Ratio
from aa_jax.training.loop import fit
from aa_jax.training.optim import make_optimizer
from aa_jax.training.state import init_state
from aa_jax.training.step import make_step

EMPTY = 10  # class of a cell without a digit


def llava_config(
    max_digits: int,
    *,
    vision_dim: int = 64,
    vision_layers: int = 3,
    vision_heads: int = 4,
    dim: int = 96,
    layers: int = 3,
    heads: int = 4,
    kv_heads: int = 4,
    mlp_dim: int = 256,
    max_length: int = 512,
) -> dict[str, Any]:
    """config.json of a small LLaVA for the digits world; the architecture is LLaVA-1.5's.

    Args:
      max_digits: the canvas is `max_digits` cells of 8 x 8 pixels per side, one patch each.
      vision_dim: width of the CLIP tower.
      vision_layers: its depth; as in LLaVA-1.5 the last layer is not used.
      vision_heads: its attention heads.
      dim: width of the language model.
      layers: its depth.
      heads: its attention heads.
      kv_heads: its key/value heads.
      mlp_dim: width of its SwiGLU.
      max_length: longest sequence in tokens.
    """
    words = vocabulary()
    special = {word: index for index, word in enumerate(words)}
    return {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "image_token_index": special["<image>"],
        "image_seq_length": max_digits**2,
        "projector_hidden_act": "gelu",
        "multimodal_projector_bias": True,
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
        "tie_word_embeddings": False,
        "vision_config": {
            "model_type": "clip_vision_model",
            "hidden_size": vision_dim,
            "intermediate_size": 4 * vision_dim,
            "num_hidden_layers": vision_layers,
            "num_attention_heads": vision_heads,
            "num_channels": 3,
            "image_size": CELL * max_digits,
            "patch_size": CELL,
            "hidden_act": "quick_gelu",
            "layer_norm_eps": 1e-5,
            "projection_dim": vision_dim,
        },
        "text_config": {
            "model_type": "llama",
            "architectures": ["LlamaForCausalLM"],
            "vocab_size": len(words),
            "hidden_size": dim,
            "intermediate_size": mlp_dim,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "max_position_embeddings": max_length,
            "rms_norm_eps": 1e-5,
            "hidden_act": "silu",
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
            "attention_bias": False,
            "mlp_bias": False,
            "tie_word_embeddings": False,
            "bos_token_id": special["<s>"],
            "eos_token_id": special["</s>"],
            "pad_token_id": special["<pad>"],
        },
    }


class StripBatches:
    """Endless batches of digit strips with the class of every cell; batch i depends on i only."""

    def __init__(self, processor: Processor, max_digits: int, split: str, rows: int, seed: int):
        self.processor, self.max_digits = processor, max_digits
        self.split, self.rows, self.seed, self.position = split, rows, seed, 0

    def __next__(self) -> dict[str, Any]:
        rng = np.random.default_rng((31, self.seed, self.position))
        self.position += 1
        labels = np.full((self.rows, self.max_digits, self.max_digits), EMPTY, np.int32)
        images = []
        middle = (self.max_digits - 1) // 2
        for row in range(self.rows):
            digits, scene = sample_scene(self.split, rng, self.max_digits)
            labels[row, middle, : len(digits)] = digits
            images.append(scene.render())
        pixels = np.stack([self.processor.pixels(image) for image in images])[:, None]
        return {
            "media": {"pixel_values": pixels},
            "labels": labels.reshape(self.rows, -1),
            "sequence_mask": np.ones((self.rows, 1), np.float32),
        }

    def get_state(self) -> dict[str, int]:
        """Number of batches drawn."""
        return {"position": self.position}

    def set_state(self, state: Mapping[str, int]) -> None:
        """Continues after that many batches."""
        self.position = state["position"]


def probe_objective(model: models.Model):
    """Cross entropy of a linear probe that names the digit in every cell of the image."""

    def objective(params, batch):
        features = model.tower_features(params["model"], batch["media"])[:, 0]
        logits = features.astype(jnp.float32) @ params["probe"]["kernel"]
        logps = jax.nn.log_softmax(logits, axis=-1)
        picked = jnp.take_along_axis(logps, batch["labels"][..., None], axis=-1)[..., 0]
        weight = jnp.broadcast_to(batch["sequence_mask"], picked.shape)
        digit = weight * (batch["labels"] != EMPTY)
        right = (jnp.argmax(logits, axis=-1) == batch["labels"]).astype(jnp.float32)
        metrics = {
            "loss": Ratio(-jnp.sum(picked * weight), jnp.sum(weight)),
            "digit_accuracy": Ratio(jnp.sum(right * digit), jnp.sum(digit)),
        }
        return metrics["loss"].mean, metrics

    return objective


def pretrain_tower(
    folder: Path,
    *,
    workdir: Path,
    mesh: jax.sharding.Mesh,
    max_digits: int,
    seed: int,
    model: Mapping[str, Any],
    steps: int = 400,
    batch_rows: int = 128,
    lr: float = 3e-3,
) -> dict[str, Any]:
    """Writes a checkpoint folder: processor, config and weights with a trained tower.

    Args:
      folder: where the Hugging Face checkpoint goes.
      workdir: run directory, for metrics and training checkpoints.
      mesh: device mesh.
      max_digits: digits per strip, see `llava_config`.
      seed: of the initial weights and the strips.
      model: keyword arguments of `llava_config`.
      steps: updates of tower and probe.
      batch_rows: strips per update.
      lr: peak learning rate.

    Returns:
      `parameters` (of the whole model) and `digit_accuracy` of the probe on validation images.
    """
    files = folder.with_name(folder.name + "_processor")
    write_processor(files, max_digits=max_digits, patch=CELL)
    processor_ = Processor.from_pretrained(files)
    llava = models.build(llava_config(max_digits, **model))
    key, probe_key = jax.random.split(jax.random.key(seed))
    weights = llava.init(key)
    width = llava.hf_config["vision_config"]["hidden_size"]
    probe = 0.02 * jax.random.normal(probe_key, (width, EMPTY + 1), jnp.float32)
    params = {"model": weights, "probe": {"kernel": probe}}
    frozen = ("model/projector/*", "model/language_model/*")
    tx, schedule = make_optimizer(lr, steps, weight_decay=0.05)
    objective = probe_objective(llava)
    state = fit(
        step=make_step(objective, tx, mesh=mesh, schedule=schedule, frozen=frozen),
        state=init_state(params, tx, mesh=mesh, frozen=frozen, seed=seed),
        batches=StripBatches(processor_, max_digits, "train", batch_rows, seed),
        total_steps=steps,
        workdir=workdir,
        stage="tower",
        log_every=10,
    )
    held_out = StripBatches(processor_, max_digits, "validation", 512, seed)
    _, metrics = jax.jit(objective)(state["params"], next(held_out))
    models.save(folder, llava, state["params"]["model"], extra_files_from=files, overwrite=True)
    return {
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(weights)),
        "train_images": len(load_digits().split("train")),
        "digit_accuracy": float(metrics["digit_accuracy"].mean),
    }
