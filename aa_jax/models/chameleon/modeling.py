"""Chameleon (Chameleon Team, 2024): one decoder over text tokens and image tokens.

An image is tokens of the vocabulary like any other, so a row with images is a plain row: made
ahead of time with the image tokenizer it packs, shares prefixes, trains on images as answers and
scores them like text. The pixel path of transformers (pixels to tokens to embeddings inside the
forward pass, put where placeholders stand) is `encode_media`.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from aa_jax.errors import ModelError
from aa_jax.models.chameleon.vocabulary import ImageVocabulary
from aa_jax.models.chameleon.vq import VQ, VQConfig
from aa_jax.models.config import Reader
from aa_jax.models.decoder import Decoder, DecoderConfig, Defaults, read_sizes
from aa_jax.models.multimodal import Multimodal

DEFAULTS = Defaults(
    vocab_size=65536,
    hidden_size=4096,
    intermediate_size=11008,
    num_kv_heads=32,
    max_positions=4096,
    norm_eps=1e-5,
)


@dataclasses.dataclass(frozen=True)
class ChameleonConfig:
    """What of a Chameleon config.json decides the model.

    Attributes:
        text: the decoder: per-head LayerNorm of queries and keys, and norms after the branches
            where `swin_norm` is set (34B).
        vq: the image tokenizer.
        images: which tokens are pieces of images.
    """

    text: DecoderConfig
    vq: VQConfig
    images: ImageVocabulary

    @classmethod
    def read(cls, reader: Reader) -> "ChameleonConfig":
        """Takes the attributes out of ``reader``, which collects the problems."""
        sizes = read_sizes(reader, DEFAULTS)
        if sizes["head_dim"] * sizes["num_heads"] != sizes["hidden_size"]:
            reader.problem(
                "hidden_size",
                f"= {sizes['hidden_size']} is not {sizes['num_heads']} heads of one size",
            )
        bias = reader.flag("attention_bias", False)
        text = DecoderConfig(
            **sizes,
            qkv_bias=bias,
            out_bias=bias,
            mlp_bias=reader.flag("mlp_bias", False),
            qk_norm="layer",
            post_norm=reader.flag("swin_norm", False),
        )
        vq = VQConfig.read(reader.section("vq_config"))
        images = ImageVocabulary.read(reader, text.vocab_size, vq.num_embeddings)
        # How the published training was split; the norms are stored per head either way.
        reader.finish(inert=("model_parallel_size", "pretraining_tp"))
        return cls(text=text, vq=vq, images=images)

    @property
    def features_per_image(self) -> int:
        """Tokens between an image's begin and end tokens."""
        return self.vq.tokens_per_image


class Chameleon(Multimodal):
    """The family interface of `models.functional` for text and images, both in and out."""

    def __init__(
        self, config: ChameleonConfig, *, rngs: nnx.Rngs, dtype: Any, param_dtype: Any, remat: str
    ):
        kwargs = dict(rngs=rngs, param_dtype=param_dtype)
        self.vq = VQ(config.vq, decoder=False, **kwargs)
        self.language_model = Decoder(config.text, dtype=dtype, remat=remat, **kwargs)
        self.config, self.dtype = config, dtype

    def head_weight(self) -> Float[Array, "V D"]:
        """The output head, one row per token, image tokens included.

        transformers overwrites the logits of image tokens with the lowest number, so that its
        Chameleon never writes images; here that is a choice of the sampler
        (`aa_jax.sampling.constraints`), because a model that is trained on images needs them.
        """
        return self.language_model.head_weight()

    def image_tokens(self, pixels: Float[Array, "B I C H W"]) -> Int[Array, "B I P"]:
        """Vocabulary tokens of images, row by row, without begin and end."""
        table = self.config.images.code_tokens
        if not table:
            raise ModelError(
                "config.json's vocabulary_map does not name a token for each of the "
                f"{self.config.vq.num_embeddings} codes (IMGIMGAZ for code 0, IMGIMGBZ for 1, "
                "...), so images cannot become tokens; take the map from the checkpoint's origin."
            )
        rows, images = pixels.shape[:2]
        codes = self.vq.encode(pixels.reshape(rows * images, *pixels.shape[2:]))
        tokens = jnp.asarray(np.asarray(table, np.int32))[codes]
        return tokens.reshape(rows, images, -1)

    def tower_features(self, media: dict[str, Any]) -> Float[Array, "B I P 1"]:
        """What the embedding reads: the token of each patch, a whole number held in fp32."""
        return self.image_tokens(media["pixel_values"])[..., None].astype(jnp.float32)

    def encode_media(self, media: dict[str, Any]) -> Float[Array, "B F D"]:
        """Embeddings of the images' tokens; "tower_features" in media stands for the tokenizer."""
        tokens = (
            media["tower_features"] if "tower_features" in media else self.tower_features(media)
        )
        x = self.language_model.embed(tokens[..., 0].astype(jnp.int32), self.dtype)
        return x.reshape(x.shape[0], -1, x.shape[-1])
