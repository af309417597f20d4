"""The audio encoder's name map."""

import numpy as np

from aa_jax.models.names import SAME, TRANSPOSE, Names, Rule


class Conv1d:
    """torch's convolution [out, in, width] and our kernel [width, in, out]."""

    def to_ours(self, tensor: np.ndarray) -> np.ndarray:
        return tensor.transpose(2, 1, 0)

    def to_hf(self, leaf: np.ndarray) -> np.ndarray:
        return leaf.transpose(2, 1, 0)

    def hf_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return shape[::-1]


CONV1D = Conv1d()

LAYERS = (
    Rule("self_attn_layer_norm.weight", "attn_norm/scale", SAME, (None,)),
    Rule("self_attn_layer_norm.bias", "attn_norm/bias", SAME, (None,)),
    Rule("self_attn.q_proj.weight", "attn/q/kernel", TRANSPOSE, ("vision_embed", "vision_heads")),
    Rule("self_attn.k_proj.weight", "attn/k/kernel", TRANSPOSE, ("vision_embed", "vision_heads")),
    Rule("self_attn.v_proj.weight", "attn/v/kernel", TRANSPOSE, ("vision_embed", "vision_heads")),
    Rule("self_attn.out_proj.weight", "attn/o/kernel", TRANSPOSE, ("vision_heads", "vision_embed")),
    Rule("self_attn.q_proj.bias", "attn/q/bias", SAME, ("vision_heads",)),
    Rule("self_attn.v_proj.bias", "attn/v/bias", SAME, ("vision_heads",)),
    Rule("self_attn.out_proj.bias", "attn/o/bias", SAME, (None,)),
    Rule("final_layer_norm.weight", "mlp_norm/scale", SAME, (None,)),
    Rule("final_layer_norm.bias", "mlp_norm/bias", SAME, (None,)),
    Rule("fc1.weight", "fc1/kernel", TRANSPOSE, ("vision_embed", "vision_mlp")),
    Rule("fc1.bias", "fc1/bias", SAME, ("vision_mlp",)),
    Rule("fc2.weight", "fc2/kernel", TRANSPOSE, ("vision_mlp", "vision_embed")),
    Rule("fc2.bias", "fc2/bias", SAME, (None,)),
)

NAMES = Names(
    rules=(
        Rule("conv1.weight", "conv1/kernel", CONV1D, (None, "patch", "vision_embed")),
        Rule("conv1.bias", "conv1/bias", SAME, (None,)),
        Rule("conv2.weight", "conv2/kernel", CONV1D, (None, None, "vision_embed")),
        Rule("conv2.bias", "conv2/bias", SAME, (None,)),
        Rule("embed_positions.weight", "position/weight", SAME, (None, "vision_embed")),
        *(rule.under("layers.{layer}.", "layers/") for rule in LAYERS),
        Rule("layer_norm.weight", "norm/scale", SAME, (None,)),
        Rule("layer_norm.bias", "norm/bias", SAME, (None,)),
    )
)
