# SPDX-License-Identifier: Apache-2.0
"""Reads safetensors files, one or a folder's shards, through memory maps, without loss and without trust.

The format is 8 bytes of length, a JSON header and the tensors' bytes. It is parsed here because the
library's numpy front end refuses bfloat16 in some releases, and because a damaged file should be
told by its name and the faulty entry: every offset is checked before a byte of a tensor is read.
"""

import dataclasses
import functools
import math
import mmap
import os
import pathlib
import stat
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from jft import errors, json_text
from jft.models import folders

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
FLOATS = ("F64", "F32", "F16", "BF16")
_MAX_HEADER = 100_000_000  # the format's own limit
_KEYS = ("dtype", "shape", "data_offsets")
_MAX_DIMS, _MAX_SIZE = 32, 1 << 58


@dataclasses.dataclass(frozen=True)
class File:
    """A file whose header has been read; its bytes are mapped once, when a tensor is first asked for."""

    path: pathlib.Path
    size: int

    @functools.cached_property
    def data(self) -> np.ndarray:
        with _opened(self.path) as stream:
            if os.fstat(stream.fileno()).st_size != self.size:
                raise errors.UserError(f"{self.path}: has changed while it was read")
            try:
                mapped = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
            except OSError as error:
                raise errors.UserError(f"{self.path}: {error.strerror or error}") from error
        return np.frombuffer(mapped, np.uint8)


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One tensor of a file: `name` is as there, `start` and `stop` are places in the file."""

    name: str
    file: File
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def where(self) -> str:
        return f"{self.file.path}: {self.name}"

    @property
    def raw(self) -> np.ndarray:
        """Its bytes as a view of the memory map."""
        return self.file.data[self.start : self.stop]

    def values(self) -> np.ndarray:
        """The tensor as a view of the memory map."""
        return self.raw.view(_DTYPES[self.dtype]).reshape(self.shape)


def is_dtype(name: str) -> bool:
    """Whether the format has a type of this name that is read here."""
    return name in _DTYPES


def numpy_dtype(name: str) -> np.dtype:
    """numpy's type of the format's name of one."""
    return _DTYPES[name]


def read(path: pathlib.Path) -> dict[str, Tensor]:
    """The tensors of a file by name.

    Raises:
      errors.UserError: the file can't be read, is cut short, or its header contradicts itself.
    """
    with _opened(path) as stream:
        size = os.fstat(stream.fileno()).st_size
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > min(size - 8, _MAX_HEADER):
            raise errors.UserError(
                f"{path}: not a safetensors file, or cut short: its header should have {length} bytes "
                f"and the file has {size}"
            )
        header = _parse(stream.read(length), path)
    texts = header.pop("__metadata__", {})
    if not isinstance(texts, dict) or not all(map(_is_text, (*texts, *texts.values()))):
        raise errors.UserError(f"{path}: the header's __metadata__ is no object of texts")
    file, body = File(path, size), 8 + length
    tensors = {name: _tensor(name, entry, file, body) for name, entry in header.items()}
    _check_offsets(header, size - body, path)
    return tensors


def read_folder(folder: pathlib.Path) -> dict[str, Tensor]:
    """The tensors of a model's folder by name: of its one file, or of the shards that its index names.

    Raises:
      errors.UserError: there is none, one is damaged, or the index and the shards contradict each other.
    """
    single, index = folders.has(folder, SINGLE), folders.has(folder, INDEX)
    if single and index:
        raise errors.UserError(f"{folder}: both {SINGLE} and {INDEX} are there; remove one")
    if single:
        return read(folders.file(folder, SINGLE))
    if index:
        return _read_shards(folder, folders.file(folder, INDEX))
    raise errors.UserError(f"{folder}: no {SINGLE} and no {INDEX}{folders.hint(folder)}")


def _read_shards(folder: pathlib.Path, index: pathlib.Path) -> dict[str, Tensor]:
    placed = folders.read_json(index).get("weight_map")
    if not isinstance(placed, dict) or not all(map(_is_name, (*placed, *placed.values()))):
        raise errors.UserError(f"{index}: weight_map is not an object of names and files")
    found: dict[str, Tensor] = {}
    for file in sorted(set(placed.values())):
        first = next(name for name, own in placed.items() if own == file)
        # By the letters of the path: what a link leads to is looked at afterwards.
        if pathlib.PurePosixPath(file).parts != (file,) or "\\" in file or file in (".", ".."):
            raise errors.UserError(
                f"{index}: weight_map has {first} in {file!r}, not a file's name in the folder"
            )
        if not folders.has(folder, file):
            raise errors.UserError(f"{index}: {first} is in {file}, which is not in the folder")
        for name, tensor in read(folders.file(folder, file)).items():
            if name in found:
                raise errors.UserError(f"{tensor.where}: is also in {found[name].file.path.name}")
            found[name] = tensor
    _check_index(placed, found, index)
    return found


def _check_index(
    placed: Mapping[str, str], found: Mapping[str, Tensor], index: pathlib.Path
) -> None:
    for name, file in placed.items():
        if name not in found or found[name].file.path.name != file:
            raise errors.UserError(f"{index}: {name} should be in {file} and is not")
    unlisted = sorted(set(found) - set(placed))
    if unlisted:
        raise errors.UserError(f"{found[unlisted[0]].where}: is not in {index.name}")


def _opened(path: pathlib.Path) -> Any:
    try:
        # A pipe would keep `open` waiting.
        if not stat.S_ISREG(path.stat().st_mode):
            raise errors.UserError(f"{path}: is no file that can be read")
        return path.open("rb")
    except OSError as error:
        raise errors.UserError(f"{path}: {error.strerror or error}") from error


def _is_name(text: Any) -> bool:
    return isinstance(text, str) and text.isprintable()


def _is_text(value: Any) -> bool:
    """A text that is not half of a surrogate pair, which JSON can write and UTF-8 can't."""
    try:
        return isinstance(value, str) and bool(value.encode() or True)
    except UnicodeEncodeError:
        return False


def _parse(text: bytes, path: pathlib.Path) -> dict[str, Any]:
    header = json_text.loads(text, f"{path}: the safetensors header is", unique=True, finite=True)
    if not isinstance(header, dict):
        raise errors.UserError(f"{path}: the safetensors header is not a JSON object")
    return header


def _tensor(name: str, entry: Any, file: File, body: int) -> Tensor:
    path, room = file.path, file.size - body
    if not _is_sound(name, entry):
        said = f"{json_text.shown(name)}: the header's entry is malformed: {json_text.shown(entry)}"
        raise errors.UserError(f"{path}: {said}")
    dtype, shape, (start, stop) = (entry[key] for key in _KEYS)
    if dtype not in _DTYPES:
        raise errors.UserError(
            f"{path}: {name}: stored as {json_text.shown(dtype)}, which is not read here"
        )
    need = math.prod(shape) * _DTYPES[dtype].itemsize
    if stop - start != need:
        raise errors.UserError(
            f"{path}: {name}: {dtype} {shape} needs {need} bytes, the header gives {stop - start}"
        )
    if stop > room:
        raise errors.UserError(
            f"{path}: {name}: ends at byte {stop} of {room}: the file is cut short"
        )
    return Tensor(name, file, dtype, tuple(shape), body + start, body + stop)


def _is_sound(name: str, entry: Any) -> bool:
    """Whether a header's entry has its form, and numbers that arrays can have."""
    if not isinstance(entry, dict) or entry.keys() != set(_KEYS) or not _is_name(name):
        return False
    dtype, shape, offsets = (entry[key] for key in _KEYS)
    if not isinstance(dtype, str) or not isinstance(shape, list) or not isinstance(offsets, list):
        return False
    if len(shape) > _MAX_DIMS or len(offsets) != 2:
        return False
    counts = all(type(count) is int and count >= 0 for count in (*offsets, *shape))
    # A size of 0 beside a huge one needs no bytes, and numpy can't hold it.
    return counts and offsets[0] <= offsets[1] and math.prod(x or 1 for x in shape) < _MAX_SIZE


def _check_offsets(header: dict[str, Any], size: int, path: pathlib.Path) -> None:
    """The tensors must cover the bytes without hole or overlap, or two names share one memory."""
    end = 0
    spans = sorted((*entry["data_offsets"], name) for name, entry in header.items())
    for start, stop, name in spans:
        if start != end:
            what = "overlap" if start < end else "leave a hole"
            raise errors.UserError(
                f"{path}: {name}: the tensors' bytes {what} at {start} (expected {end})"
            )
        end = stop
    if end != size:
        raise errors.UserError(f"{path}: {size - end} bytes after the last tensor belong to none")
