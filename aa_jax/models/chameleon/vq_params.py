"""The VQGAN's name map: the tensors of transformers' `ChameleonVQVAE`, and the decoder's.

transformers has only the encoder half; the decoder is stored as the original VQGAN stores it
(`decoder.up.0` is the level of full resolution).
"""

import numpy as np

from aa_jax.models.chameleon.vq import VQConfig
from aa_jax.models.names import SAME, Names, Rule


class Conv2d:
    """torch's convolution [out, in, h, w] and our kernel [h, w, in, out]."""

    def to_ours(self, tensor: np.ndarray) -> np.ndarray:
        return tensor.transpose(2, 3, 1, 0)

    def to_hf(self, leaf: np.ndarray) -> np.ndarray:
        return leaf.transpose(3, 2, 0, 1)

    def hf_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return (shape[3], shape[2], shape[0], shape[1])


CONV2D = Conv2d()


def conv(hf: str, path: str) -> tuple[Rule, ...]:
    """A convolution and its bias; kernels are small and stay whole on every device."""
    return (
        Rule(f"{hf}.weight", f"{path}/kernel", CONV2D, (None,) * 4),
        Rule(f"{hf}.bias", f"{path}/bias", SAME, (None,)),
    )


def norm(hf: str, path: str) -> tuple[Rule, ...]:
    """A group norm."""
    return (
        Rule(f"{hf}.weight", f"{path}/scale", SAME, (None,)),
        Rule(f"{hf}.bias", f"{path}/bias", SAME, (None,)),
    )


def resnet(hf: str, path: str) -> tuple[Rule, ...]:
    """A residual block."""
    return (
        *norm(f"{hf}.norm1", f"{path}/norm1"),
        *conv(f"{hf}.conv1", f"{path}/conv1"),
        *norm(f"{hf}.norm2", f"{path}/norm2"),
        *conv(f"{hf}.conv2", f"{path}/conv2"),
        *conv(f"{hf}.nin_shortcut", f"{path}/shortcut"),
    )


def attention(hf: str, path: str) -> tuple[Rule, ...]:
    """An attention block."""
    parts = [conv(f"{hf}.{name}", f"{path}/{name}") for name in ("q", "k", "v", "proj_out")]
    return norm(f"{hf}.norm", f"{path}/norm") + sum(parts, ())


def half(root: str, levels: int, blocks: int, side: str, resample: str) -> tuple[Rule, ...]:
    """Encoder or decoder."""
    rules = conv(f"{root}.conv_in", f"{root}/conv_in")
    for i in range(levels):
        for j in range(blocks):
            rules += resnet(f"{root}.{side}.{i}.block.{j}", f"{root}/{side}_{i}/block_{j}")
            rules += attention(f"{root}.{side}.{i}.attn.{j}", f"{root}/{side}_{i}/attn_{j}")
        rules += conv(f"{root}.{side}.{i}.{resample}.conv", f"{root}/{side}_{i}/resample")
    rules += resnet(f"{root}.mid.block_1", f"{root}/mid/block_1")
    rules += attention(f"{root}.mid.attn_1", f"{root}/mid/attn_1")
    rules += resnet(f"{root}.mid.block_2", f"{root}/mid/block_2")
    rules += norm(f"{root}.norm_out", f"{root}/norm_out")
    return rules + conv(f"{root}.conv_out", f"{root}/conv_out")


def names(config: VQConfig) -> Names:
    """The map under the tokenizer's own root."""
    levels, blocks = len(config.channel_multiplier), config.num_res_blocks
    return Names(
        rules=(
            *half("encoder", levels, blocks, "down", "downsample"),
            *conv("quant_conv", "quant_conv"),
            Rule("quantize.embedding.weight", "codebook", SAME, (None, None)),
            *conv("post_quant_conv", "post_quant_conv"),
            *half("decoder", levels, blocks + 1, "up", "upsample"),
        )
    )
