# SPDX-License-Identifier: Apache-2.0
"""A GGUF file's own blocks as QArrays, without a detour through numbers: the values are exactly those of the file.

A block is 32 numbers along a tensor's last axis, which are the inputs of a kernel:

    Q8_0  d * q,       q -128..127, a byte each    -> int8
    Q4_0  d * (q - 8), q 0..15                     -> int4
    Q4_1  d * q + m                                -> uint4 with offsets

Byte j of a 4-bit block holds number j in its low bits and number j + 16 in its high ones. d and m are float16, and stay it.
A parameter is made of many tensors, one for each layer. Where they are of several types, those that are not of the
parameter's are dequantised and quantised again, but for Q4_0 in Q4_1, which is exact.
"""

import collections
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from jft import quant, tree
from jft.models import architecture, decoder, gguf_blocks, gguf_file, gguf_names, quantizing

BLOCK = 32
# Types that keep their blocks in a parameter of a kind; the first one found is the parameter's.
_KEPT = {"int8": ("Q8_0",), "int4": ("Q4_1", "Q4_0")}
_KINDS = {"Q8_0": "int8", "Q4_0": "int4", "Q4_1": "uint4"}
_FLOATS = ("F64", "F32", "F16", "BF16")


@dataclasses.dataclass(frozen=True)
class Leaf:
    """A parameter that keeps its file's blocks.

    Attributes:
      type: ggml's name of its blocks.
      like: shapes of the QArray.
    """

    type: str
    like: quant.QArray

    @property
    def exact(self) -> tuple[str, ...]:
        """Types whose tensors keep their values in it."""
        return ("Q4_1", "Q4_0") if self.type == "Q4_1" else (self.type,)

    def arrays(
        self, file: gguf_file.File, tensor: gguf_file.Tensor, part: int | None
    ) -> list[tuple[np.ndarray, int]]:
        """Codes, scales and, where there are, offsets of a tensor, or of the part of it at one index of its first axis.

        Each in the file's order of axes, with how many numbers of the last axis one of its elements stands for.
        """
        own = gguf_blocks.type_name(tensor)
        rows = tensor.raw.reshape(*tensor.shape[:-1], -1)
        rows = rows if part is None else rows[part]
        if own not in self.exact:
            values = gguf_blocks.dequantise(tensor, file.path, part)
            rows, own = gguf_blocks.quantise(values, self.type), self.type
        codes, scales, *offsets = _parts(rows, own)
        if self.type == "Q4_1" and not offsets:
            offsets = [np.float16(-8) * scales]  # a power of two: exact
        per = 1 if self.type == "Q8_0" else 2
        return [(codes, per), *((x, BLOCK) for x in (scales, *offsets))]

    def join(self, parts: Sequence[Sequence[np.ndarray]]) -> quant.QArray:
        """Of the arrays, in our layout, of tensors that stand side by side on our last axis; of one, it is that one."""
        whole = [x[0] if len(x) == 1 else np.stack(x, -1) for x in zip(*parts, strict=True)]
        codes, scales, *offsets = whole
        offset = offsets[0] if offsets else None
        return dataclasses.replace(self.like, codes=codes, scales=scales, offsets=offset)


def _parts(rows: np.ndarray, kind: str) -> list[np.ndarray]:
    """Codes as a QArray has them, scales and offsets of blocks of Q8_0, Q4_0 or Q4_1."""
    floats = 2 if kind == "Q4_1" else 1
    size = 2 * floats + (BLOCK if kind == "Q8_0" else BLOCK // 2)
    blocks = rows.reshape(*rows.shape[:-1], -1, size)
    numbers = np.ascontiguousarray(blocks[..., : 2 * floats]).view("<f2")
    codes = np.ascontiguousarray(blocks[..., 2 * floats :])
    if kind == "Q8_0":
        codes = codes.view(np.int8)
    else:
        codes = codes << 4 | codes >> 4  # a QArray has a block's first half in the high bits
    return [codes.reshape(*rows.shape[:-1], -1), *np.moveaxis(numbers, -1, 0)]


def leaves(
    file: gguf_file.File, config: architecture.Config, to: quantizing.Settings, dtype: np.dtype
) -> dict[str, Leaf]:
    """The parameters that keep their blocks, by path: of the kind that is asked for, with blocks along the inputs."""
    found = {}
    for path, shape in tree.flatten(decoder.shapes(config)).items():
        types = {gguf_blocks.type_name(tensor) for tensor in _tensors(file, config, path)}
        kept = _KEPT.get(quantizing.kind(path, to), ())
        own = next((kind for kind in kept if kind in types), None)
        if own is None:
            continue
        how = quantizing.way(path, shape.shape, to, BLOCK)
        assert how
        if all(_axis(row) == how.axis for row in _rows(config, path)):
            found[path] = Leaf(own, _like(own, shape.shape, how.axis, dtype))
    return found


def _rows(config: architecture.Config, path: str) -> list[gguf_names.Row]:
    return [row for row in gguf_names.rows(config) if row.weight.path == path]


def _tensors(
    file: gguf_file.File, config: architecture.Config, path: str
) -> Iterator[gguf_file.Tensor]:
    for row in _rows(config, path):
        for index in gguf_names.layers(config, row):
            yield file.tensors[row.tensor(*(index or (None,)))]


def _axis(row: gguf_names.Row) -> int:
    """Our axis, from behind, along which a tensor's blocks run if that axis holds whole ones."""
    axes = row.weight.axes
    behind = len(axes) - axes.index(row.weight.stored[-1][-1])
    return -behind - (row.place is not None)


def _like(kind: str, shape: tuple[int, ...], axis: int, dtype: np.dtype) -> quant.QArray:
    def shorter(by: int, dtype: Any) -> jax.ShapeDtypeStruct:
        sizes = list(shape)
        sizes[axis] //= by
        return jax.ShapeDtypeStruct(tuple(sizes), dtype)

    codes = shorter(1, np.int8) if kind == "Q8_0" else shorter(2, np.uint8)
    scales = shorter(BLOCK, np.float16)
    offsets = scales if kind == "Q4_1" else None
    return quant.QArray(codes, scales, offsets, _KINDS[kind], axis, BLOCK, dtype)


def notes(
    file: gguf_file.File, config: architecture.Config, to: quantizing.Settings
) -> tuple[str, ...]:
    """What becomes of the file's blocks, for people; nothing of a file of floats."""
    kept, again = collections.Counter[str](), collections.Counter[str]()
    own = leaves(file, config, to, np.dtype(np.float32))
    for path in tree.flatten(decoder.shapes(config)):
        if quantizing.kind(path, to) == quantizing.NONE:
            continue
        exact = own[path].exact if path in own else ()
        for tensor in _tensors(file, config, path):
            name = gguf_blocks.type_name(tensor)
            (kept if name in exact else again)[name] += 1
    for name in _FLOATS:
        again.pop(name, None)
    said = [f"{_told(kept)} keep their blocks"] if kept else []
    said += [f"{_told(again)} are dequantised and quantised again"] if again else []
    return (f"{file.path.name}: {'; '.join(said)}",) if said else ()


def _told(counts: collections.Counter[str]) -> str:
    types = " and ".join(f"{count} {name}" for name, count in counts.most_common())
    return f"{types} tensors"
