"""LLaVA 1.5 (Liu et al., 2023): a CLIP tower, a two-layer projector and a decoder."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from aa_jax.models.clip.modeling import ClipVision, ClipVisionConfig
from aa_jax.models.config import Reader
from aa_jax.models.layers import ACTIVATIONS, Linear
from aa_jax.models.llama.modeling import Llama, LlamaConfig, MistralConfig
from aa_jax.models.multimodal import Multimodal

VISION = ("clip_vision_model",)
# Decoders by model_type; the first is what an absent model_type means.
TEXTS: dict[str, type[LlamaConfig]] = {"llama": LlamaConfig, "mistral": MistralConfig}


@dataclasses.dataclass(frozen=True)
class LlavaConfig:
    """What of a LLaVA config.json decides the model.

    Attributes:
        feature_layers: hidden states of the tower that are concatenated, as indices >= 0
            (0 = the input of its first layer).
        keep_class_token: True for `vision_feature_select_strategy` "full".
        image_token_id: the placeholder token that stands for one feature.
    """

    text: LlamaConfig
    vision: ClipVisionConfig
    feature_layers: tuple[int, ...]
    keep_class_token: bool
    projector_bias: bool
    projector_act: str
    image_token_id: int

    @property
    def features_per_image(self) -> int:
        """Features, and so placeholder tokens, of one image."""
        return self.vision.num_patches + int(self.keep_class_token)

    @classmethod
    def read(cls, reader: Reader) -> "LlavaConfig":
        """Takes the attributes out of ``reader``, which collects the problems."""
        config = cls(**read_parts(reader, TEXTS))
        reader.finish(inert=INERT)
        return config


# image_seq_length restates what tower and strategy imply; ignore_index is the loss's.
INERT = ("image_seq_length", "ignore_index", "vocab_size")


def read_parts(
    reader: Reader, texts: dict[str, type[LlamaConfig]], *, text_ties: bool = True
) -> dict[str, Any]:
    """The attributes that models of a CLIP tower, this projector and a decoder share.

    Args:
        reader: of config.json; collects the problems.
        texts: config classes of the decoders handled, by model_type; the first is the default.
        text_ties: whether the text config's flag ties the head as the whole config's does.
    """
    kinds = {}
    for name, known in {"text_config": tuple(texts), "vision_config": VISION}.items():
        sub = reader.get(name, {})
        kind = sub.get("model_type", known[0]) if isinstance(sub, dict) else known[0]
        if kind not in known:
            reader.problem(name, f"is of model_type {kind!r}; handled: {', '.join(known)}")
            kind = known[0]
        kinds[name] = kind
    text = texts[kinds["text_config"]].read(reader.section("text_config"))
    vision = ClipVisionConfig.read(_with_tower_defaults(reader))
    # transformers copies the text config's flag upwards, but not in every family.
    tied = reader.flag("tie_word_embeddings", False) or (text_ties and text.tied)
    layers = reader.get("vision_feature_layer", -2)
    many = isinstance(layers, list | tuple)
    if many and not layers:
        reader.problem(
            "vision_feature_layer", "is an empty list; it must name a layer of the tower"
        )
    strategy = reader.choice("vision_feature_select_strategy", "default", ("default", "full"))
    feature_layers = []
    for layer in layers if many else (layers,):
        index = layer + vision.num_layers + 1 if isinstance(layer, int) and layer < 0 else layer
        if type(layer) is not int or not 0 <= index <= vision.num_layers:
            reader.problem(
                "vision_feature_layer",
                f"names {layer!r}, but the tower has {vision.num_layers} layers",
            )
            index = 0
        feature_layers.append(index)
    return dict(
        text=dataclasses.replace(text, tied=tied),
        vision=vision,
        feature_layers=tuple(feature_layers),
        keep_class_token=strategy == "full",
        projector_bias=reader.flag("multimodal_projector_bias", True),
        projector_act=reader.activation("projector_hidden_act", "gelu"),
        image_token_id=_image_token(reader, text.vocab_size),
    )


def _with_tower_defaults(reader: Reader) -> Reader:
    """An absent vision_config means CLIP ViT-L/14 at 336 pixels, as in transformers."""
    section = reader.section("vision_config")
    if reader.raw.get("vision_config") is None:
        section.raw = dict(
            intermediate_size=4096,
            hidden_size=1024,
            patch_size=14,
            image_size=336,
            num_hidden_layers=24,
            num_attention_heads=16,
        )
    return section


def _image_token(reader: Reader, vocab_size: int) -> int:
    old, new = reader.get("image_token_index", None), reader.get("image_token_id", None)
    if old is not None and new is not None and old != new:
        reader.problem("image_token_id", f"is {new}, but image_token_index is {old}")
    name = "image_token_id" if old is None else "image_token_index"
    return reader.token(name, 32000, vocab_size)


class Projector(nnx.Module):
    """``linear_2(act(linear_1(x)))`` from the tower's width to the decoder's."""

    def __init__(self, config: LlavaConfig, *, rngs: nnx.Rngs, param_dtype: Any):
        kwargs = dict(
            bias=config.projector_bias,
            std=config.text.initializer_range,
            rngs=rngs,
            param_dtype=param_dtype,
        )
        dim = config.text.hidden_size
        self.linear_1 = Linear(
            config.vision.hidden_size * len(config.feature_layers), dim, **kwargs
        )
        self.linear_2 = Linear(dim, dim, **kwargs)
        self.act = ACTIVATIONS[config.projector_act]

    def __call__(self, x: Float[Array, "*batch Dv"]) -> Float[Array, "*batch D"]:
        return self.linear_2(self.act(self.linear_1(x)))


class Llava(Multimodal):
    """The family interface of `models.functional` for images and text."""

    tower = "vision_tower"

    def __init__(
        self, config: LlavaConfig, *, rngs: nnx.Rngs, dtype: Any, param_dtype: Any, remat: str
    ):
        kwargs = dict(rngs=rngs, dtype=dtype, param_dtype=param_dtype, remat=remat)
        self.vision_tower = ClipVision(config.vision, **kwargs)
        self.projector = Projector(config, rngs=rngs, param_dtype=param_dtype)
        self.language_model = Llama(config.text, **kwargs)
        self.config, self.dtype = config, dtype

    def tower_features(self, media: dict[str, Any]) -> Float[Array, "B I P Dv"]:
        """What the projector reads, one row of P vectors per image."""
        pixels = media["pixel_values"]
        rows, images = pixels.shape[:2]
        flat = pixels.reshape(rows * images, *pixels.shape[2:])
        states = self.vision_tower(flat, self.config.feature_layers)
        if not self.config.keep_class_token:
            states = [state[:, 1:] for state in states]
        x = states[0] if len(states) == 1 else jnp.concatenate(states, axis=-1)
        return x.reshape(rows, images, *x.shape[1:])

    def encode_media(self, media: dict[str, Any]) -> Float[Array, "B F D"]:
        """Tower and projector; "tower_features" [B,I,P,Dv] in media stands for the tower's run."""
        if "tower_features" in media:
            x = media["tower_features"].astype(self.dtype)
        else:
            x = self.tower_features(media)
        x = self.projector(x)
        return x.reshape(x.shape[0], -1, x.shape[-1])
