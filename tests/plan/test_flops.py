# SPDX-License-Identifier: Apache-2.0
"""Executed flops: against counts by hand, and against XLA's own where that one is right (programs without loops)."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from jft.plan import hlo_flops, hlo_text

B, D, L = 16, 32, 6
ONE = 2 * B * D * D  # flops of x_BD @ w_DD


def compiled(f: Callable[..., Any], *shapes: tuple[int, ...]) -> Any:
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return jax.jit(f).lower(*arguments).compile()


def counted(program: Any, **options: Any) -> hlo_flops.Flops:
    return hlo_flops.count(hlo_flops.Walk(hlo_text.parse(program.as_text()), **options))


def chain(x: jax.Array, ws: jax.Array) -> jax.Array:
    return lax.scan(jax.checkpoint(lambda x, w: (jnp.tanh(x @ w), None)), x, ws)[0].sum()


def test_without_loops_as_xla_counts() -> None:
    def f(x_BD: jax.Array, w_DF: jax.Array, image: jax.Array, kernel: jax.Array) -> Any:
        pixels = lax.conv_general_dilated(image, kernel, (2, 1), "SAME", rhs_dilation=(1, 2))
        return x_BD @ w_DF, jnp.einsum("bf,bd->fd", x_BD @ w_DF, x_BD), pixels

    program = compiled(f, (B, D), (D, 48), (2, 3, 9, 8), (5, 3, 3, 2))
    found = counted(program)
    assert not found.uncounted
    # Nothing else computes here, so XLA's count of all operations is that of the products.
    assert found.total == program.cost_analysis()["flops"]


def test_a_scan_with_recomputation_by_hand() -> None:
    found = counted(compiled(jax.grad(chain, argnums=(0, 1)), (B, D), (L, D, D)))
    assert found.total == 4 * L * ONE  # forward, again, and two gradients
    parts = found.by_part()
    assert parts == {"forward": L * ONE, "recomputation": L * ONE, "backward": 2 * L * ONE}
    assert not found.uncounted and not found.stated


def test_no_gradient_of_what_is_frozen() -> None:
    found = counted(compiled(jax.grad(chain), (B, D), (L, D, D)))
    assert found.total == 3 * L * ONE


def test_loops_in_loops() -> None:
    def f(x: jax.Array, ws: jax.Array) -> jax.Array:
        def outer(x: jax.Array, w: jax.Array) -> tuple[jax.Array, None]:
            return lax.fori_loop(2, 9, lambda i, x: jnp.tanh(x @ w), x) + x @ w.T, None

        return lax.scan(outer, x, ws)[0]

    assert counted(compiled(f, (B, D), (L, D, D))).total == L * (7 + 1) * ONE


def test_the_dearest_branch_or_the_shares_that_are_given() -> None:
    def f(x: jax.Array, w: jax.Array, n: jax.Array) -> jax.Array:
        return lax.switch(n[0].astype(int), [lambda: x, lambda: x @ w, lambda: x @ w @ w.T @ w])

    program = compiled(f, (B, D), (D, D), (1,))
    assert counted(program).total == 3 * ONE
    shares = {"jit\\(f\\)": (0.5, 0.25, 0.25)}
    assert counted(program, branches=shares).total == (0.25 + 0.25 * 3) * ONE


def until(n: jax.Array, x: jax.Array, w: jax.Array) -> jax.Array:
    return lax.fori_loop(0, n[0].astype(int), lambda i, x: jnp.tanh(x @ w), x)


def test_a_loop_of_unknown_length_is_reported_and_one_with_a_bound_counted() -> None:
    found = counted(compiled(until, (1,), (B, D), (D, D)))
    assert len(found.uncounted) == 1 and "trips nothing tells" in found.uncounted[0]

    def bounded(n: jax.Array, x: jax.Array, w: jax.Array) -> jax.Array:
        with jax.named_scope("at_most_5_trips"):
            return until(n, x, w)

    found = counted(compiled(bounded, (1,), (B, D), (D, D)))
    assert found.total == 5 * ONE
    assert not found.uncounted and "at most 5 trips" in found.stated[0]


def test_a_bound_is_of_its_own_loop_alone() -> None:
    def f(n: jax.Array, x: jax.Array, w: jax.Array) -> jax.Array:
        with jax.named_scope("at_most_5_trips"):
            return lax.fori_loop(0, n[0].astype(int), lambda i, x: until(n, x, w), x)

    found = counted(compiled(f, (1,), (B, D), (D, D)))
    assert len(found.stated) == 1 and len(found.uncounted) == 1
    assert found.total == 5 * ONE


KERNELS = """\
HloModule kernels, is_scheduled=true, num_partitions=1

ENTRY %main (q: bf16[2,8,64]) -> bf16[2,8,64] {
  %q = bf16[2,8,64]{2,1,0} parameter(0)
  %place = bf16[2,8,64]{2,1,0} custom-call(), custom_call_target="AllocateBuffer", metadata={op_name="jit(f)/jft_kernel_flops_100_dkv_250/x"}
  %mha_fwd.1 = bf16[2,8,64]{2,1,0} custom-call(%q), custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
"note":"a \\"quoted\\" line }"
}}, metadata={op_name="jit(f)/jft_kernel_flops_100_dkv_250/mha_fwd/pallas_call"}
  %mha_dkv.1 = (bf16[2,8,64]{2,1,0}, f32[8]{0}) custom-call(%q, %mha_fwd.1), custom_call_target="tpu_custom_call", metadata={op_name="jit(f)/transpose(jvp(jft_kernel_flops_100_dkv_250))/mha_dkv/pallas_call"}
  ROOT %silent.1 = bf16[2,8,64]{2,1,0} custom-call(%q), custom_call_target="tpu_custom_call", metadata={op_name="jit(f)/silent/pallas_call"}
}
"""


def test_kernels_say_what_they_compute_or_are_reported() -> None:
    module = hlo_text.parse(KERNELS)
    found = hlo_flops.count(hlo_flops.Walk(module))
    assert {own.name: own.flops for own in found.products} == {"mha_fwd.1": 100, "mha_dkv.1": 250}
    assert len(found.uncounted) == 1 and found.uncounted[0].startswith("silent.1")

    formula = {"^silent": lambda shapes, op_name: 3 * shapes[0].elements}
    found = hlo_flops.count(hlo_flops.Walk(module, kernels=formula))
    assert found.total == 350 + 3 * 2 * 8 * 64 and not found.uncounted


def test_a_window_over_padding_counts_where_there_is_input() -> None:
    # What TPU makes of [2,512,512] x [512,4,128]: the 4 is a window that slides over three zeros on each side.
    text = """\
HloModule window, is_scheduled=true

ENTRY %main (x: bf16[2,512,512,1], w: bf16[4,128,512,1]) -> bf16[2,512,4,128] {
  %x = bf16[2,512,512,1]{1,2,3,0} parameter(0)
  %w = bf16[4,128,512,1]{2,1,0,3} parameter(1)
  ROOT %c = bf16[2,512,4,128]{3,1,2,0} convolution(%x, %w), window={size=1x4 pad=0_0x3_3 rhs_reversal=0x1}, dim_labels=0bf1_1oi0->0b1f
}
"""
    found = hlo_flops.count(hlo_flops.Walk(hlo_text.parse(text)))
    assert found.total == 2 * (2 * 512) * 512 * (4 * 128)


@pytest.mark.parametrize(
    ("start", "bound", "step", "way"),
    [
        (0, 6, 1, "LT"),
        (0, 7, 2, "LT"),
        (5, 0, -2, "GT"),
        (0, 6, 2, "LE"),
        (6, 1, -1, "GE"),
        (0, 8, 4, "NE"),
        (3, 3, 1, "LT"),
    ],
)
def test_trips_are_those_of_the_loop_run(start: int, bound: int, step: int, way: str) -> None:
    compare = {
        "LT": int.__lt__,
        "LE": int.__le__,
        "GT": int.__gt__,
        "GE": int.__ge__,
        "NE": int.__ne__,
    }
    i, ran = start, 0
    while compare[way](i, bound):
        i, ran = i + step, ran + 1
    text = f"""\
HloModule loop, is_scheduled=true

%body (t: (s32[], s32[])) -> (s32[], s32[]) {{
  %t = (s32[], s32[]) parameter(0)
  %i = s32[] get-tuple-element(%t), index=0
  %end = s32[] get-tuple-element(%t), index=1
  %step = s32[] constant({step})
  %next = s32[] add(%i, %step)
  ROOT %out = (s32[], s32[]) tuple(%next, %end)
}}

%inner (a: s32[], b: s32[]) -> pred[] {{
  %a = s32[] parameter(0)
  %b = s32[] parameter(1)
  ROOT %less = pred[] compare(%a, %b), direction={way}
}}

%condition (t.1: (s32[], s32[])) -> pred[] {{
  %t.1 = (s32[], s32[]) parameter(0)
  %i.1 = s32[] get-tuple-element(%t.1), index=0
  %end.1 = s32[] get-tuple-element(%t.1), index=1
  ROOT %test = pred[] fusion(%i.1, %end.1), kind=kLoop, calls=%inner
}}

ENTRY %main () -> (s32[], s32[]) {{
  %zero = s32[] constant({start})
  %copied = s32[] copy(%zero)
  %bound = s32[] constant({bound})
  %first = (s32[], s32[]) tuple(%copied, %bound)
  ROOT %loop = (s32[], s32[]) while(%first), condition=%condition, body=%body
}}
"""
    walk = hlo_flops.Walk(hlo_text.parse(text))
    assert walk.trips.trips(walk.module.entry.root).count == ran
