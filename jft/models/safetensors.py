# SPDX-License-Identifier: Apache-2.0
"""Reads safetensors files through a memory map, without loss and without trust.

The format is 8 bytes of length, a JSON header and the tensors' bytes. It is parsed here because the
library's numpy front end refuses bfloat16 in some releases, and because a damaged file should be
told by its name and the faulty entry: every offset is checked before a byte of a tensor is read.
"""

import dataclasses
import json
import math
import pathlib
from typing import Any

import ml_dtypes
import numpy as np

from jft import errors

_DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "U8": np.dtype(np.uint8),
}
FLOATS = ("F64", "F32", "F16", "BF16")
_MAX_HEADER = 100_000_000  # the format's own limit


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One tensor of a file; `raw` is its bytes, still on disk."""

    name: str
    file: pathlib.Path
    dtype: str
    shape: tuple[int, ...]
    raw: np.ndarray

    @property
    def where(self) -> str:
        return f"{self.file}: {self.name}"

    def values(self) -> np.ndarray:
        """The tensor as a view of the memory map."""
        return self.raw.view(_DTYPES[self.dtype]).reshape(self.shape)


def read(path: pathlib.Path) -> dict[str, Tensor]:
    """The tensors of a file by name.

    Raises:
      errors.UserError: the file can't be read, is cut short, or its header contradicts itself.
    """
    try:
        size = path.stat().st_size
        data = np.memmap(path, mode="r") if size else np.empty(0, np.uint8)
    except OSError as error:
        raise errors.UserError(f"{path}: {error.strerror or error}") from error
    length = int.from_bytes(data[:8].tobytes(), "little")
    if size < 8 or length > min(size - 8, _MAX_HEADER):
        raise errors.UserError(
            f"{path}: not a safetensors file, or cut short: its header should have {length} bytes "
            f"and the file has {size}"
        )
    header = _parse(data[8 : 8 + length].tobytes(), path)
    header.pop("__metadata__", None)
    body = data[8 + length :]
    tensors = {name: _tensor(name, entry, body, path) for name, entry in header.items()}
    _check_offsets(header, body.size, path)
    return tensors


def _parse(text: bytes, path: pathlib.Path) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise errors.UserError(f"{path}: the header names {twice} twice")
        return found

    try:
        header = json.loads(text, object_pairs_hook=unique)
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise errors.UserError(f"{path}: the safetensors header is not JSON: {error}") from error
    if not isinstance(header, dict):
        raise errors.UserError(f"{path}: the safetensors header is not a JSON object")
    return header


def _tensor(name: str, entry: Any, body: np.ndarray, path: pathlib.Path) -> Tensor:
    try:
        dtype, shape, (start, stop) = entry["dtype"], entry["shape"], entry["data_offsets"]
        counts = [start, stop, *shape]
        sound = all(type(count) is int and count >= 0 for count in counts) and start <= stop
    except (KeyError, TypeError, ValueError):
        sound = False
    if not sound:
        raise errors.UserError(f"{path}: {name}: the header's entry is malformed: {entry!r:.200}")
    if dtype not in _DTYPES:
        raise errors.UserError(f"{path}: {name}: stored as {dtype}, which is not read here")
    need = math.prod(shape) * _DTYPES[dtype].itemsize
    if stop - start != need:
        raise errors.UserError(
            f"{path}: {name}: {dtype} {shape} needs {need} bytes, the header gives {stop - start}"
        )
    if stop > body.size:
        raise errors.UserError(
            f"{path}: {name}: ends at byte {stop} of {body.size}: the file is cut short"
        )
    return Tensor(name, path, dtype, tuple(shape), body[start:stop])


def _check_offsets(header: dict[str, Any], size: int, path: pathlib.Path) -> None:
    """The tensors must cover the bytes without hole or overlap, or two names share one memory."""
    end = 0
    for start, stop in sorted(entry["data_offsets"] for entry in header.values()):
        if start != end:
            raise errors.UserError(
                f"{path}: the tensors' bytes overlap or leave a hole at {start} (expected {end})"
            )
        end = stop
    if end != size:
        raise errors.UserError(f"{path}: {size - end} bytes after the last tensor belong to none")
