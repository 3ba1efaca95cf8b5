# SPDX-License-Identifier: Apache-2.0
"""The base's array of a view, where the leaf is quantised: it stays packed until a product needs it.

A quantised leaf is anything with `dequantize()` whose arrays have the dimensions of the whole but for `packed_axes` (negative
numbers; the last one where it has no such attribute), which may be shorter: see `jft.quant.QArray`. The function is traced with a dense array in its place, and what it does to that array is done to
the packed ones where it is the same operation on each, or else remembered and done after dequantising.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax

from jft import tree

Change = Callable[[jax.Array], jax.Array]


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["leaf"],
    meta_fields=["steps", "shape", "dtype"],
)
@dataclasses.dataclass(frozen=True)
class Packed:
    """A quantised leaf and what is to be done to its values.

    Attributes:
      leaf: the quantised leaf.
      steps: functions of the dense array, in order.
      shape, dtype: of the result.
    """

    leaf: Any
    steps: tuple[Change, ...]
    shape: tuple[int, ...]
    dtype: Any

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def dense(self) -> jax.Array:
        x = self.leaf.dequantize()
        for step in self.steps:
            x = step(x)
        return x.astype(self.dtype)


def pack(leaf: Any) -> Any:
    """A leaf as a view's base."""
    if not tree.is_quantized(leaf):
        return leaf
    return Packed(leaf, (), tuple(leaf.shape), leaf.dtype)


def dense(w: Any) -> jax.Array:
    return w.dense() if isinstance(w, Packed) else w


def axes(w: Any) -> set[int]:
    """The dimensions along which a packed one's arrays are shorter than it; none of an array's."""
    if not isinstance(w, Packed):
        return set()
    return {w.ndim + axis for axis in getattr(w.leaf, "packed_axes", (-1,))}


def cast(w: Any, dtype: Any) -> Any:
    return dataclasses.replace(w, dtype=dtype) if isinstance(w, Packed) else w.astype(dtype)


def apply(w: Any, change: Change, *, each: Change | None = None) -> Any:
    """change(w).

    Args:
      w: an array, or a packed one.
      change: what is done to the array.
      each: the same for every array within a quantised leaf, where there is such a thing.
    """
    if not isinstance(w, Packed):
        return change(w)
    if each is not None and not w.steps:
        leaf = jax.tree.map(each, w.leaf)
        return Packed(leaf, (), tuple(leaf.shape), w.dtype)
    # A cast so far comes before the step: float32 values halved are not bfloat16 values halved.
    steps = w.steps if w.dtype == w.leaf.dtype else (*w.steps, lambda x, to=w.dtype: x.astype(to))
    out = jax.eval_shape(change, jax.ShapeDtypeStruct(w.shape, w.dtype))
    return Packed(w.leaf, (*steps, change), out.shape, out.dtype)


def product(base: Callable[[jax.Array, jax.Array], jax.Array], x: jax.Array, w: Any) -> jax.Array:
    """base(x, w), without keeping a dequantised w for the backward pass: it is made again there."""
    if not isinstance(w, Packed):
        return base(x, w)
    return jax.checkpoint(lambda x, w: base(x, w.dense()))(x, w)
