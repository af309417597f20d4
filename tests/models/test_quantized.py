"""Kernels in 4 and 8 bits: the published code, agreement with the dequantised model, bytes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from scipy.stats import norm

from aa_jax import models
from aa_jax.errors import ConfigError
from aa_jax.models import adapt
from aa_jax.models.names import flatten
from aa_jax.models.quantized import NF4, Quantization, dequantize, multiply, quantize
from aa_jax.plan.hlo import collectives
from aa_jax.sharding import make_mesh, shardings

# Dettmers et al., 2023, "QLoRA: Efficient Finetuning of Quantized LLMs", appendix E.
PUBLISHED = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
]  # fmt: skip
KINDS = ["nf4", "int8"]


def test_the_code_is_the_published_one():
    assert list(NF4) == PUBLISHED
    # Its definition (section 3): quantiles of N(0,1), eight below 0, nine from 0 on, scaled to 1.
    edge = 0.9677083
    above = norm.ppf(np.linspace(edge, 0.5, 9)[:-1])
    below = -norm.ppf(np.linspace(edge, 0.5, 8)[:-1])
    whole = np.sort(np.concatenate([above, [0.0], below]))
    np.testing.assert_allclose(NF4, whole / whole.max(), atol=2e-7)


# bitsandbytes 0.50.2, quantize_4bit(w, blocksize=64, quant_type="nf4") on the CPU, of
# w = numpy.random.default_rng(0).normal(size=(2, 128)) in fp32: packed codes and absmax.
BITSANDBYTES = (
    "86a859dc42470624569c6d49b84358366a8946bd2edb86deed927a299b2452e596eda07bc4e24c7f84522aad4e6e"
    "548c8421ac62b24a094878b4dbbdbb71631843389d7cdc0d999995174c6735719720a656e771ebc7b9a61c1663a6"
    "5a5d9512b76d3559552aa5835c8e4969754f715a5cb65452bd332403c6a5d86e6387b4aa"
)
ABSMAX = [2.32503080368042, 2.250141143798828, 2.398232936859131, 3.106336832046509]


def test_codes_are_those_of_bitsandbytes():
    """Its blocks run along a row of torch's [out, in], which is a column here."""
    weight = np.random.default_rng(0).normal(size=(2, 128)).astype(np.float32)
    codes, scales = quantize(jnp.asarray(weight.T), Quantization())
    assert np.asarray(codes).T.tobytes().hex() == BITSANDBYTES
    np.testing.assert_array_equal(np.asarray(scales).T.ravel(), np.float32(ABSMAX))


def test_a_block_by_hand():
    """Two blocks of four, one output: the largest is exact, the others take the nearest value."""
    kernel = np.array([[2.0], [0.2], [-1.1], [0.0], [0.0], [0.0], [-8.0], [7.9]], np.float32)
    codes, scales = quantize(jnp.asarray(kernel), Quantization("nf4", 4))
    np.testing.assert_array_equal(scales, [[2.0], [8.0]])
    # 2/2 = 1 -> 15; 0.1 -> 0.0796 = 8; -0.55 -> -0.525 = 2; 0 -> 7; -1 -> 0; 0.9875 -> 15
    packed = [[15 << 4 | 8], [2 << 4 | 7], [7 << 4 | 7], [0 << 4 | 15]]
    np.testing.assert_array_equal(codes, np.array(packed, np.uint8))
    back = np.asarray(dequantize(codes, scales))[:, 0]
    table = np.float32(PUBLISHED)
    expected = [2, 2 * table[8], 2 * table[2], 0, 0, 0, -8, 8]
    np.testing.assert_array_equal(back, np.float32(expected))
    codes, scales = quantize(jnp.asarray(kernel), Quantization("int8"))
    np.testing.assert_array_equal(codes[:, 0], np.round(kernel[:, 0] / 8 * 127))
    np.testing.assert_array_equal(scales, [[8.0]])


@pytest.mark.parametrize("kind", KINDS)
def test_errors_stay_within_half_a_step(kind):
    kernel = jax.random.normal(jax.random.key(0), (2, 96, 10))
    how = Quantization(kind, 64)
    codes, scales = jax.jit(lambda k: quantize(k, how))(kernel)
    assert scales.shape == (2, {"nf4": 2, "int8": 1}[kind], 10)  # 48 is the largest divisor of 96
    back = dequantize(codes, scales)
    step = max(np.diff(PUBLISHED)) if kind == "nf4" else 1 / 127
    most = np.repeat(np.asarray(scales), 96 // scales.shape[1], axis=1)
    assert (np.abs(back - kernel) <= most * step / 2 * 1.0001).all()
    again = quantize(back, how)
    np.testing.assert_array_equal(again[0], codes)
    # nf4's largest value is its scale; 127 steps of scale / 127 may be one rounding off it.
    np.testing.assert_allclose(dequantize(*again), back, rtol=0 if kind == "nf4" else 2e-7)
    zero = quantize(jnp.zeros((4, 2)), how)
    np.testing.assert_array_equal(dequantize(*zero), np.zeros((4, 2)))


@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradients_are_those_of_the_dequantised_model(kind, world, tmp_path):
    """A LLaVA with adapters on everything; every kernel of the decoder and tower in few bits."""
    config = world.llava_config()
    world.torch_model(config).save_pretrained(tmp_path)
    options = {"kind": kind, "block": 8, "targets": ("*",)}
    model, params = models.load(tmp_path, quantize=options)
    dense, wide = adapt.dense(model, params)
    batch = world.image_batch(config, [13, 9], 14, [2, 1])
    labels = np.random.default_rng(9).integers(0, 40, (2, 14)).astype(np.int32)

    def adapters(model, params):
        adapted, params = adapt.attach(model, params, rank=3, targets=("*",), seed=4)
        flat = flatten(params)
        moving = {k: x + 0.1 for k, x in flat.items() if "/lora/" in k}
        held = {k: x for k, x in flat.items() if k not in moving}

        def loss(moving):
            logits = world.logits(adapted, adapt.unflatten({**held, **moving}), batch)
            picked = jnp.take_along_axis(jax.nn.log_softmax(logits), labels[..., None], axis=-1)
            return -picked.mean()

        return adapted, jax.jit(jax.value_and_grad(loss))(moving)

    adapted, (loss, grads) = adapters(model, params)
    _, (expected, wanted) = adapters(dense, wide)
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    assert grads.keys() == wanted.keys()
    for name in grads:
        np.testing.assert_allclose(grads[name], wanted[name], atol=2e-5, rtol=1e-4, err_msg=name)
    assert set(adapted.frozen) >= {p for p in flatten(params) if "kernel" in p}
    # Saved and loaded in full width it is the same model again.
    models.save(tmp_path / "wide", model, params)
    _, back = models.load(tmp_path / "wide")
    jax.tree.map(np.testing.assert_array_equal, back, wide)


def test_reading_quantises_the_stored_values(world, tmp_path):
    """Leaf by leaf, onto a mesh, the codes are those of the whole parameters quantised at once."""
    config = world.llama_config(hidden_size=32, intermediate_size=64)
    world.torch_model(config).save_pretrained(tmp_path)
    _, whole = models.load(tmp_path)
    mesh = make_mesh(fsdp=2, tensor=2, devices=jax.devices()[:4])
    model, params = models.load(
        tmp_path, param_dtype="bfloat16", quantize={"block": 16},
        shardings=lambda m: shardings(m.axes(), m.abstract(), mesh),
    )  # fmt: skip
    codes, scales = quantize(whole["layers"]["mlp"]["gate"]["kernel"], Quantization("nf4", 16))
    stored = params["layers"]["mlp"]["gate"]["kernel"]
    np.testing.assert_array_equal(stored["codes"], codes)
    np.testing.assert_array_equal(stored["scales"], scales)
    assert stored["codes"].shape == (2, 16, 64) and stored["scales"].shape == (2, 2, 64)
    assert {stored[k].sharding.spec for k in stored} == {P(None, "fsdp", "tensor")}
    assert params["embed"]["weight"].dtype == jnp.bfloat16
    batch = world.text_batch([9, 6], 10)
    hidden = jax.jit(model.hidden_states)(params, batch)
    expected = jax.jit(adapt.plain(model).hidden_states)(adapt.dense(model, params)[1], batch)
    np.testing.assert_allclose(hidden, expected, atol=3e-2)  # the dense kernels are bf16


@pytest.mark.parametrize("kind, bits", [("nf4", 4.5), ("int8", 8.0)])
def test_bytes_of_llama_2_7b(kind, bits):
    """Shapes only. Scales add 32 bits per block of 64, or per output feature."""
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "rms_norm_eps": 1e-5}
    model = models.build(config, param_dtype="bfloat16", quantize={"kind": kind})
    leaves = flatten(model.abstract())
    size = {k: x.size * x.dtype.itemsize for k, x in leaves.items()}
    kernels = 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    stored = sum(size[k] for k in leaves if "/kernel/" in k)
    assert stored * 8 / kernels == pytest.approx(bits, rel=2e-3)
    assert sum(size.values()) - stored == 2 * (6_738_415_616 - kernels)


@pytest.mark.parametrize("kind", KINDS)
def test_no_wide_kernel_waits_for_the_backward_pass(kind):
    """Layers of 1 MiB in fp32: sixteen more of them add far less than sixteen to the memory, and
    sixteen of them need that of a few: neither kernels are kept, nor the table at their size."""
    how, dim = Quantization(kind), 512

    def loss(x, parts):
        step = lambda x, layer: (jnp.tanh(multiply(x, *layer)), None)  # noqa: E731
        return jax.lax.scan(step, x, parts)[0].sum()

    def temporary(layers):
        kernels = jax.ShapeDtypeStruct((layers, dim, dim), jnp.float32)
        parts = jax.eval_shape(lambda k: quantize(k, how), kernels)
        x = jax.ShapeDtypeStruct((8, dim), jnp.float32)
        compiled = jax.jit(jax.grad(loss)).lower(x, parts).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporary(32) - temporary(16) < 4 * 2**20
    assert temporary(16) < 4 * 2**20


@pytest.mark.parametrize(("kind", "bits"), [("nf4", 4.5), ("int8", 8.03)])
def test_codes_are_gathered_and_not_what_is_made_of_them(kind, bits):
    """Forward and backward pass over a kernel that lies in eight parts: its codes and scales are
    sent, twice, where full width would be 32 bits. The result is that of one device."""
    mesh, (n_in, n_out) = make_mesh(fsdp=4, tensor=2), (256, 512)
    rng = np.random.default_rng(0)
    kernel, x = rng.normal(size=(n_in, n_out)), rng.normal(size=(16, n_in))
    parts = quantize(jnp.asarray(kernel, jnp.float32), Quantization(kind))
    axes = ("embed", "mlp")
    names = {"codes": axes, "scales": (None if kind == "int8" else "embed", "mlp"),
             "x": ("batch", None)}  # fmt: skip
    values = {"codes": parts[0], "scales": parts[1], "x": jnp.asarray(x, jnp.float32)}

    def loss(values):
        return (multiply(values["x"], values["codes"], values["scales"], axes) ** 2).sum()

    def step(values):
        return jax.value_and_grad(lambda x: loss({**values, "x": x}))(values["x"])

    places = shardings(names, values, mesh)
    with jax.sharding.set_mesh(mesh):
        compiled = jax.jit(step, in_shardings=(places,)).lower(values).compile()
        sharded = compiled(jax.device_put(values, places))
    sent = collectives(compiled.as_text())["all-gather"].bytes
    assert sent * 8 <= 2 * bits * n_in * n_out / 2 + 8 * x.nbytes  # over tensor=2 nothing is
    np.testing.assert_allclose(sharded[0], step(values)[0], rtol=1e-5)
    np.testing.assert_allclose(sharded[1], step(values)[1], rtol=1e-4, atol=1e-3)


def test_wrong_options_name_the_key(world):
    config = world.llama_config()
    for options, words in [
        ({"kind": "nf5"}, "quantize.kind is 'nf5'; it must be one of int8, nf4, none"),
        ({"block": 0}, "quantize.block is 0"),
        ({"targets": ("lm_head",)}, "quantize.targets names 'lm_head'"),
    ]:
        with pytest.raises(ConfigError, match=words):
            models.build(config, quantize=options)
    assert models.build(config, quantize={"kind": "none"}).variant == models.build(config).variant
    odd = world.llama_config(intermediate_size=25)
    with pytest.raises(ConfigError, match="25 input features.*int8"):
        models.build(odd, quantize={})
    model = models.build(config, quantize={})
    with pytest.raises(ConfigError, match="quantised"):
        adapt.attach(model, model.abstract(), full=("layers/mlp/up/*",), targets=("q_proj",))
