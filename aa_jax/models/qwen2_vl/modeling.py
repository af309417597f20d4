"""Qwen2-VL and Qwen2.5-VL: a tower for any resolution, a merger, and a decoder with M-RoPE."""

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from aa_jax.models.decoder import Decoder
from aa_jax.models.multimodal import Multimodal
from aa_jax.models.qwen2_vl.config import Qwen2VLConfig
from aa_jax.models.qwen2_vl.vision import Merger, VisionTower


class Qwen2VL(Multimodal):
    """The family interface of `models.functional` for images, videos and text.

    `media` holds "pixel_values" [B, P, K], a row's patches end to end in the order of its items,
    and "grid_thw" [B, I, 3]; the batch's positions are [B, T, 3].
    """

    tower = "vision_tower"

    def __init__(
        self, config: Qwen2VLConfig, *, rngs: nnx.Rngs, dtype: Any, param_dtype: Any, remat: str
    ):
        kwargs = dict(rngs=rngs, dtype=dtype, param_dtype=param_dtype, remat=remat)
        self.vision_tower = VisionTower(config.vision, **kwargs)
        self.projector = Merger(config.vision, rngs=rngs, param_dtype=param_dtype)
        self.language_model = Decoder(config.text, **kwargs)
        self.config, self.dtype = config, dtype

    def tower_features(self, media: dict[str, Any]) -> Float[Array, "B P Dv"]:
        """What the merger reads, one vector per patch."""
        return self.vision_tower(media["pixel_values"], media["grid_thw"])

    def encode_media(self, media: dict[str, Any]) -> Float[Array, "B F D"]:
        """Tower and merger; "tower_features" [B,P,Dv] in media stands for the tower's run."""
        if "tower_features" in media:
            x = media["tower_features"].astype(self.dtype)
            # Whole features, also of padding.
            more = -x.shape[1] % self.config.vision.merge_size**2
            return self.projector(jnp.pad(x, ((0, 0), (0, more), (0, 0))))
        return self.projector(self.tower_features(media))
