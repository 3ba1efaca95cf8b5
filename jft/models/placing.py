# SPDX-License-Identifier: Apache-2.0
"""From tensors of files to one parameter on its devices, with no more host memory than its shards take.

A parameter (a leaf) is stacked from many tensors and may lie in pieces on many devices. `Part` is a piece that a device
of this host holds. A quantised leaf has parts for each of its arrays. A part's buffer is filled from the tensors as they come and then becomes the device's array: on a CPU
itself, for JAX keeps an aligned buffer instead of copying it; elsewhere it is sent and freed.
"""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import ml_dtypes
import numpy as np

from jft import tree

Bounds = tuple[tuple[int, int], ...]  # start and stop in each dimension of the leaf

_ALIGNMENT = 64  # of the buffers that JAX can keep on a CPU
# A block to cast, check and turn fits the cache. Fewer rows than fill a cache line would write each line many times;
# very long rows are cut all the same, for the memory.
_BLOCK, _ROWS, _MOST = 1 << 16, 16, 1 << 20
_BF16 = np.dtype(ml_dtypes.bfloat16)
_BF16_EXPONENT = 0x7F80


@dataclasses.dataclass(frozen=True)
class Part:
    """A piece of a leaf, in host memory."""

    bounds: Bounds
    buffer: np.ndarray

    def meets(self, index: Sequence[int]) -> bool:
        """Whether any of the tensor at this place of the leaf's stacked axes is in this part."""
        return all(a <= i < b for i, (a, b) in zip(index, self.bounds, strict=False))

    def fill(self, index: Sequence[int], tensor: np.ndarray) -> bool:
        """Takes in what there is of a tensor in the leaf's layout, cast by blocks; False where a value is not finite."""
        inner = tuple(slice(*pair) for pair in self.bounds[len(index) :])
        outer = tuple(i - start for i, (start, _) in zip(index, self.bounds, strict=False))
        source, target = tensor[inner], self.buffer[outer]
        # In the file's order, in which reading is fast.
        order = sorted(range(source.ndim), key=lambda axis: -source.strides[axis])
        source, target = source.transpose(order), target.transpose(order)
        for block in _blocks(source.shape):
            cast = _cast(source[block], target.dtype)
            if not _finite(cast):
                return False
            target[block] = cast
        return True


class Leaf:
    """A parameter on its way to its devices: parts of its array, or of each array of a QArray.

    Args:
      like: its shape, or a QArray of those of its arrays.
      shardings: of its array or arrays, likewise; None for the default device.
    """

    def __init__(self, like: Any, shardings: Any):
        self._shapes, self._structure = jax.tree.flatten(like)
        placed = [None] * len(self._shapes) if shardings is None else jax.tree.leaves(shardings)
        self._shardings = placed
        each = zip(self._shapes, placed, strict=True)
        self._parts = [parts(x.shape, x.dtype, sharding) for x, sharding in each]

    def meets(self, index: Sequence[int]) -> bool:
        """Whether this host needs any of the tensor at this place of the stacked axes."""
        return any(part.meets(index) for own in self._parts for part in own)

    def fill(self, index: Sequence[int], tensor: Any) -> bool:
        """Takes in a tensor in the leaf's layout, an array or a QArray; False where a value is not finite."""
        arrays = zip(jax.tree.leaves(tensor), self._parts, strict=True)
        return all(part.fill(index, x) for x, own in arrays for part in own if part.meets(index))

    def place(self) -> Any:
        """The leaf on its devices; `fill` must not be called any more."""
        each = zip(self._shapes, self._shardings, self._parts, strict=True)
        placed = [place(x.shape, x.dtype, sharding, own) for x, sharding, own in each]
        return jax.tree.unflatten(self._structure, placed)


def parts(
    shape: tuple[int, ...], dtype: np.dtype, sharding: jax.sharding.Sharding | None
) -> list[Part]:
    """Empty parts for the devices of this host; one where devices hold the same piece."""
    held = dict.fromkeys([tuple((0, size) for size in shape)])
    if sharding is not None:
        indices = sharding.addressable_devices_indices_map(shape).values()
        held = dict.fromkeys(_bounds(index, shape) for index in indices)
    return [Part(bounds, _aligned([b - a for a, b in bounds], dtype)) for bounds in held]


def place(
    shape: tuple[int, ...],
    dtype: np.dtype,
    sharding: jax.sharding.Sharding | None,
    filled: Sequence[Part],
) -> jax.Array:
    """The leaf on its devices; the parts' buffers must not be written any more.

    Args:
      shape: of the whole leaf.
      dtype: of the leaf.
      sharding: None for the default device.
      filled: from `parts` with the same arguments.
    """
    if sharding is None:
        leaf = jax.device_put(filled[0].buffer)
    else:
        buffers = {part.bounds: part.buffer for part in filled}
        leaf = jax.make_array_from_callback(
            shape, sharding, lambda index: buffers[_bounds(index, shape)], dtype=dtype
        )
    # Without waiting, buffers on their way to the devices would pile up.
    return jax.block_until_ready(leaf)


def fault(tensor: Any, dtype: np.dtype) -> str:
    """What is wrong with a file's tensor of which some value is not finite in a dtype."""
    if tree.is_quantized(tensor):
        return "has a block with a scale that is not finite"
    for row in range(len(tensor)):
        if not _finite(tensor[row : row + 1]):
            return f"has a value that is not finite, in row {row}"
    return f"has values too large for {dtype}"


def _bounds(index: Sequence[slice] | None, shape: tuple[int, ...]) -> Bounds:
    whole = index or ()
    return tuple(part.indices(size)[:2] for part, size in zip(whole, shape, strict=True))


def _aligned(shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
    """An empty array; numpy's own are aligned to 16 bytes only."""
    count = math.prod(shape) * dtype.itemsize
    memory = np.empty(count + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    return memory[start : start + count].view(dtype).reshape(shape)


def _blocks(shape: tuple[int, ...]) -> Iterator[tuple[slice, ...]]:
    """Indices of blocks that cover an array, along its first axes."""
    if not shape:
        yield ()
        return
    row = math.prod(shape[1:])
    if len(shape) > 1 and _ROWS * row > _MOST:
        for i in range(shape[0]):
            for inner in _blocks(shape[1:]):
                yield (slice(i, i + 1), *inner)
        return
    step = max(_ROWS, _BLOCK // row)
    for start in range(0, shape[0], step):
        yield (slice(start, start + step),)


def _cast(block: np.ndarray, dtype: np.dtype) -> np.ndarray:
    with np.errstate(over="ignore", invalid="ignore"):
        return block.astype(dtype, copy=False)


def _finite(block: np.ndarray) -> bool:
    if block.dtype == _BF16:  # ml_dtypes' own isfinite takes seven times as long
        exponents = block.view(np.uint16) & _BF16_EXPONENT
        return not (exponents == _BF16_EXPONENT).any()
    return bool(np.isfinite(block).all())
