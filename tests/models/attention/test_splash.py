# SPDX-License-Identifier: Apache-2.0
"""TPU's kernel, interpreted on CPU, is plain attention; and its flops are those of its own tables."""

import attention_cases as cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jft.models import attention
from jft.models.attention import splash

# Sums of up to 256 products in float32, and exp of scores up to 30: a few 1e-6 of the largest number.
FLOAT32 = 1e-5


def same(case: cases.Case, tolerance: float = FLOAT32, **options: object) -> None:
    cases.assert_same(case, tolerance, implementation="splash", interpret=True, **options)


def test_equals_plain(quick_compiles: None) -> None:
    same(cases.Case(130, 130, window=20, softcap=5.0, sinks=True, dtype=jnp.float32))


def test_a_part_whose_start_is_traced(quick_compiles: None) -> None:
    same(cases.Case(128, 256, start=128, window=140, dtype=jnp.float32), traced=True)


def test_a_part_that_is_not_of_whole_blocks_is_an_error() -> None:
    case = cases.Case(100, 200, start=100, dtype=jnp.float32)
    with pytest.raises(ValueError, match="100 of 200 queries"):
        same(case, traced=True)


@pytest.mark.slow
@pytest.mark.parametrize("kv_heads", [1, 4])
def test_heads_and_odd_lengths(kv_heads: int) -> None:
    same(cases.Case(77, 77, kv_heads=kv_heads, dtype=jnp.float32))


@pytest.mark.slow
def test_a_part_whose_start_is_known() -> None:
    same(cases.Case(40, 130, start=50, window=60, dtype=jnp.float32))


@pytest.mark.slow
def test_two_backward_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(splash, "PART_BYTES", 0)
    monkeypatch.setattr(splash, "BLOCK", 128)
    same(cases.Case(300, 300, window=200, dtype=jnp.float32))


@pytest.mark.slow
def test_bfloat16_within_its_rounding() -> None:
    # As for blockwise; the kernel rounds the sinks' gradient term by term, too.
    same(cases.Case(77, 77, sinks=True, dtype=jnp.bfloat16), 2**-5)


def test_a_saving_policy_spares_the_backward_pass_the_forward_kernel() -> None:
    c, segments_BT = cases.config(), jnp.ones((1, 128), jnp.int32)

    def layer(x: jax.Array) -> jax.Array:
        q = jax.ad_checkpoint.checkpoint_name(x, "heads")
        heads = q, q[:, :, :2], q[:, :, :2]
        options = {"window": None, "implementation": "splash"}
        return attention.attend(c, *heads, segments_BT, segments_BT, **options).sum()

    def kernels(policy: object) -> int:
        gradient = jax.grad(jax.checkpoint(layer, policy=policy))
        program = jax.make_jaxpr(gradient)(jnp.ones((1, 128, 4, 8))).jaxpr
        return cases.each(program, lambda equation: equation.primitive.name == "pallas_call")

    heads = jax.checkpoint_policies.save_only_these_names("heads")
    assert kernels(heads) == 3  # forward, again, backward
    assert kernels(jax.checkpoint_policies.save_from_both_policies(heads, attention.saves)) == 2


@pytest.mark.parametrize("window", [None, 300])
@pytest.mark.parametrize("part_bytes", [0, 2**19])  # two backward kernels and one
def test_flops_are_those_of_the_kernels_own_tables(
    window: int | None, part_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(splash, "PART_BYTES", part_bytes)
    monkeypatch.setattr(splash, "BLOCK", 256)
    B, N, H, start = 3, 4, 8, 800
    own = splash.sizes(1200, 2000, H, jnp.bfloat16, window)
    kernel = splash._kernel(own, start, 1, N, window, None, False)
    assert own.fused == (kernel.dq_mask_info is None) == bool(part_bytes)

    def executed(products: int, table: object, block_k: int) -> int:
        count = np.count_nonzero(table.block_mask) if table else 0
        return 2 * products * B * N * H * own.block_q * block_k * count

    assert splash.flops(own, B, N, H, window, start) == (
        executed(2, kernel.fwd_mask_info, own.block_k),
        executed(5 if part_bytes else 4, kernel.dkv_mask_info, own.block_k_backward),
        executed(3, kernel.dq_mask_info, own.block_k),
    )


def test_fewer_flops_decide_on_one_backward_kernel() -> None:
    def fused(length: int, window: int | None, H: int = 128) -> bool:
        return splash.sizes(length, length, H, jnp.bfloat16, window).fused

    assert fused(8192, None)
    assert not fused(8192, 256)  # a part of 1,024 keys is mostly outside the window
    assert fused(16384, None) and not fused(32768, None)  # eight parts of 4,096 would not fit
    assert fused(8192, None, 256) and not fused(16384, None, 256)


@pytest.mark.parametrize("length", [1, 128, 130, 640, 1152, 2048, 2176, 5000])
def test_rows_are_filled_to_whole_blocks_and_little_more(length: int) -> None:
    own = splash.sizes(length, length, 64, jnp.bfloat16, None)
    assert own.queries % own.block_q == own.keys % own.block_k_backward == 0
    assert length <= own.queries < max(length * 9 / 8 + splash.LANES, splash.LANES + 1)
    assert own.queries - length < own.block_q  # a block of filling alone would see nothing
