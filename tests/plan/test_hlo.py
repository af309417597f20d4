"""Collectives read from programs whose traffic is known."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from aa_jax.plan.hlo import Traffic, collectives, custom_calls
from aa_jax.sharding import make_mesh


def test_a_scan_that_gathers_its_weights_is_counted_once_per_layer():
    mesh = make_mesh(fsdp=8)
    place = functools.partial(NamedSharding, mesh)
    weights = jax.ShapeDtypeStruct((5, 64, 64), jnp.float32, sharding=place(P(None, "fsdp")))
    rows = jax.ShapeDtypeStruct((8, 64), jnp.float32, sharding=place(P("fsdp")))

    def layers(w, x):
        def body(c, k):
            k = jax.lax.with_sharding_constraint(k, place(P()))
            c = jax.lax.with_sharding_constraint(jnp.tanh(c @ k), place(P("fsdp")))
            return c, None

        return jax.lax.scan(body, x, w)[0]

    text = jax.jit(layers, out_shardings=place(P("fsdp"))).lower(weights, rows).compile().as_text()
    # 5 layers of 64 x 64 floats; the compiler may gather all of them before the loop instead.
    assert sum(t.bytes for t in collectives(text).values()) == 5 * 64 * 64 * 4


LOOP = """
%body (p: (f32[8], s32[])) -> (f32[8], s32[]) {
  %one = s32[] constant(STEP)
  %p = (f32[8], s32[]) parameter(0)
  %x = f32[8]{0} get-tuple-element(%p), index=0
  %i = s32[] get-tuple-element(%p), index=1
  %next = s32[] add(%i, %one)
  %g = f32[64]{0} all-gather(%x), channel_id=1, replica_groups={{0,1,2,3,4,5,6,7}}, dimensions={0}
  %s = f32[8]{0} slice(%g), slice={[0:8]}
  ROOT %r = (f32[8]{0}, s32[]) tuple(%s, %next)
}

%condition (p.1: (f32[8], s32[])) -> pred[] {
  %bound = s32[] constant(12)
  %p.1 = (f32[8], s32[]) parameter(0)
  %i.1 = s32[] get-tuple-element(%p.1), index=1
  ROOT %less = pred[] compare(%i.1, %bound), direction=LT
}

ENTRY %main (a: f32[8], n: s32[]) -> f32[8] {
  %a = f32[8]{0} parameter(0)
  %n = s32[] parameter(1)
  %t = (f32[8]{0}, s32[]) tuple(%a, %n)
  %w = (f32[8]{0}, s32[]) while(%t), condition=%condition, body=%bodyKNOWN
  %out = f32[8]{0} get-tuple-element(%w), index=0
  %b = (f32[8]{0}, f32[64]{0}) all-gather-start(%out), channel_id=2, replica_groups=[1,8]<=[8]
  %d = f32[64]{0} all-gather-done(%b)
  %s = f32[1]{0} reduce-scatter(%out), channel_id=3, replica_groups=mesh['x'=2,'y'=8] {'y'}
  ROOT %done = f32[8]{0} copy(%out)
}
"""


@pytest.mark.parametrize(
    ("step", "known", "trips"),
    [("1", "", 12), ("2", "", 6), ("5", "", 3),
     ("1", ', backend_config={"known_trip_count":{"n":"7"}}', 7)],
)  # fmt: skip
def test_trip_counts_and_sizes(step, known, trips):
    found = collectives(LOOP.replace("STEP", step).replace("KNOWN", known))
    assert found["all-gather"] == Traffic(trips + 1, (trips + 1) * 64 * 4)
    assert found["reduce-scatter"] == Traffic(1, 8 * 4)  # the whole operand


def test_pieces_of_one_collective_count_once():
    piece = "  %h = f32[64]{0} all-gather(%x), channel_id=2, replica_groups={{0,1}}\n"
    text = LOOP.replace("STEP", "1").replace("KNOWN", "")
    text = text.replace("  %s = f32[8]{0} slice", piece + "  %s = f32[8]{0} slice")
    assert collectives(text)["all-gather"].count == 13


def test_custom_calls_by_name():
    found = custom_calls('x = custom-call(), custom_call_target="a"\n stablehlo.custom_call @b(')
    assert found == {"a": 1, "b": 1}
