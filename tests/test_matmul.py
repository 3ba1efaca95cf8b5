# SPDX-License-Identifier: Apache-2.0
"""The product with a gradient of its own equals jnp.einsum, value and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jft import matmul

pytestmark = pytest.mark.usefixtures("x64")


@pytest.mark.parametrize(
    ("equation", "x_shape", "w_shape"),
    [
        ("BTD,DNH->BTNH", (2, 5, 6), (6, 3, 4)),
        ("BTNH,NHD->BTD", (2, 5, 3, 4), (3, 4, 6)),
        ("BTD,DF->BTF", (2, 5, 6), (6, 7)),
        ("BD,DF->BF", (5, 6), (6, 7)),
    ],
)
def test_cpu_einsum_is_einsum(
    equation: str, x_shape: tuple[int, ...], w_shape: tuple[int, ...]
) -> None:
    rng = np.random.default_rng(0)
    x, w = jnp.asarray(rng.normal(size=x_shape)), jnp.asarray(rng.normal(size=w_shape))
    y, pull = jax.vjp(lambda x, w: matmul.cpu_einsum(equation, x, w), x, w)
    want, want_pull = jax.vjp(lambda x, w: jnp.einsum(equation, x, w), x, w)
    g = jnp.asarray(rng.normal(size=y.shape))
    np.testing.assert_array_equal(y, want)
    for got, expected in zip(pull(g), want_pull(g), strict=True):
        # float64 sums in another order
        np.testing.assert_allclose(got, expected, rtol=1e-12, atol=1e-12)


def test_an_equation_that_it_does_not_cover_is_refused() -> None:
    with pytest.raises(ValueError, match="DBT,DF->BTF"):
        jax.grad(lambda w: matmul.cpu_einsum("DBT,DF->BTF", jnp.ones((6, 2, 5)), w).sum())(
            jnp.ones((6, 7))
        )


def test_only_the_cpu_gets_it() -> None:
    assert matmul.for_training("cpu") is matmul.cpu_einsum
    assert matmul.for_training("tpu") is matmul.for_training("gpu") is jnp.einsum
