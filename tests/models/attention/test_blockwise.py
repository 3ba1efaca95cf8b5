# SPDX-License-Identifier: Apache-2.0
"""Blockwise attention is plain attention: outputs, gradients, and what it never forms."""

import functools

import attention_cases as cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jft.models import attention
from jft.models.attention import blockwise

CASES = {
    "odd length, no groups": cases.Case(77, 77, kv_heads=4),
    "one kv head, window, soft cap, sinks": cases.Case(
        130, 130, window=20, softcap=5.0, sinks=True, kv_heads=1
    ),
    "part of the queries": cases.Case(40, 130, start=50, window=60),
}


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blockwise, "SMALLEST", 16)


@pytest.mark.parametrize("name", CASES)
def test_equals_plain(name: str, x64: None, quick_compiles: None, small_blocks: None) -> None:
    cases.assert_same(
        CASES[name], 1e-13, implementation="blockwise"
    )  # float64's rounding of sums of 130


@pytest.mark.slow
def test_equals_plain_in_blocks_of_their_own_size(x64: None, quick_compiles: None) -> None:
    cases.assert_same(cases.Case(300, 300), 1e-13, implementation="blockwise")


def test_start_may_be_traced(x64: None, quick_compiles: None, small_blocks: None) -> None:
    case = cases.Case(40, 130, start=50, window=60, sinks=True)
    cases.assert_same(case, 1e-13, implementation="blockwise", traced=True)


@pytest.mark.slow
def test_bfloat16_within_its_rounding(quick_compiles: None, small_blocks: None) -> None:
    # Weights and scores' gradients are rounded to 8 bits on both sides, not alike: a few of 2**-8, less for sums.
    case = cases.Case(77, 77, dtype=jnp.bfloat16, sinks=True)
    cases.assert_same(case, 2**-6, implementation="blockwise")


def test_padding_is_finite_where_it_sees_nothing(quick_compiles: None) -> None:
    c, x = cases.config(), jnp.ones((1, 20, 4, 8))
    queries, keys = jnp.full((1, 20), 7), jnp.full((1, 20), 8)

    def total(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        run = functools.partial(attention.attend, c, window=None, implementation="blockwise")
        return run(q, k, v, queries, keys).sum()

    for gradient in jax.jit(jax.grad(total, argnums=(0, 1, 2)))(x, x, x):
        assert not np.asarray(gradient).any()


def gradient_jaxpr(implementation: str, T: int, policy: object = None) -> object:
    """Of two scanned layers of attention under `jax.checkpoint`."""
    c = cases.config()
    segments_BT = jnp.ones((1, T), jnp.int32)

    def layer(x_BTNH: jax.Array, _: None) -> tuple[jax.Array, None]:
        q, k, v = (jax.ad_checkpoint.checkpoint_name(x, "heads") for x in (x_BTNH,) * 3)
        heads = q, k[:, :, :2], v[:, :, :2]
        out = attention.attend(
            c, *heads, segments_BT, segments_BT, window=None, implementation=implementation
        )
        return x_BTNH + out, None

    if policy:
        layer = jax.checkpoint(layer, policy=policy, prevent_cse=False)
    x_BTNH = jnp.ones((1, T, 4, 8))
    loss = lambda x: jax.lax.scan(layer, x, None, length=2)[0].sum()  # noqa: E731
    return jax.make_jaxpr(jax.grad(loss))(x_BTNH).jaxpr


def test_scores_are_never_formed() -> None:
    T = 2048

    def scores(equation: object) -> int:
        return sum(out.aval.size >= T * T for out in equation.outvars)

    assert cases.each(gradient_jaxpr("plain", T), scores)
    assert not cases.each(gradient_jaxpr("blockwise", T), scores)


@pytest.mark.parametrize("implementation", ["plain", "blockwise"])
def test_flops_are_those_of_the_program(implementation: str) -> None:
    T, two_layers = 1000, 2
    forward, backward = attention.flops(implementation, 1, T, T, 4, 8)
    executed = cases.each(gradient_jaxpr(implementation, T), cases.product_flops)
    assert executed == two_layers * (forward + backward)


def test_a_saving_policy_spares_the_backward_pass_the_forward_one() -> None:
    T, two_layers = 256, 2
    forward, backward = attention.flops("blockwise", 1, T, T, 4, 8)
    policies = jax.checkpoint_policies
    heads = policies.save_only_these_names("heads")
    both = policies.save_from_both_policies(heads, attention.saves)
    executed = {
        policy: cases.each(gradient_jaxpr("blockwise", T, policy), cases.product_flops)
        for policy in (heads, both)
    }
    assert executed[both] == two_layers * (forward + backward)
    assert executed[heads] == two_layers * (2 * forward + backward)
