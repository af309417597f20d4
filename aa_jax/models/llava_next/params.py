"""LLaVA-NeXT's name map: LLaVA's, and the vector that ends a row of patches."""

import dataclasses

from aa_jax.models.llava import params as llava
from aa_jax.models.llava_next.modeling import LlavaNextConfig
from aa_jax.models.names import SAME, Names, Rule


def names(config: LlavaNextConfig) -> Names:
    """The whole model's map."""
    base = llava.names(config)
    return dataclasses.replace(
        base,
        rules=(Rule("image_newline", "image_newline", SAME, ("embed",)), *base.rules),
        layouts=((r"model\.image_newline", "image_newline"), *base.layouts),
        modules=((r"image_newline", "model.image_newline"), *base.modules),
    )
