"""Qwen2-Audio's name map: the parts' own maps under its roots, and the layouts seen on disk."""

from aa_jax.models.decoder_names import decoder_names
from aa_jax.models.names import SAME, TRANSPOSE, Names, Rule
from aa_jax.models.qwen2_audio.modeling import Qwen2AudioConfig
from aa_jax.models.whisper import params as whisper

PROJECTOR = (
    Rule("linear.weight", "kernel", TRANSPOSE, ("vision_embed", "embed")),
    Rule("linear.bias", "bias", SAME, (None,)),
)

# From the layouts transformers has written over the years to the one written here, which all its
# versions read: (regular expression at the start of the name, replacement), applied in order.
LAYOUTS = (
    (r"model\.language_model\.", "language_model.model."),
    (r"lm_head\.", "language_model.lm_head."),
    (r"model\.(audio_tower|multi_modal_projector)\.", r"\1."),
)

# From the names written here to those of transformers' modules in memory; the first match counts.
MODULES = (
    (r"language_model\.model\.", "model.language_model."),
    (r"language_model\.lm_head\.", "lm_head."),
    (r"(audio_tower|multi_modal_projector)\.", r"model.\1."),
)


def names(config: Qwen2AudioConfig) -> Names:
    """The whole model's map."""
    tower = whisper.NAMES.under("audio_tower.", "audio_tower/")
    decoder = decoder_names(config.text).under("language_model.", "language_model/")
    projector = tuple(rule.under("multi_modal_projector.", "projector/") for rule in PROJECTOR)
    return Names(
        rules=tower.rules + projector + decoder.rules,
        layouts=LAYOUTS,
        buffers=tower.buffers + decoder.buffers,
        modules=MODULES,
    )
