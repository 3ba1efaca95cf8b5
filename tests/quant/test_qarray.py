# SPDX-License-Identifier: Apache-2.0
"""Quantised arrays: bitsandbytes' bits, bounds on the error, and structure operations on the packed form."""

import dataclasses
import functools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jft import errors, quant
from jft.quant import levels, qarray

WAYS: list[dict[str, Any]] = [
    {"kind": "nf4"},
    {"kind": "nf4", "axis": 1, "double": True, "stacked": 1},
    {"kind": "int4", "axis": -2, "block": 32},
    {"kind": "int8", "axis": 1},
    {"kind": "int8"},
]
NAMES = ["q0", "down5", "rnd"]


def normal(*shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(0), shape)


@pytest.fixture(scope="module")
def golden(shared: pathlib.Path) -> Any:
    """What bitsandbytes made of real and of random weights."""
    return np.load(shared / "golden" / "nf4.npz")


@pytest.mark.parametrize("name", NAMES)
def test_nf4_is_bitsandbytes(golden: Any, name: str) -> None:
    w = golden[f"{name}.w"]
    q = quant.quantize(jnp.asarray(w).reshape(-1), "nf4")
    np.testing.assert_array_equal(quant.pairs(q), golden[f"{name}.nf4.plain.packed"])
    np.testing.assert_array_equal(q.scales, golden[f"{name}.nf4.plain.absmax"])
    np.testing.assert_array_equal(
        q.dequantize().reshape(w.shape), golden[f"{name}.nf4.plain.dequant"]
    )


def read(golden: Any, name: str) -> quant.QArray:
    """bitsandbytes' own bytes with double quantisation, of which the last group of scales may be short."""
    packed = golden[f"{name}.dq.packed"]
    codes = np.stack([packed >> 4, packed & 15], -1).reshape(-1)
    small, largest = golden[f"{name}.dq.absmax"], golden[f"{name}.dq.absmax2"]
    group = 256 if len(small) % 256 == 0 else 64  # of which 256 are four
    each = np.repeat(largest, 256 // group)[: len(small) // group]
    scales = quant.QArray(
        jnp.asarray(small),
        jnp.asarray(each),
        jnp.asarray(golden[f"{name}.dq.offset"]).reshape(1),
        "dynamic8",
        -1,
        group,
        jnp.float32,
    )
    plain = quant.from_codes(
        codes, np.zeros(len(small), np.float32), None, kind="nf4", axis=-1, dtype=jnp.float32
    )
    return dataclasses.replace(plain, codes=jnp.asarray(plain.codes), scales=scales)


@pytest.mark.parametrize("name", NAMES)
def test_double_quantisation_reads_bitsandbytes(golden: Any, name: str) -> None:
    """Its levels are products in float32, ours rounded from double precision: two units in the last place apart."""
    want = golden[f"{name}.nf4.dq.dequant"]
    got = np.asarray(read(golden, f"{name}.nf4").dequantize()).reshape(want.shape)
    np.testing.assert_allclose(got, want, rtol=4 * 2.0**-23, atol=0)
    np.testing.assert_allclose(levels.DYNAMIC8, golden[f"{name}.nf4.dq.code2"], rtol=2.0**-22)


def test_double_quantisation_as_bitsandbytes(golden: Any) -> None:
    """Of real weights it has another code for 1 scale in 300, where it does not take the nearest one."""
    w = golden["down5.w"]
    q = quant.quantize(jnp.asarray(w).reshape(-1), "nf4", double=True)
    assert isinstance(q.scales, quant.QArray) and q.scales.block == 256
    np.testing.assert_array_equal(quant.pairs(q), golden["down5.nf4.dq.packed"])
    # Less a mean that is summed in another order: a unit in its last place.
    np.testing.assert_allclose(
        q.scales.scales, golden["down5.nf4.dq.absmax2"], rtol=0, atol=2.0**-24
    )
    theirs, ours = golden["down5.nf4.dq.absmax"].astype(int), np.asarray(q.scales.codes).astype(int)
    assert np.mean(theirs != ours) < 0.005 and np.abs(theirs - ours).max() == 1
    truth, want = golden["down5.nf4.plain.absmax"], golden["down5.nf4.dq.dequant"]
    scales = read(golden, "down5.nf4").scales
    assert isinstance(scales, quant.QArray)
    error = lambda q: np.abs(np.asarray(q.dequantize()) - truth).sum()  # noqa: E731
    assert error(q.scales) < error(scales)
    assert (
        quant.loss(w.reshape(-1), q).relative
        < np.linalg.norm(want - w) / np.linalg.norm(w) * 1.0001
    )


def test_bits_are_counted() -> None:
    """8/64 + 32/(64 * 256) bits for each weight's part of the scales, and 32 bits of their mean for each layer."""
    q = quant.quantize(jnp.ones((2, 64, 1024)), "nf4", axis=1, double=True, stacked=1)
    assert q.bits_per_weight == 4 + 8 / 64 + 32 / (64 * 256) + 32 / (64 * 1024)
    assert quant.quantize(jnp.ones((2, 64)), "int4").bits_per_weight == 4 + 32 / 64
    assert quant.quantize(jnp.ones((2, 64)), "int8", block=32).bits_per_weight == 8 + 32 / 32
    assert q.nbytes == sum(x.nbytes for x in jax.tree.leaves(q))


@pytest.mark.parametrize(
    ("kind", "half_step"), [("nf4", 0.152), ("int4", 0.5 / 7), ("int8", 0.5 / 127)]
)
def test_the_error_is_within_half_a_step(kind: str, half_step: float) -> None:
    """NF4's widest gap is 0.304 of the block's largest magnitude."""
    x = normal(3, 8, 128)
    q = quant.quantize(x, kind)
    assert (q.shape, q.ndim, q.dtype, q.size) == (x.shape, 3, x.dtype, x.size)
    blocks = np.asarray(x).reshape(3, 8, 2, 64)
    error = np.abs(np.asarray(q.dequantize()).reshape(blocks.shape) - blocks).max(-1)
    assert np.all(error <= half_step * np.abs(blocks).max(-1) * (1 + 1e-5))


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_along_any_dimension_it_is_the_same(way: dict[str, Any]) -> None:
    """As along the last one of the array turned; the scales' own groups aside, which stay along the last."""
    x = normal(3, 128, 256)
    way = way | {"double": False}
    axis = way.pop("axis", -1)
    turned = quant.quantize(jnp.moveaxis(x, axis, -1), **way)
    got = quant.quantize(x, axis=axis, **way).dequantize()
    np.testing.assert_array_equal(got, jnp.moveaxis(turned.dequantize(), -1, axis))


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_zeros_and_slices(way: dict[str, Any]) -> None:
    assert not np.abs(quant.quantize(jnp.zeros((2, 64, 64)), **way).dequantize()).max() > 1e-30
    x = normal(3, 128, 256)
    q = quant.quantize(x, **way)
    layer = jax.tree.map(lambda part: part[1], q)
    assert (layer.shape, layer.ndim) == ((128, 256), 2)
    np.testing.assert_array_equal(layer.dequantize(), q.dequantize()[1])
    alone = quant.quantize(x[1], **way | {"stacked": 0, "axis": q.axis})
    np.testing.assert_array_equal(layer.dequantize(), alone.dequantize())


def test_codes_from_elsewhere() -> None:
    rng = np.random.default_rng(0)
    codes, scales, offsets = (
        rng.integers(0, 16, (4, 64, 8), np.uint8),
        rng.normal(size=(4, 2, 8)).astype(np.float16),
        rng.normal(size=(4, 2, 8)).astype(np.float16),
    )
    q = quant.from_codes(codes, scales, offsets, kind="int4", axis=1, dtype=np.dtype(np.float32))
    wide = functools.partial(np.repeat, repeats=32, axis=1)
    want = (codes.astype(np.float32) - 8) * wide(scales) + wide(offsets)
    np.testing.assert_array_equal(jax.tree.map(jnp.asarray, q).dequantize(), want)


def test_levels_are_those_of_the_tables() -> None:
    """NF4's are chosen by bits; the 256 lie on lines, computed in float32: three units in the last place."""
    nf4, wide = jnp.arange(16, dtype=jnp.uint8), jnp.arange(256).astype(jnp.uint8)
    np.testing.assert_array_equal(levels.nf4(nf4), levels.NF4)
    np.testing.assert_allclose(levels.dynamic8_computed(wide), levels.DYNAMIC8, rtol=3 * 2.0**-23)


def test_refusals() -> None:
    with pytest.raises(errors.UserError, match=r"dimension 1 of \[2, 65\] is no multiple of.* 64"):
        quant.quantize(jnp.ones((2, 65)), "nf4")
    with pytest.raises(errors.UserError, match="'int3'"):
        quant.quantize(jnp.ones((2, 64)), "int3")


@pytest.mark.parametrize("axis", [1, 2])
def test_both_ways_to_unpack_are_the_same(axis: int) -> None:
    """What a GPU runs, and what other devices do, on all bytes."""
    codes = jnp.arange(256, dtype=jnp.uint8).reshape(2, 4, 32)
    one, other = (unpack(codes, axis) for unpack in (qarray._shifted, qarray._stacked))
    np.testing.assert_array_equal(one, other)
    # Of the first block along the axis: its high bits first.
    first = np.moveaxis(np.asarray(one), axis, 0)[0]
    np.testing.assert_array_equal(first, np.moveaxis(np.asarray(codes), axis, 0)[0] >> 4)


def test_a_look_up_is_the_tree_of_selects() -> None:
    codes = jnp.arange(16, dtype=jnp.uint8)
    np.testing.assert_array_equal(levels.nf4_selected(codes), levels.NF4)
