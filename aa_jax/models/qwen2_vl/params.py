"""The name map of Qwen2-VL and Qwen2.5-VL, in the layout of the released checkpoints."""

from aa_jax.models.decoder_names import decoder_names
from aa_jax.models.names import SAME, TRANSPOSE, Names, PatchConv, Rule
from aa_jax.models.qwen2_vl.config import Qwen2VLConfig

LAYERS = (
    Rule("norm1.weight", "attn_norm/scale", SAME, (None,)),
    Rule("norm1.bias", "attn_norm/bias", SAME, (None,)),
    Rule("attn.qkv.weight", "attn/qkv/kernel", TRANSPOSE, ("vision_embed", "vision_heads")),
    Rule("attn.qkv.bias", "attn/qkv/bias", SAME, ("vision_heads",)),
    Rule("attn.proj.weight", "attn/o/kernel", TRANSPOSE, ("vision_heads", "vision_embed")),
    Rule("attn.proj.bias", "attn/o/bias", SAME, (None,)),
    Rule("norm2.weight", "mlp_norm/scale", SAME, (None,)),
    Rule("norm2.bias", "mlp_norm/bias", SAME, (None,)),
    # Qwen2-VL
    Rule("mlp.fc1.weight", "mlp/fc1/kernel", TRANSPOSE, ("vision_embed", "vision_mlp")),
    Rule("mlp.fc1.bias", "mlp/fc1/bias", SAME, ("vision_mlp",)),
    Rule("mlp.fc2.weight", "mlp/fc2/kernel", TRANSPOSE, ("vision_mlp", "vision_embed")),
    Rule("mlp.fc2.bias", "mlp/fc2/bias", SAME, (None,)),
    # Qwen2.5-VL
    Rule("mlp.gate_proj.weight", "mlp/gate/kernel", TRANSPOSE, ("vision_embed", "vision_mlp")),
    Rule("mlp.gate_proj.bias", "mlp/gate/bias", SAME, ("vision_mlp",)),
    Rule("mlp.up_proj.weight", "mlp/up/kernel", TRANSPOSE, ("vision_embed", "vision_mlp")),
    Rule("mlp.up_proj.bias", "mlp/up/bias", SAME, ("vision_mlp",)),
    Rule("mlp.down_proj.weight", "mlp/down/kernel", TRANSPOSE, ("vision_mlp", "vision_embed")),
    Rule("mlp.down_proj.bias", "mlp/down/bias", SAME, (None,)),
)

MERGER = (
    Rule("ln_q.weight", "norm/scale", SAME, (None,)),
    Rule("ln_q.bias", "norm/bias", SAME, (None,)),
    Rule("mlp.0.weight", "linear_1/kernel", TRANSPOSE, ("vision_embed", "vision_mlp")),
    Rule("mlp.0.bias", "linear_1/bias", SAME, ("vision_mlp",)),
    Rule("mlp.2.weight", "linear_2/kernel", TRANSPOSE, ("vision_mlp", "embed")),
    Rule("mlp.2.bias", "linear_2/bias", SAME, (None,)),
)

# From transformers' names in memory to those of the released checkpoints, which it writes too.
LAYOUTS = (
    (r"model\.visual\.", "visual."),
    (r"model\.language_model\.", "model."),
    (r"language_model\.(model|lm_head)\.", r"\1."),
)

# From the names written here to those of transformers' modules in memory; the first match counts.
MODULES = (
    (r"visual\.", "model.visual."),
    (r"model\.", "model.language_model."),
)


def names(config: Qwen2VLConfig) -> Names:
    """The whole model's map."""
    vision = config.vision
    conv = PatchConv(vision.num_channels, vision.patch_size, vision.frames_per_patch)
    decoder = decoder_names(config.text)
    root, tower = "visual.", "vision_tower/"
    return Names(
        rules=(
            Rule("patch_embed.proj.weight", "patch/kernel", conv, ("patch", "vision_embed")).under(
                root, tower
            ),
            *(rule.under(root + "blocks.{layer}.", tower + "layers/") for rule in LAYERS),
            *(rule.under(root + "merger.", "projector/") for rule in MERGER),
            *decoder.under("", "language_model/").rules,
        ),
        layouts=LAYOUTS,
        buffers=(*decoder.buffers, r"visual\.rotary_pos_emb\.inv_freq"),
        tied=decoder.tied,
        modules=MODULES,
    )
