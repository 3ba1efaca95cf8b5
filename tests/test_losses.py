# SPDX-License-Identifier: Apache-2.0
"""The chunked cross-entropy beside the plain one: weights of any size, bfloat16, what it does not compute."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jft import losses, matmul, quant
from jft.models import decoder, families

B, T, D, V = 2, 9, 5, 13


def arrays(dtype: Any) -> tuple[Any, ...]:
    rng = np.random.default_rng(0)
    kernel = jnp.asarray(rng.normal(size=(D, V)), dtype)
    x_BTD = jnp.asarray(rng.normal(size=(B, T, D)), dtype)
    targets_BT = jnp.asarray(rng.integers(0, V, size=(B, T)), jnp.int32)
    weights_BT = jnp.asarray(rng.choice([0.0, 0.5, 1.0, 2.0], size=(B, T)), jnp.float32)
    return kernel, x_BTD, targets_BT, weights_BT


def head(kernel: jax.Array, _: Any, x: jax.Array) -> jax.Array:
    return jnp.einsum(
        "md,dv->mv", x, kernel, preferred_element_type=jnp.promote_types(x.dtype, "f4")
    )


@functools.partial(jax.jit, static_argnums=0)
def chunked(chunk: int, kernel: Any, x: Any, targets: Any, weights: Any) -> jax.Array:
    return losses.cross_entropy(head, kernel, {}, x, targets, weights, chunk=chunk)[0]


@jax.jit
def plain(kernel: Any, x: Any, targets: Any, weights: Any) -> jax.Array:
    logits = head(kernel, None, x.reshape(-1, D)).reshape(B, T, V)
    picked = jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], axis=-1)
    return -jnp.sum(weights * picked[..., 0])


_chunked_gradients = jax.jit(jax.value_and_grad(chunked, (1, 2)), static_argnums=0)
_plain_gradients = jax.jit(jax.value_and_grad(plain, (0, 1)))


@pytest.mark.parametrize("chunk", [1, 4, 5, 18, 64])
def test_weights_of_any_size_in_double_precision(chunk: int, x64: None) -> None:
    kernel, x, *rest = arrays("float64")
    got = _chunked_gradients(chunk, kernel, x, *rest)
    want = _plain_gradients(kernel, x, *rest)
    # Sums of tens of doubles in another order.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12), got, want)


@pytest.mark.parametrize("chunk", [5, 64])
def test_bfloat16_sums_in_float32(chunk: int) -> None:
    """The loss and its sum are float32; gradients are bfloat16 and differ by its rounding (2^-8) alone."""
    kernel, x, *rest = arrays("bfloat16")
    loss, (dk, dx) = _chunked_gradients(chunk, kernel, x, *rest)
    want, grads = _plain_gradients(*(a.astype("f4") for a in (kernel, x)), *rest)
    assert loss.dtype == jnp.float32 and dk.dtype == dx.dtype == jnp.bfloat16
    np.testing.assert_allclose(loss, want, rtol=1e-5)
    for got, exact in zip((dk, dx), grads, strict=True):
        scale = np.abs(exact).max()
        np.testing.assert_allclose(got.astype("f4"), exact, rtol=0, atol=2**-6 * scale)


def test_the_cotangent_scales_the_gradient() -> None:
    kernel, x, *rest = arrays("float32")
    scaled = lambda k, by: by * chunked(4, k, x, *rest)  # noqa: E731
    once, thrice = (np.asarray(jax.jit(jax.grad(scaled))(kernel, by)) for by in (1.0, 3.0))
    np.testing.assert_allclose(thrice, 3 * once, rtol=1e-6)


def test_untrained_positions_are_never_looked_at() -> None:
    """A hidden state that is not a number, where nothing is trained, reaches neither loss nor gradient."""
    kernel, x, targets, weights = arrays("float32")
    assert (weights == 0).sum() >= 2
    spoiled = jnp.where(weights[..., None] == 0, jnp.nan, x)
    chunk = 1  # a chunk holds trained positions only
    got = _chunked_gradients(chunk, kernel, spoiled, targets, weights)
    want = _chunked_gradients(chunk, kernel, x, targets, weights)
    jax.tree.map(np.testing.assert_array_equal, got, want)
    assert (got[1][1][weights == 0] == 0).all()


def test_no_array_has_the_size_of_all_logits() -> None:
    jaxpr = jax.make_jaxpr(jax.grad(chunked, (1, 2)), static_argnums=0)(4, *arrays("float32"))
    assert "4,13]" in str(jaxpr) and "18,13]" not in str(jaxpr) and "20,13]" not in str(jaxpr)


@pytest.mark.parametrize("tied", [True, False])
def test_a_quantised_head_is_never_whole(tied: bool, x64: None) -> None:
    """Its logits and their gradient are those of the dequantised one, a part of the vocabulary at a time."""
    c = dataclasses.replace(families.preset("smollm2-135m"), tie_embeddings=tied)
    V, D = 96, 128
    rng = np.random.default_rng(0)
    w = jnp.asarray(rng.normal(size=(V, D) if tied else (D, V)))
    packed = quant.quantize(w, "int8", axis=-1 if tied else -2)
    x = jnp.asarray(rng.normal(size=(5, D)))

    def f(x: jax.Array, w: Any) -> jax.Array:
        params = {"embed": {"embedding": w}} if tied else {"head": {"kernel": w}}
        return jnp.sin(decoder.head(c, params, x, einsum=matmul.wide_narrow_gradient)).sum()

    got, want = (jax.jit(jax.value_and_grad(f))(x, w) for w in (packed, packed.dequantize()))
    # Sums of 128 products of order 1 in another order.
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-12, atol=1e-12), got, want)
    program = jax.jit(jax.grad(f)).lower(x, packed).as_text()
    assert f"tensor<{w.shape[0]}x{w.shape[1]}xf" not in program
