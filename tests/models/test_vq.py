"""The image tokenizer against transformers: Chameleon has its encoder, Janus both halves."""

import json

import jax
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from transformers import ChameleonVQVAEConfig, JanusVQVAEConfig
from transformers.models.chameleon.modeling_chameleon import ChameleonVQVAE
from transformers.models.janus.modeling_janus import JanusVQVAE

from aa_jax.errors import CheckpointError, MediaError, ModelError
from aa_jax.models.chameleon.tokenizer import (
    build_tokenizer,
    load_tokenizer,
    save_tokenizer,
    to_uint8,
)
from aa_jax.models.names import flatten

SMALL = dict(
    embed_dim=6,
    num_embeddings=50,
    latent_channels=8,
    resolution=16,
    base_channels=32,
    channel_multiplier=[1, 2],
    num_res_blocks=1,
)
CASES = {
    "attention in the middle, oblong image": ({}, (16, 24)),
    "attention at the lower level, grey, two blocks": (
        dict(attn_resolutions=[8], in_channels=1, num_res_blocks=2, embed_dim=5),
        (16, 16),
    ),
    "no attention, three levels, odd edges": (
        dict(attn_type="none", attn_resolutions=[16], channel_multiplier=[2, 1, 1]),
        (17, 15),
    ),
}


def randomise(model, seed):
    """Every parameter random: norms and biases too."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = 0.2 * torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + noise if "norm" in name and name.endswith("weight") else noise)
    return model.eval()


def images(seed, count, channels, size):
    return np.random.default_rng(seed).normal(size=(count, channels, *size)).astype(np.float32)


@pytest.mark.parametrize("case", CASES)
def test_indices_are_transformers(case, tmp_path):
    """Every index equal on several weights and images, not merely close latents."""
    changes, size = CASES[case]
    config = {**SMALL, **changes}
    encode = latents = None
    for seed in range(3):
        reference = randomise(ChameleonVQVAE(ChameleonVQVAEConfig(**config)), seed)
        reference.save_pretrained(tmp_path / str(seed))
        tokenizer, params = load_tokenizer(tmp_path / str(seed))
        assert not tokenizer.has_decoder
        encode = encode or jax.jit(tokenizer.encode)
        latents = latents or jax.jit(tokenizer.latents)
        pixels = images(seed + 10, 4, config.get("in_channels", 3), size)
        with torch.no_grad():
            expected = reference.encode(torch.tensor(pixels))
            compared = reference.quant_conv(expected.last_hidden_state)
        found = np.asarray(encode(params, pixels))
        factor = 2 ** (len(config["channel_multiplier"]) - 1)
        assert found.shape == (4, size[0] // factor, size[1] // factor)
        assert len(np.unique(found)) > 5
        np.testing.assert_array_equal(found.reshape(-1), expected.image_tokens.numpy())
        ours = np.asarray(latents(params, pixels)).transpose(0, 3, 1, 2)
        np.testing.assert_allclose(ours, compared.numpy(), atol=1e-4, rtol=0)


def janus_folder(folder, config, seed, attention):
    """A transformers Janus VQ, and its weights in a Chameleon tokenizer's folder.

    Janus attends at the lowest resolution, numbers the decoder's levels from there, and looks up
    normalised vectors; with a codebook of unit vectors the two are one architecture.
    """
    edge = config["resolution"] // 2 ** (len(config["channel_multiplier"]) - 1)
    taken = {k: v for k, v in config.items() if k != "resolution"}
    reference = JanusVQVAE(JanusVQVAEConfig(**taken, num_patches=edge))
    if not attention:
        reference.decoder.up[0].attn = torch.nn.ModuleList()
        reference.encoder.down[-1].attn = torch.nn.ModuleList()
    randomise(reference, seed)
    with torch.no_grad():
        codebook = reference.quantize.embedding.weight
        codebook.copy_(torch.nn.functional.normalize(codebook, dim=-1))
    levels = len(config["channel_multiplier"])
    tensors = {}
    for name, tensor in reference.state_dict().items():
        parts = name.split(".")
        if parts[:2] == ["decoder", "up"]:
            parts[2] = str(levels - 1 - int(parts[2]))
        tensors[".".join(parts)] = np.ascontiguousarray(tensor.numpy())
    written = {
        **config,
        "attn_resolutions": [edge] if attention else None,
        "model_type": "chameleon_vqgan",
    }
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(written))
    return reference


@pytest.mark.parametrize(
    ("changes", "attention"),
    [({}, True), (dict(channel_multiplier=[1, 2, 1], num_res_blocks=2, out_channels=1), False)],
)
def test_decoded_pixels_are_transformers(changes, attention, tmp_path):
    """Tokens to pixels within 1e-4, and pixels to tokens to pixels."""
    config = {**SMALL, **changes}
    reference = janus_folder(tmp_path, config, 3, attention)
    tokenizer, params = load_tokenizer(tmp_path)
    edge = tokenizer.config.grid
    indices = np.random.default_rng(0).integers(0, 50, (3, edge, edge)).astype(np.int32)
    decode = jax.jit(tokenizer.decode)
    with torch.no_grad():
        expected = reference.decode(torch.tensor(indices.reshape(3, -1)).long()).numpy()
    assert expected.std() > 0.1
    np.testing.assert_allclose(decode(params, indices), expected, atol=1e-4, rtol=0)
    pixels = images(5, 2, 3, (16, 16))
    with torch.no_grad():
        expected = reference(torch.tensor(pixels))[0].numpy()
    found = np.asarray(decode(params, jax.jit(tokenizer.encode)(params, pixels)))
    np.testing.assert_allclose(found, expected, atol=1e-4, rtol=0)


def test_folders_come_and_go_bit_exact(tmp_path):
    """Decoder and all; transformers reads the encoder half of what is written."""
    janus_folder(tmp_path / "in", SMALL, 0, True)
    tokenizer, params = load_tokenizer(tmp_path / "in")
    save_tokenizer(tmp_path / "out", tokenizer, params)
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("in", "out"))
    assert before.keys() == after.keys()
    for name in before:
        np.testing.assert_array_equal(before[name], after[name], err_msg=name)
    reference, info = ChameleonVQVAE.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] and not info["mismatched_keys"]
    assert all(name.startswith("decoder.") for name in info["unexpected_keys"])
    pixels = images(1, 2, 3, (16, 16))
    with torch.no_grad():
        expected = reference.eval().encode(torch.tensor(pixels)).image_tokens.numpy()
    found = jax.jit(tokenizer.encode)(params, pixels)
    np.testing.assert_array_equal(np.asarray(found).reshape(-1), expected)
    axes, leaves = flatten(tokenizer.axes()), flatten(tokenizer.abstract())
    assert {k: len(v) for k, v in axes.items()} == {k: len(v.shape) for k, v in leaves.items()}


def test_stored_in_bfloat16_it_still_computes_in_fp32(tmp_path):
    janus_folder(tmp_path / "in", SMALL, 0, True)
    tokenizer, params = load_tokenizer(tmp_path / "in", param_dtype="bfloat16")
    assert {leaf.dtype.name for leaf in jax.tree.leaves(params)} == {"bfloat16"}
    wide, _ = load_tokenizer(tmp_path / "in")
    pixels = images(2, 2, 3, (16, 16))
    latents = tokenizer.latents(params, pixels)
    assert latents.dtype == np.float32
    as_wide = jax.tree.map(lambda leaf: leaf.astype(np.float32), params)
    np.testing.assert_array_equal(latents, wide.latents(as_wide, pixels))


def test_a_published_config_builds():
    """The image tokenizer of facebook/chameleon-7b: 8,192 codes, 1,024 tokens of 16 x 16 pixels;
    encoder half counted by transformers on the meta device."""
    published = {
        "attn_resolutions": None,
        "attn_type": "vanilla",
        "base_channels": 128,
        "channel_multiplier": [1, 1, 2, 2, 4],
        "double_latent": False,
        "dropout": 0.0,
        "embed_dim": 256,
        "in_channels": 3,
        "initializer_range": 0.02,
        "latent_channels": 256,
        "model_type": "chameleon_vqgan",
        "num_embeddings": 8192,
        "num_res_blocks": 2,
        "resolution": 512,
    }
    tokenizer = build_tokenizer(published, decoder=False)
    assert tokenizer.config.factor == 16 and tokenizer.config.tokens_per_image == 1024
    with torch.device("meta"):
        reference = ChameleonVQVAE(ChameleonVQVAEConfig(**published))
    count = sum(parameter.numel() for parameter in reference.parameters())
    assert sum(np.prod(leaf.shape) for leaf in flatten(tokenizer.abstract()).values()) == count


def test_refusals(tmp_path):
    with pytest.raises(ModelError, match=r"vq_config.double_latent is true.*\n.*num_codes \(= 5\)"):
        build_tokenizer({"double_latent": True, "num_codes": 5})
    with pytest.raises(ModelError, match="base_channels = 48 times 1 does not split into the 32"):
        build_tokenizer({"base_channels": 48})
    with pytest.raises(ModelError, match="channel_multiplier is \\[1, 0\\]"):
        build_tokenizer({"channel_multiplier": [1, 0]})
    with pytest.raises(ModelError, match="model_type 'llama'"):
        build_tokenizer({"model_type": "llama"})
    tokenizer = build_tokenizer(SMALL, decoder=False)
    params = tokenizer.init(jax.random.key(0))
    with pytest.raises(ModelError, match="no decoder.*converted to safetensors"):
        tokenizer.decode(params, np.zeros((1, 8, 8), np.int32))
    with pytest.raises(ModelError, match="missing \\['codebook'\\]"):
        tokenizer.encode(
            {k: v for k, v in params.items() if k != "codebook"}, images(0, 1, 3, (16, 16))
        )
    with pytest.raises(MediaError, match=r"\(4, 16, 16\).*reads 3 channels and at least 2 x 2"):
        tokenizer.encode(params, images(0, 1, 4, (16, 16)))
    (tmp_path / "config.json").write_text(json.dumps(SMALL))
    (tmp_path / "model.safetensors").write_bytes(b"x" * 20)
    with pytest.raises(CheckpointError, match="model.safetensors holds 20 bytes"):
        load_tokenizer(tmp_path)


def test_indices_outside_the_codebook_are_seen():
    tokenizer = build_tokenizer(SMALL)
    params = tokenizer.init(jax.random.key(0))
    indices = np.zeros((1, 8, 8), np.int32)
    indices[0, 0, 0] = 50
    assert np.isnan(tokenizer.decode(params, indices)).any()


def test_pixels_to_colours():
    pixels = np.array([-3.0, -1.0, -0.5, 0.0, 1.0, 2.0], np.float32).reshape(1, 1, 6)
    np.testing.assert_array_equal(to_uint8(pixels)[0, :, 0], [0, 0, 64, 128, 255, 255])
