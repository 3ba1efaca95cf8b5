# SPDX-License-Identifier: Apache-2.0
"""Safetensors files, written one tensor at a time: the header first, for which shapes and dtypes are enough."""

import dataclasses
import functools
import json
import math
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jft import errors

DTYPES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}
_CODES = {"uint8": "U8", "int8": "I8"}


@dataclasses.dataclass(frozen=True)
class Tensor:
    """What the header says of one tensor."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def spelled(dtype: np.dtype) -> str:
    """The format's name of numpy's type."""
    return (DTYPES | _CODES)[dtype.name]


def widest(dtypes: Iterable[Any]) -> str:
    """The float type in which numbers of all these fit."""
    # Not jnp.result_type, for which float64 is float32.
    found = list(dtypes) or [jnp.float32]
    return functools.reduce(jnp.promote_types, found, jnp.dtype(found[0])).name


def split(tensors: Iterable[Tensor], limit: int, stem: str = "model") -> dict[str, list[Tensor]]:
    """The tensors of each file, by its name; a file has `limit` bytes at most, or a single tensor.

    In a file wide numbers come first: each tensor then begins at a multiple of its numbers' size, which torch asks for.
    Otherwise the order stays.
    """
    if limit < 1:
        raise errors.UserError(f"max_shard_size={limit}: it must be 1 or more bytes")
    files: list[list[Tensor]] = [[]]
    size = 0
    for tensor in tensors:
        if files[-1] and size + tensor.nbytes > limit:
            files.append([])
            size = 0
        files[-1].append(tensor)
        size += tensor.nbytes
    count = len(files)
    names = [f"{stem}-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]
    ordered = [sorted(file, key=lambda tensor: -tensor.dtype.itemsize) for file in files]
    return dict(zip([f"{stem}.safetensors"] if count == 1 else names, ordered, strict=True))


def write(path: pathlib.Path, tensors: Sequence[Tensor], arrays: Iterable[np.ndarray]) -> None:
    """One file: 8 bytes of length, a JSON header, the tensors' bytes.

    Args:
      path: is made or replaced.
      tensors: in the order of the file.
      arrays: their values, in the same order, shapes and dtypes; taken one after the other.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in tensors:
        offsets = [end, end := end + tensor.nbytes]
        kind = spelled(tensor.dtype)
        header[tensor.name] = {"dtype": kind, "shape": tensor.shape, "data_offsets": offsets}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor, array in zip(tensors, arrays, strict=True):
            if (array.shape, array.dtype) != (tensor.shape, tensor.dtype):  # a header that lies
                raise ValueError(f"{tensor.name}: {array.dtype} {array.shape} for {tensor}")
            file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)


def host(leaf: Any, index: tuple[int, ...]) -> np.ndarray:
    """leaf[index] as a numpy array; of an array that is spread over devices, from the pieces that hold it."""
    if not isinstance(leaf, jax.Array):
        return np.asarray(leaf)[index]
    if not leaf.is_fully_addressable:
        raise errors.UserError(
            f"a parameter of shape {leaf.shape} is spread over several processes; gather it to one first"
        )
    n = len(index)
    array = np.empty(leaf.shape[n:], leaf.dtype)
    for shard in leaf.addressable_shards:
        spans = [s.indices(size)[:2] for s, size in zip(shard.index, leaf.shape, strict=True)]
        held = all(low <= i < high for i, (low, high) in zip(index, spans, strict=False))
        if held and shard.replica_id == 0:
            local = tuple(i - low for i, (low, _) in zip(index, spans, strict=False))
            array[shard.index[n:]] = np.asarray(shard.data[local] if local else shard.data)
    return array
