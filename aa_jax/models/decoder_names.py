"""The shared decoder's name map: every tensor of a checkpoint, where it goes, its logical axes."""

from aa_jax.models.decoder import DecoderConfig
from aa_jax.models.names import SAME, TRANSPOSE, Names, Rule

LAYERS = (
    Rule("input_layernorm.weight", "attn_norm/scale", SAME, (None,)),
    Rule("self_attn.q_proj.weight", "attn/q/kernel", TRANSPOSE, ("embed", "heads")),
    Rule("self_attn.k_proj.weight", "attn/k/kernel", TRANSPOSE, ("embed", "kv_heads")),
    Rule("self_attn.v_proj.weight", "attn/v/kernel", TRANSPOSE, ("embed", "kv_heads")),
    Rule("self_attn.o_proj.weight", "attn/o/kernel", TRANSPOSE, ("heads", "embed")),
    Rule("self_attn.q_proj.bias", "attn/q/bias", SAME, ("heads",)),
    Rule("self_attn.k_proj.bias", "attn/k/bias", SAME, ("kv_heads",)),
    Rule("self_attn.v_proj.bias", "attn/v/bias", SAME, ("kv_heads",)),
    Rule("self_attn.o_proj.bias", "attn/o/bias", SAME, (None,)),
    Rule("post_attention_layernorm.weight", "mlp_norm/scale", SAME, (None,)),
    Rule("mlp.gate_proj.weight", "mlp/gate/kernel", TRANSPOSE, ("embed", "mlp")),
    Rule("mlp.up_proj.weight", "mlp/up/kernel", TRANSPOSE, ("embed", "mlp")),
    Rule("mlp.down_proj.weight", "mlp/down/kernel", TRANSPOSE, ("mlp", "embed")),
    Rule("mlp.gate_proj.bias", "mlp/gate/bias", SAME, ("mlp",)),
    Rule("mlp.up_proj.bias", "mlp/up/bias", SAME, ("mlp",)),
    Rule("mlp.down_proj.bias", "mlp/down/bias", SAME, (None,)),
)

# By `DecoderConfig.qk_norm`: scales of one head for all, or of every head [heads, Dh].
QK_NORM = {
    "none": (),
    "rms": (
        Rule("self_attn.q_norm.weight", "attn/q_norm/scale", SAME, (None,)),
        Rule("self_attn.k_norm.weight", "attn/k_norm/scale", SAME, (None,)),
    ),
    "layer": (
        Rule("self_attn.q_norm.weight", "attn/q_norm/scale", SAME, (None, None)),
        Rule("self_attn.q_norm.bias", "attn/q_norm/bias", SAME, (None, None)),
        Rule("self_attn.k_norm.weight", "attn/k_norm/scale", SAME, (None, None)),
        Rule("self_attn.k_norm.bias", "attn/k_norm/bias", SAME, (None, None)),
    ),
}


def decoder_names(config: DecoderConfig) -> Names:
    """The map of a text model: `model.*` and `lm_head`."""
    return Names(
        rules=(
            Rule("model.embed_tokens.weight", "embed/weight", SAME, ("vocab", "embed")),
            *(
                rule.under("model.layers.{layer}.", "layers/")
                for rule in LAYERS + QK_NORM[config.qk_norm]
            ),
            Rule("model.norm.weight", "norm/scale", SAME, (None,)),
            Rule("lm_head.weight", "head/weight", SAME, ("vocab", "embed")),
        ),
        # Old checkpoints store the rotary table, which is computed from the config.
        buffers=(r".*\.rotary_emb\.inv_freq",),
        tied=("lm_head.weight", "model.embed_tokens.weight"),
    )
