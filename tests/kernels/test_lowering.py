"""Programs lowered for platforms that are not here, and the custom calls they may hold."""

import functools

import jax
import jax.numpy as jnp
import pytest

from aa_jax import models, objectives
from aa_jax.kernels.attention import attention
from aa_jax.kernels.attention import pallas_tpu as attention_tpu
from aa_jax.kernels.linear_logprob import linear_logprob
from aa_jax.kernels.linear_logprob import pallas_tpu as logprob_tpu
from aa_jax.kernels.linear_logprob.spec import Spec


def text(function, shapes, platform):
    abstract = [jax.ShapeDtypeStruct(*shape) for shape in shapes]
    return jax.jit(function).trace(*abstract).lower(lowering_platforms=(platform,)).as_text()


LOGPROB = (
    ((600, 96), jnp.bfloat16), ((5000, 96), jnp.bfloat16), ((600,), jnp.int32), ((600,), bool),
)  # fmt: skip
ATTENTION = (((2, 300, 4, 64), jnp.bfloat16),) + (((2, 300, 2, 64), jnp.bfloat16),) * 2
INTERVALS = (((2, 300, 4), jnp.int32),)


def logprob_gradient(call):
    def loss(hidden, head, targets, mask):
        out = call(hidden, head, targets, mask)
        return out.logps.sum() + out.entropy.sum()

    return jax.grad(loss, (0, 1))


def attention_gradient(call):
    return jax.grad(lambda *x: call(*x).astype(jnp.float32).sum(), (0, 1, 2))


def test_tpu_programs_hold_the_kernels():
    spec = Spec(need_entropy=True)
    run = logprob_gradient(lambda *x: logprob_tpu.linear_logprob(*x, None, spec))
    found = text(run, LOGPROB, "tpu")
    assert found.count("@tpu_custom_call") == 2
    run = attention_gradient(lambda *x: attention_tpu.attention(*x, 0.1))
    assert text(run, ATTENTION + INTERVALS, "tpu").count("@tpu_custom_call") == 3


@pytest.mark.parametrize("platform", ["cuda", "rocm", "ascend"])
def test_portable_programs_hold_no_custom_call(platform):
    run = logprob_gradient(
        lambda h, w, t, m: linear_logprob(h, w, t, mask=m, need_entropy=True, impl="xla", chunk=128)
    )
    assert "custom_call" not in text(run, LOGPROB, platform)
    run = attention_gradient(
        lambda q, k, v, i: attention(q, k, v, intervals=i, impl="xla"),
    )
    assert "custom_call" not in text(run, ATTENTION + INTERVALS, platform)


def test_a_dpo_gradient_for_an_unknown_platform_holds_no_custom_call():
    config = dict(
        model_type="llama", architectures=["LlamaForCausalLM"], vocab_size=64, hidden_size=16,
        intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
    )  # fmt: skip
    model = models.build(config)
    objective = objectives.dpo(model, beta=0.1)
    ints = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.int32)
    floats = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    batch = {
        "tokens": ints((2, 12)), "positions": ints((2, 12)), "intervals": ints((2, 12, 4)),
        "target_positions": ints((2, 2, 4)), "targets": ints((2, 2, 4)),
        "loss_mask": floats((2, 2, 4)), "sequence_mask": floats((2, 2)),
        "last_positions": ints((2, 2)), "ref_logps": floats((2, 2)),
    }  # fmt: skip
    step = jax.jit(jax.grad(lambda params, batch: objective(params, batch)[0]))
    lowered = step.trace(model.abstract(), batch).lower(lowering_platforms=("ascend",))
    assert "custom_call" not in lowered.as_text()
