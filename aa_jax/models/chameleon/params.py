"""Chameleon's name map: the decoder's own, and the image tokenizer's under `model.vqmodel`."""

from aa_jax.models.chameleon import vq_params
from aa_jax.models.chameleon.modeling import ChameleonConfig
from aa_jax.models.decoder_names import decoder_names
from aa_jax.models.names import Names


def names(config: ChameleonConfig) -> Names:
    """The whole model's map."""
    decoder = decoder_names(config.text).under("", "language_model/")
    tokenizer = vq_params.names(config.vq).under("model.vqmodel.", "vq/")
    return Names(
        rules=tokenizer.rules + decoder.rules,
        # Some checkpoints also hold the tokenizer's decoder, which transformers' class has not:
        # `load_tokenizer` reads it from the same folder.
        buffers=(*decoder.buffers, r"model\.vqmodel\.decoder\..*"),
        tied=decoder.tied,
    )
