"""Options of the shared decoder that no text family uses alone, and its place on a mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from transformers import ChameleonConfig
from transformers.models.chameleon import modeling_chameleon as chameleon

from aa_jax import models
from aa_jax.errors import ModelError
from aa_jax.models.decoder import Block, DecoderConfig
from aa_jax.models.decoder_names import LAYERS, QK_NORM
from aa_jax.models.names import flatten, unflatten
from aa_jax.models.rope import Rope, angles
from aa_jax.sharding import make_mesh, put_batch, shardings

CONFIG = DecoderConfig(
    vocab_size=8,
    hidden_size=16,
    intermediate_size=24,
    num_layers=1,
    num_heads=4,
    num_kv_heads=2,
    head_dim=4,
    hidden_act="silu",
    norm_eps=1e-3,
    rope=Rope("default", 100.0, 4, 64),
    qk_norm="layer",
)


@pytest.mark.parametrize("post_norm", [False, True])
def test_head_norms_and_post_norms_are_chameleons(post_norm):
    """One layer with per-head LayerNorms, norms before or (swin) after its branches."""
    raw = ChameleonConfig(
        hidden_size=16,
        intermediate_size=24,
        num_attention_heads=4,
        num_key_value_heads=2,
        rms_norm_eps=1e-3,
        rope_parameters={"rope_type": "default", "rope_theta": 100.0},
    )
    raw._attn_implementation = "eager"
    kind = "ChameleonSwinDecoderLayer" if post_norm else "ChameleonDecoderLayer"
    layer = getattr(chameleon, kind)(raw, 0).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator))
        x = torch.randn((2, 7, 16), generator=generator)
        position = torch.arange(7)[None].expand(2, 7)
        mask = torch.full((7, 7), -torch.inf).triu(1)[None, None]
        rotary = chameleon.ChameleonRotaryEmbedding(raw)(x, position)
        expected = layer(x, attention_mask=mask, position_embeddings=rotary)[0].numpy()
    block = Block(
        DecoderConfig(**{**vars(CONFIG), "post_norm": post_norm}),
        rngs=nnx.Rngs(0),
        param_dtype=jnp.float32,
    )
    graph, _ = nnx.split(block, nnx.Param)
    tensors = {name: tensor.detach().numpy() for name, tensor in layer.named_parameters()}
    rules = {rule.hf: rule for rule in LAYERS + QK_NORM["layer"]}
    params = {
        rules[name].path: jnp.asarray(rules[name].transform.to_ours(tensor))
        for name, tensor in tensors.items()
    }
    block = nnx.merge(graph, nnx.State(unflatten(params)))
    intervals = jnp.zeros((2, 7, 4), jnp.int32).at[..., 3].set(jnp.arange(1, 8))
    rotary = angles(CONFIG.rope, jnp.asarray(position.numpy()))
    got, _ = block(jnp.asarray(x.numpy()), rotary, intervals)
    np.testing.assert_allclose(got, expected, atol=1e-5)


def test_three_positions_need_sections(world):
    model = models.build(world.llama_config())
    batch = world.text_batch([5], 6)
    batch["positions"] = np.repeat(batch["positions"][..., None], 3, axis=-1)
    with pytest.raises(ModelError, match=r"\[1, 6, 3\], three per token, .* made for a Qwen2-VL"):
        model.hidden_states(model.init(jax.random.key(0)), batch)


@pytest.fixture(scope="module")
def fsdp(world):
    """Weights and rows over eight devices, and the compiled gradient of a loss."""
    config = world.llama_config(hidden_size=64, intermediate_size=96, vocab_size=64)
    model = models.build(config)
    mesh = make_mesh(fsdp=8)
    params = jax.tree.map(lambda x: 3 * x, jax.jit(model.init)(jax.random.key(0)))
    batch = world.text_batch([16] * 8, 16)

    def loss(params, batch):
        # The norm's own squares add up to a constant; a cosine has a gradient everywhere.
        return jnp.sum(jnp.cos(2 * model.hidden_states(params, batch)))

    program = jax.jit(jax.value_and_grad(loss))
    expected = program(params, batch)
    layout = shardings(model.axes(), model.abstract(), mesh)
    spread = jax.device_put(params, layout), put_batch(batch, mesh)
    with jax.set_mesh(mesh):
        compiled = jax.jit(jax.value_and_grad(loss), out_shardings=(None, layout)).lower(*spread)
        return compiled.compile(), spread, expected


def test_fsdp_gathers_weights_not_activations(fsdp):
    """ZeRO-3: every device keeps its own row of the residual stream, [1, 16, 64] of the batch's
    [8, 16, 64]; no array of the whole batch's activations exists anywhere in the program."""
    text = fsdp[0].as_text()
    assert "f32[1,16,64]" in text and "all-gather" in text
    for whole in ("f32[8,16,64]", "f32[128,64]", "f32[8,16,8]", "f32[128,96]"):
        assert whole not in text, whole


def test_fsdp_is_exact(fsdp):
    compiled, spread, (loss, grads) = fsdp
    got_loss, got = compiled(*spread)
    np.testing.assert_allclose(got_loss, loss, rtol=1e-5)
    for path, leaf in flatten(grads).items():
        scale = float(jnp.abs(leaf).max())
        np.testing.assert_allclose(flatten(got)[path], leaf, atol=1e-4 * scale, err_msg=path)
