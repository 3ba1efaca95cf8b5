# SPDX-License-Identifier: Apache-2.0
"""Quantised arrays: bitsandbytes' bits, bounds on the error, and structure operations on the packed form."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jft import errors, quant


@pytest.mark.parametrize("name", ["q0", "down5", "rnd"])
def test_nf4_is_bitsandbytes(shared: pathlib.Path, name: str) -> None:
    golden = np.load(shared / "golden" / "nf4.npz")
    w = golden[f"{name}.w"]
    q = quant.quantize(jnp.asarray(w).reshape(-1), "nf4")
    np.testing.assert_array_equal(q.codes, golden[f"{name}.nf4.plain.packed"])
    np.testing.assert_array_equal(q.scales, golden[f"{name}.nf4.plain.absmax"])
    np.testing.assert_array_equal(
        q.dequantize().reshape(w.shape), golden[f"{name}.nf4.plain.dequant"]
    )


@pytest.mark.parametrize(("kind", "half_step"), [("nf4", 0.152), ("int8", 0.5 / 127)])
def test_the_error_is_within_half_a_step(kind: str, half_step: float) -> None:
    """NF4's widest gap is 0.304 of the block's largest magnitude."""
    x = jax.random.normal(jax.random.key(0), (3, 8, 128))
    q = quant.quantize(x, kind)
    assert (q.shape, q.ndim, q.dtype, q.size) == (x.shape, 3, x.dtype, x.size)
    blocks = np.asarray(x).reshape(3, 8, 2, 64)
    error = np.abs(np.asarray(q.dequantize()).reshape(blocks.shape) - blocks).max(-1)
    assert np.all(error <= half_step * np.abs(blocks).max(-1) * (1 + 1e-5))
    assert q.nbytes == x.size * (0.5 if kind == "nf4" else 1) + x.size / 64 * 4


@pytest.mark.parametrize("kind", quant.KINDS)
def test_zeros_and_slices(kind: str) -> None:
    assert not quant.quantize(jnp.zeros((2, 64)), kind).dequantize().any()
    x = jax.random.normal(jax.random.key(0), (3, 8, 128))
    q = quant.quantize(x, kind)
    layer = jax.tree.map(lambda part: part[1], q)
    np.testing.assert_array_equal(layer.dequantize(), q.dequantize()[1])


def test_refusals() -> None:
    with pytest.raises(errors.UserError, match="last dimension of 65"):
        quant.quantize(jnp.ones((2, 65)), "nf4")
    with pytest.raises(errors.UserError, match="'int3'"):
        quant.quantize(jnp.ones((2, 64)), "int3")
