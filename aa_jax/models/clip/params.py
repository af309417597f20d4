"""The CLIP vision tower's name map."""

from aa_jax.models.clip.modeling import ClipVisionConfig
from aa_jax.models.names import SAME, TRANSPOSE, Names, PatchConv, Rule

LAYERS = (
    Rule("layer_norm1.weight", "attn_norm/scale", SAME, (None,)),
    Rule("layer_norm1.bias", "attn_norm/bias", SAME, (None,)),
    Rule("self_attn.q_proj.weight", "attn/q/kernel", TRANSPOSE, ("vision_embed", "vision_heads")),
    Rule("self_attn.k_proj.weight", "attn/k/kernel", TRANSPOSE, ("vision_embed", "vision_heads")),
    Rule("self_attn.v_proj.weight", "attn/v/kernel", TRANSPOSE, ("vision_embed", "vision_heads")),
    Rule("self_attn.out_proj.weight", "attn/o/kernel", TRANSPOSE, ("vision_heads", "vision_embed")),
    Rule("self_attn.q_proj.bias", "attn/q/bias", SAME, ("vision_heads",)),
    Rule("self_attn.k_proj.bias", "attn/k/bias", SAME, ("vision_heads",)),
    Rule("self_attn.v_proj.bias", "attn/v/bias", SAME, ("vision_heads",)),
    Rule("self_attn.out_proj.bias", "attn/o/bias", SAME, (None,)),
    Rule("layer_norm2.weight", "mlp_norm/scale", SAME, (None,)),
    Rule("layer_norm2.bias", "mlp_norm/bias", SAME, (None,)),
    Rule("mlp.fc1.weight", "fc1/kernel", TRANSPOSE, ("vision_embed", "vision_mlp")),
    Rule("mlp.fc1.bias", "fc1/bias", SAME, ("vision_mlp",)),
    Rule("mlp.fc2.weight", "fc2/kernel", TRANSPOSE, ("vision_mlp", "vision_embed")),
    Rule("mlp.fc2.bias", "fc2/bias", SAME, (None,)),
)


def names(config: ClipVisionConfig) -> Names:
    """The map under the tower's own root; the patch kernel's shape depends on the config."""
    conv = PatchConv(config.num_channels, config.patch_size)
    return Names(
        rules=(
            Rule("embeddings.class_embedding", "class_embedding", SAME, ("vision_embed",)),
            Rule(
                "embeddings.patch_embedding.weight", "patch/kernel", conv, ("patch", "vision_embed")
            ),
            Rule(
                "embeddings.position_embedding.weight",
                "position/weight",
                SAME,
                (None, "vision_embed"),
            ),
            Rule("pre_layrnorm.weight", "pre_norm/scale", SAME, (None,)),
            Rule("pre_layrnorm.bias", "pre_norm/bias", SAME, (None,)),
            *(rule.under("encoder.layers.{layer}.", "layers/") for rule in LAYERS),
            Rule("post_layernorm.weight", "post_norm/scale", SAME, (None,)),
            Rule("post_layernorm.bias", "post_norm/bias", SAME, (None,)),
        ),
        # Old checkpoints store the row numbers 0..P of the position table.
        buffers=(r"embeddings\.position_ids",),
    )
