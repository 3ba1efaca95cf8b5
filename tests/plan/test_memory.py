# SPDX-License-Identifier: Apache-2.0
"""The peak by live ranges: small programs by hand, and compiled ones against the compiler's own figure."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jft.plan import hlo_memory, hlo_text


def peak(text: str, arguments: tuple[str, ...] = ()) -> hlo_memory.Peak:
    return hlo_memory.Liveness(hlo_text.parse(text), arguments).peak()


def test_padding_of_tiles_and_memory_that_is_not_the_devices() -> None:
    text = """\
HloModule padded, is_scheduled=true, input_output_alias={ {}: (0, {}, may-alias) }

ENTRY %main (a: f32[10,200], b: bf16[10,200], c: s4[100,100], h: f32[1000]) -> f32[10,200] {
  %a = f32[10,200]{1,0:T(8,128)} parameter(0)
  %b = bf16[10,200]{0,1:T(8,128)(2,1)} parameter(1)
  %c = s4[100,100]{1,0:T(64,128)(8,1)E(4)} parameter(2)
  %h = f32[1000]{0:T(1024)S(5)} parameter(3)
  %fast = f32[10,200]{1,0:T(8,128)S(1)} negate(%a)
  ROOT %out = f32[10,200]{1,0:T(8,128)} negate(%fast)
}
"""
    found = peak(text, ("weights", "rows"))
    sizes = {own.name: own.bytes for own in found.buffers}
    assert sizes == {"weights": 16 * 256 * 4, "rows": 200 * 128 * 2, "c": 128 * 128 // 2}
    assert found.bytes == sum(sizes.values())  # the result is donated memory


LOOP = """\
HloModule loop, is_scheduled=true

%body (t: (s32[], f32[64], f32[256])) -> (s32[], f32[64], f32[256]) {
  %t = (s32[], f32[64]{0}, f32[256]{0}) parameter(0)
  %i = s32[] get-tuple-element(%t), index=0
  %x = f32[64]{0} get-tuple-element(%t), index=1
  %all = f32[256]{0} get-tuple-element(%t), index=2
  %wide = f32[1024]{0} broadcast(%i), dimensions={}
  %new = f32[64]{0} slice(%wide), slice={[0:64]}
  %written = f32[256]{0} dynamic-update-slice(%all, %new, %i)
  ROOT %out = (s32[], f32[64]{0}, f32[256]{0}) tuple(%i, %new, %written)
}

%condition (t.1: (s32[], f32[64], f32[256])) -> pred[] {
  %t.1 = (s32[], f32[64]{0}, f32[256]{0}) parameter(0)
  ROOT %yes = pred[] constant(true)
}

ENTRY %main (n: f32[64]) -> f32[256] {
  %n = f32[64]{0} parameter(0)
  %zero = s32[] constant(0)
  %dead = f32[512]{0} broadcast(%n), dimensions={0}
  %first = f32[64]{0} slice(%dead), slice={[0:64]}
  %empty = f32[256]{0} broadcast(%zero), dimensions={}
  %start = (s32[], f32[64]{0}, f32[256]{0}) tuple(%zero, %first, %empty)
  %loop = (s32[], f32[64]{0}, f32[256]{0}) while(%start), condition=%condition, body=%body
  ROOT %all.1 = f32[256]{0} get-tuple-element(%loop), index=2
}
"""


def test_a_loop_carries_its_arrays_in_place() -> None:
    found = peak(LOOP)
    # The argument, what the loop carries, and the widest moment of its body; what died before it is gone.
    assert found.bytes == 4 * (64 + 64 + 256 + 1024)
    assert [own.name for own in found.buffers] == ["wide", "empty", "n", "first"]
    assert {own.name: own.what for own in found.buffers}["empty"] == "result"


def layers(x_BD: jax.Array, w_LDF: jax.Array, v_LFD: jax.Array) -> jax.Array:
    def one(x: jax.Array, wv: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        return x + jax.nn.silu(x @ wv[0]) @ wv[1], None

    return jnp.square(lax.scan(jax.checkpoint(one), x_BD, (w_LDF, v_LFD))[0]).sum()


def step(w: jax.Array, v: jax.Array, moment: Any, x: jax.Array) -> Any:
    grads = jax.grad(layers, argnums=(1, 2))(x, w, v)
    moment = jax.tree.map(lambda m, g: 0.9 * m + g, moment, grads)
    return w - moment[0], v - moment[1], moment


def test_a_training_step_against_the_compilers_allocation() -> None:
    L, D, F, B = 6, 256, 512, 1024
    w, v, x = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((L, D, F), (L, F, D), (B, D)))
    program = jax.jit(step, donate_argnums=(0, 1, 2)).lower(w, v, (w, v), x).compile()
    stats = program.memory_analysis()
    # On CPU what is reported as the peak leaves temporaries out: all that is allocated is the truth.
    truth = stats.argument_size_in_bytes + stats.temp_size_in_bytes
    truth += stats.output_size_in_bytes - stats.alias_size_in_bytes
    found = peak(program.as_text())
    # A few per cent: the compiler also puts a result in the place of a dead operand, and packs with gaps.
    assert abs(found.bytes / truth - 1) < 0.05
    named = {own.name for own in found.buffers if own.what == "argument"}
    assert named == {"w", "v", "moment[0]", "moment[1]", "x"}
