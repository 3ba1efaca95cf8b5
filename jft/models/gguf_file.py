# SPDX-License-Identifier: Apache-2.0
"""Reads a GGUF file's metadata and finds its tensors, without loading them.

The layout is that of https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. It is parsed here
because the `gguf` package makes one numpy view per list entry (2.0 s for a vocabulary of 49,152,
here 0.07 s), and because in a damaged file its loops run as long as a corrupt count says.
"""

import dataclasses
import math
import mmap
import pathlib
import struct
from typing import Any

import numpy as np

from jft import errors, json_text

_SCALARS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
_STRING, _ARRAY = 8, 9
_VERSIONS = (2, 3)


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One tensor: `kind` is ggml's type, `shape` in numpy's order, `raw` its bytes on disk."""

    name: str
    kind: int
    shape: tuple[int, ...]
    raw: np.ndarray


@dataclasses.dataclass(frozen=True)
class File:
    """Metadata by key (numbers in lists as numpy arrays, texts as lists), tensors by name."""

    path: pathlib.Path
    metadata: dict[str, Any]
    tensors: dict[str, Tensor]


def read(path: str | pathlib.Path) -> File:
    """Reads a file's header.

    Raises:
      errors.UserError: not GGUF, a version that is not read, cut short or damaged.
    """
    path = pathlib.Path(path)
    try:
        if not path.is_file():  # a pipe would keep `open` waiting
            raise errors.UserError(f"{path}: {'is no file' if path.exists() else 'no such file'}")
        with path.open("rb") as stream:
            size = stream.seek(0, 2)
            if not size:
                raise errors.UserError(f"{path}: the file is empty")
            data = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise errors.UserError(f"{path}: {error.strerror or error}") from error
    cursor = _Cursor(data, path)
    tensor_count, pair_count = _counts(cursor)
    metadata: dict[str, Any] = {}
    for _ in range(pair_count):
        key = cursor.text()
        if key in metadata:
            raise errors.UserError(f"{path}: the metadata has {key} twice")
        metadata[key] = cursor.value()
    parts = metadata.get("split.count", 1)
    if not isinstance(parts, int) or parts > 1:
        raise errors.UserError(
            f"{path}: one of {json_text.shown(parts)} parts; join them: llama-gguf-split --merge"
        )
    infos = [_info(cursor) for _ in range(tensor_count)]
    start = _aligned(cursor.at, metadata.get("general.alignment", 32), path)
    return File(path, metadata, _locate(infos, data, start, path))


def _counts(cursor: "_Cursor") -> tuple[int, int]:
    magic = cursor.take(4)
    version = cursor.number("I")
    if magic != b"GGUF":
        raise errors.UserError(f"{cursor.path}: not a GGUF file: it begins with {magic!r}")
    if version not in _VERSIONS:
        raise errors.UserError(
            f"{cursor.path}: GGUF version {version}; versions 2 and 3, little-endian, are read"
        )
    return cursor.number("Q"), cursor.number("Q")


class _Cursor:
    """A place in the file that moves forward as values are taken, never past the end."""

    def __init__(self, data: mmap.mmap, path: pathlib.Path):
        self.data, self.path, self.at, self.size = data, path, 0, len(data)

    def take(self, count: int) -> bytes:
        if count > self.size - self.at:
            raise errors.UserError(
                f"{self.path}: cut short or damaged: {count} bytes should follow byte {self.at} of "
                f"{self.size}"
            )
        self.at += count
        return self.data[self.at - count : self.at]

    def number(self, kind: str) -> Any:
        return struct.unpack("<" + kind, self.take(struct.calcsize("<" + kind)))[0]

    def text(self) -> str:
        length = self.number("Q")
        start = self.at
        try:
            return self.take(length).decode()
        except UnicodeDecodeError as error:
            raise errors.UserError(
                f"{self.path}: damaged: text at byte {start} is not UTF-8"
            ) from error

    def value(self) -> Any:
        kind = self.number("I")
        if kind == _ARRAY:
            return self.array()
        return self.text() if kind == _STRING else self.number(self.scalar(kind))

    def array(self) -> Any:
        kind, count = self.number("I"), self.number("Q")
        if kind == _STRING:
            # Text costs at least its length's 8 bytes, so a corrupt count ends in `take`.
            return [self.text() for _ in range(count)]
        dtype = np.dtype("<" + self.scalar(kind))
        return np.frombuffer(self.take(count * dtype.itemsize), dtype)

    def scalar(self, kind: int) -> str:
        if kind not in _SCALARS:
            raise errors.UserError(
                f"{self.path}: damaged: a value before byte {self.at} has the unknown type {kind}"
            )
        return _SCALARS[kind]


def _info(cursor: _Cursor) -> tuple[str, tuple[int, ...], int, int]:
    name, dims = cursor.text(), cursor.number("I")
    if dims > 4:
        raise errors.UserError(f"{cursor.path}: damaged: {name} has {dims} dimensions")
    # ggml names the fastest axis first, numpy the slowest.
    shape = tuple(cursor.number("Q") for _ in range(dims))[::-1]
    return name, shape, cursor.number("I"), cursor.number("Q")


def _aligned(at: int, alignment: Any, path: pathlib.Path) -> int:
    if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
        raise errors.UserError(f"{path}: general.alignment is {alignment!r}, not a power of two")
    return -(-at // alignment) * alignment


def _locate(
    infos: list[tuple[str, tuple[int, ...], int, int]],
    data: mmap.mmap,
    start: int,
    path: pathlib.Path,
) -> dict[str, Tensor]:
    import gguf

    blocks = {int(kind): sizes for kind, sizes in gguf.GGML_QUANT_SIZES.items()}
    body = np.frombuffer(data, np.uint8)[start:]
    tensors: dict[str, Tensor] = {}
    end = 0
    for name, shape, kind, offset in sorted(infos, key=lambda info: info[3]):
        if name in tensors:
            raise errors.UserError(f"{path}: {name} is there twice")
        if kind not in blocks:
            raise errors.UserError(f"{path}: {name} has the unknown type {kind}; update `gguf`?")
        block, size = blocks[kind]
        if not shape or shape[-1] % block:
            raise errors.UserError(f"{path}: {name}: {shape} is not in whole blocks of {block}")
        stop = offset + math.prod(shape) // block * size
        if offset < end:
            raise errors.UserError(f"{path}: {name} begins at byte {offset}, inside another tensor")
        if stop > body.size:
            raise errors.UserError(
                f"{path}: cut short: {name} ends at byte {start + stop} of {start + body.size}"
            )
        tensors[name] = Tensor(name, kind, shape, body[offset:stop])
        end = stop
    return tensors
