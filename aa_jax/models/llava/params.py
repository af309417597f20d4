"""LLaVA's name map: the parts' own maps under its roots, and the layouts seen on disk."""

from aa_jax.models.clip import params as clip
from aa_jax.models.decoder_names import decoder_names
from aa_jax.models.llava.modeling import LlavaConfig
from aa_jax.models.names import SAME, TRANSPOSE, Names, Rule

PROJECTOR = (
    Rule("linear_1.weight", "linear_1/kernel", TRANSPOSE, ("vision_embed", "mlp")),
    Rule("linear_1.bias", "linear_1/bias", SAME, ("mlp",)),
    Rule("linear_2.weight", "linear_2/kernel", TRANSPOSE, ("mlp", "embed")),
    Rule("linear_2.bias", "linear_2/bias", SAME, (None,)),
)

# From the layouts transformers has written over the years to the one written here, which all its
# versions read: (regular expression at the start of the name, replacement), applied in order.
LAYOUTS = (
    (r"model\.language_model\.", "language_model.model."),
    (r"lm_head\.", "language_model.lm_head."),
    (r"model\.(vision_tower|multi_modal_projector)\.", r"\1."),
    (r"vision_tower\.(?!vision_model\.)", "vision_tower.vision_model."),
)

# From the names written here to those of transformers' modules in memory; the first match counts.
MODULES = (
    (r"language_model\.model\.", "model.language_model."),
    (r"language_model\.lm_head\.", "lm_head."),
    (r"vision_tower\.vision_model\.", "model.vision_tower."),
    (r"multi_modal_projector\.", "model.multi_modal_projector."),
)


def names(config: LlavaConfig) -> Names:
    """The whole model's map."""
    tower = clip.names(config.vision).under("vision_tower.vision_model.", "vision_tower/")
    decoder = decoder_names(config.text).under("language_model.", "language_model/")
    projector = tuple(rule.under("multi_modal_projector.", "projector/") for rule in PROJECTOR)
    return Names(
        rules=tower.rules + projector + decoder.rules,
        layouts=LAYOUTS,
        buffers=tower.buffers + decoder.buffers,
        tied=decoder.tied,
        modules=MODULES,
    )
