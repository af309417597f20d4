"""LLaVA-NeXT, or LLaVA 1.6 (Liu et al., 2024): LLaVA on an image and its tiles.

An image is read whole and, larger, in tiles; every row of the tiles' patches ends with a learnt
vector. Which patch stands where depends on the image's size alone, so the data work it out
(`aa_jax.data.anyres`): here every tile gives its patches and that vector, and ``feature_index``
points at them.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from aa_jax.models.config import Reader
from aa_jax.models.layers import normal
from aa_jax.models.llava.modeling import INERT, TEXTS, Llava, LlavaConfig, read_parts

PINPOINTS = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))


@dataclasses.dataclass(frozen=True)
class LlavaNextConfig(LlavaConfig):
    """What of a LLaVA-NeXT config.json decides the model.

    Attributes:
        pinpoints: (height, width) of the canvases an image may be cut from, in pixels.
    """

    pinpoints: tuple[tuple[int, int], ...] = PINPOINTS

    @property
    def features_per_image(self) -> int:
        """Features of one tile: its patches and the end of a row."""
        return self.vision.num_patches + 1

    @classmethod
    def read(cls, reader: Reader) -> "LlavaNextConfig":
        """Takes the attributes out of ``reader``, which collects the problems."""
        parts = read_parts(reader, TEXTS, text_ties=False)
        if parts["keep_class_token"]:
            reader.problem(
                "vision_feature_select_strategy",
                "is 'full'; tiles are joined patch by patch, so only 'default' has a meaning",
            )
        if not reader.flag("use_image_newline_parameter", True):
            reader.problem("use_image_newline_parameter", "is false; only true is handled")
        edge = parts["vision"].image_size
        points = reader.get("image_grid_pinpoints", PINPOINTS)
        try:
            points = tuple((int(height), int(width)) for height, width in points)
        except (TypeError, ValueError):
            points = ()
        if not points or any(side < edge or side % edge for point in points for side in point):
            reader.problem(
                "image_grid_pinpoints",
                f"must be a list of (height, width), multiples of the tower's {edge} pixels",
            )
        config = cls(**parts, pinpoints=points)
        reader.finish(inert=INERT)
        return config


class LlavaNext(Llava):
    """The family interface of `models.functional` for images of any size and text."""

    def __init__(
        self, config: LlavaNextConfig, *, rngs: nnx.Rngs, dtype: Any, param_dtype: Any, remat: str
    ):
        super().__init__(config, rngs=rngs, dtype=dtype, param_dtype=param_dtype, remat=remat)
        dim = config.text.hidden_size
        self.image_newline = normal(rngs, (dim,), dim**-0.5, param_dtype)

    def encode_media(self, media: dict[str, Any]) -> Float[Array, "B F D"]:
        """As LLaVA's, of tiles; the last feature of every tile is the end of a row."""
        x = super().encode_media(media)
        rows, dim = x.shape[0], x.shape[-1]
        x = x.reshape(rows, -1, self.config.vision.num_patches, dim)
        end = self.image_newline[...].astype(x.dtype)
        end = jnp.broadcast_to(end[None, None, None], (*x.shape[:2], 1, dim))
        return jnp.concatenate([x, end], axis=2).reshape(rows, -1, dim)
