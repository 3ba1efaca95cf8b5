# SPDX-License-Identifier: Apache-2.0
"""A quantised base as a folder: config.json, the tokenizer, quantized*.safetensors, and quantized.json, which says what is in it.

Every array of a quantised parameter is a tensor under the parameter's path (`layers/mlp/up/kernel.codes`, `.scales.scales`);
what is not quantised is there as it was stored. quantized.json keeps the original's fingerprint, so that adapters fit both,
and a hash of every tensor, and is sealed by a hash of itself: against damage and mixed-up files, not against forgery.
"""

import dataclasses
import hashlib
import json
import pathlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jft import errors, quant, tree
from jft.models import (
    architecture,
    decoder,
    folders,
    hf,
    packed_record,
    pages,
    placing,
    quantizing,
    safetensors,
    shards,
)

RECORD, _STEM = "quantized.json", "quantized"
_FILE = re.compile(_STEM + r"(-\d{5}-of-\d{5})?\.safetensors")
_FORMAT = 1
_HASHED = 1 << 24  # bytes at once

read_config, tokenizer = hf.read_config, hf.tokenizer


@dataclasses.dataclass(frozen=True)
class Origin:
    """What a quantised base was made of.

    Attributes:
      base: a name that `resolve` takes.
      revision: of it; None for other places than the Hub.
      fingerprint: of its tensors.
      settings: how it was quantised.
    """

    base: str
    revision: str | None
    fingerprint: str
    settings: quantizing.Settings


def is_one(place: pathlib.Path) -> bool:
    """Whether a folder holds a quantised base."""
    return place.is_dir() and folders.has(place, RECORD)


def notes(folder: pathlib.Path, quantize: quantizing.Settings) -> tuple[str, ...]:
    """Nothing was quantised again."""
    return ()


def write(
    folder: pathlib.Path, params: Mapping[str, Any], origin: Origin, max_shard_size: int
) -> list[shards.Tensor]:
    """Writes the files and quantized.json.

    Args:
      folder: is there.
      params: by path: arrays and QArrays of arrays.
      origin: goes into quantized.json.
      max_shard_size: of a file, in bytes.

    Returns:
      What the files hold.
    """
    arrays = {name: x for path, leaf in params.items() for name, x in _named(path, leaf)}
    tensors = [shards.Tensor(name, x.shape, np.dtype(x.dtype)) for name, x in arrays.items()]
    written: dict[str, Any] = {}
    for file, own in shards.split(tensors, max_shard_size, _STEM).items():
        shards.write(folder / file, own, _hashing(file, own, arrays, written))
    record = {
        "format": _FORMAT,
        "quantize": origin.settings.kind,
        "quantize_embeddings": origin.settings.embeddings,
        "base": origin.base,
        "revision": origin.revision,
        "fingerprint": origin.fingerprint,
        "leaves": {path: _levels(leaf) for path, leaf in params.items()},
        "tensors": {tensor.name: written[tensor.name] for tensor in tensors},
    }
    text = json.dumps(record | {"seal": _seal(record)}, indent=2, ensure_ascii=False)
    (folder / RECORD).write_text(text + "\n", encoding="utf-8")
    return tensors


def _named(path: str, leaf: Any) -> Iterator[tuple[str, Any]]:
    """The arrays of a parameter by their names in the file."""
    for keys, x in jax.tree_util.tree_leaves_with_path(leaf):
        yield ".".join([path, *(key.name for key in keys)]), x


def _levels(leaf: Any) -> list[dict[str, Any]]:
    """A QArray, the QArray of its scales, and so on; [] for an array."""
    if not tree.is_quantized(leaf):
        return []
    own = {"kind": leaf.kind, "axis": leaf.axis, "block": leaf.block}
    return [own | {"offsets": leaf.offsets is not None}, *_levels(leaf.scales)]


def _hashing(
    file: str,
    tensors: Sequence[shards.Tensor],
    arrays: Mapping[str, Any],
    written: dict[str, Any],
) -> Iterator[np.ndarray]:
    for tensor in tensors:
        array = np.ascontiguousarray(shards.host(arrays[tensor.name], ()))
        said = {"dtype": shards.spelled(tensor.dtype), "shape": list(tensor.shape)}
        raw = array.reshape(-1).view(np.uint8)
        written[tensor.name] = {"file": file, **said, "sha256": _hash(tensor.name, said, raw)}
        yield array


def _hash(name: str, said: Mapping[str, Any], raw: np.ndarray) -> str:
    """Of a tensor's name, type, shape and bytes."""
    digest = hashlib.sha256(f"{name}\n{said['dtype']}\n{said['shape']}\n".encode())
    for start in range(0, raw.size, _HASHED):
        digest.update(raw[start : start + _HASHED])
        pages.release(raw[start : start + _HASHED])
    return digest.hexdigest()


def _seal(record: Mapping[str, Any]) -> str:
    rest = {key: value for key, value in record.items() if key != "seal"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def origin(folder: pathlib.Path) -> Origin:
    """What a folder's base was made of.

    Raises:
      errors.UserError: quantized.json is damaged, or has been changed.
    """
    return _origin(_read(folder))


def _read(folder: pathlib.Path) -> dict[str, Any]:
    path = folders.file(folder, RECORD)
    record = folders.read_json(path)
    if record.get("format") != _FORMAT:
        raise errors.UserError(f"{path}: format {record.get('format')!r}, not {_FORMAT}")
    if record.get("seal") != _seal(record):
        raise errors.UserError(
            f"{path}: has been changed since it was written (its seal does not fit): write the folder again"
        )
    packed_record.check(record, path)
    return record


def _origin(record: Mapping[str, Any]) -> Origin:
    settings = quantizing.Settings(record["quantize"], record["quantize_embeddings"])
    return Origin(record["base"], record["revision"], record["fingerprint"], settings)


def shapes(folder: pathlib.Path, dtype: Any, quantize: quantizing.Settings) -> dict[str, Any]:
    """Shapes of the parameters by path, those that are quantised as QArrays of shapes; nothing but JSON is read."""
    record = _checked(folder, quantize)
    return _shapes(folder, record, hf.read_config(folder), hf.float_dtype(dtype))


def _checked(folder: pathlib.Path, quantize: quantizing.Settings) -> dict[str, Any]:
    """quantized.json, if its settings are those that are asked for."""
    record = _read(folder)
    held = _origin(record).settings
    if held != quantize:
        raise errors.UserError(
            f"{folder}: holds a base with {held}, not {quantize}: give that, or the original, {record['base']}"
        )
    return record


def _shapes(
    folder: pathlib.Path, record: Mapping[str, Any], config: architecture.Config, dtype: Any
) -> dict[str, Any]:
    tensors = record["tensors"]

    def array(name: str) -> jax.ShapeDtypeStruct:
        if name not in tensors:
            raise errors.UserError(f"{folder / RECORD}: {name} is missing")
        said = tensors[name]
        return jax.ShapeDtypeStruct(said["shape"], safetensors.numpy_dtype(said["dtype"]))

    def leaf(name: str, levels: Sequence[Mapping[str, Any]], dtype: Any) -> Any:
        if not levels:
            return array(name)
        own, *inner = levels
        scales = leaf(f"{name}.scales", inner, np.dtype(np.float32))
        offsets = array(f"{name}.offsets") if own["offsets"] else None
        form = (own["kind"], own["axis"], own["block"])
        return quant.QArray(array(f"{name}.codes"), scales, offsets, *form, dtype)

    found = {}
    for path, want in tree.flatten(decoder.shapes(config)).items():
        levels = record["leaves"].get(path)
        if levels is None:
            raise errors.UserError(f"{folder / RECORD}: {path} is missing")
        own = leaf(path, levels, dtype)
        if tuple(own.shape) != want.shape:
            raise errors.UserError(
                f"{folder / RECORD}: {path} has shape {tuple(own.shape)}, config.json says {want.shape}"
            )
        found[path] = own if levels else jax.ShapeDtypeStruct(want.shape, dtype)
    return found


def load(
    folder: str | pathlib.Path,
    dtype: Any,
    shardings: hf.Shardings | None = None,
    quantize: quantizing.Settings = quantizing.DENSE,
) -> tuple[architecture.Config, decoder.Params, str]:
    """A quantised base; as `hf.load`, with the fingerprint of the original's tensors.

    Raises:
      errors.UserError: a file is damaged, missing or of another base, or `quantize` is not what the folder holds.
    """
    folder, dtype = pathlib.Path(folder), hf.float_dtype(dtype)
    record, config = _checked(folder, quantize), hf.read_config(folder)
    stored = _stored(folder, record["tensors"])

    def values(name: str) -> np.ndarray:
        tensor, said = stored[name], record["tensors"][name]
        if _hash(name, said, tensor.raw) != said["sha256"]:
            raise errors.UserError(
                f"{tensor.where}: its bytes are not those that {RECORD} has the hash of: damaged, or of another base"
            )
        return tensor.values()

    def leaf(path: str, like: Any) -> Any:
        taking = placing.Leaf(like, shardings(path, like) if shardings else None)
        names = [name for name, _ in _named(path, like)]
        own = [values(name) for name in names]
        if not taking.fill((), jax.tree.unflatten(jax.tree.structure(like), own)):
            raise errors.UserError(
                f"{stored[names[0]].where}: has a value that is not finite in {np.dtype(dtype)}"
            )
        for name in names:
            pages.release(stored[name].raw)
        return taking.place()

    found = _shapes(folder, record, config, dtype)
    params = tree.unflatten({path: leaf(path, like) for path, like in found.items()})
    return config, params, record["fingerprint"]


def _stored(
    folder: pathlib.Path, tensors: Mapping[str, Mapping[str, Any]]
) -> dict[str, safetensors.Tensor]:
    """The files' tensors, which must be those of quantized.json."""
    found: dict[str, safetensors.Tensor] = {}
    for file in sorted({said["file"] for said in tensors.values()}):
        if not _FILE.fullmatch(file) or not folders.has(folder, file):
            raise errors.UserError(f"{folder / file}: is missing, and {RECORD} names it")
        found |= safetensors.read(folders.file(folder, file))
    for name, said in tensors.items():
        if name not in found or found[name].file.path.name != said["file"]:
            raise errors.UserError(f"{folder / said['file']}: {name} is missing")
        held = (found[name].dtype, list(found[name].shape))
        if held != (said["dtype"], said["shape"]):
            raise errors.UserError(
                f"{found[name].where}: {held[0]} {held[1]}, {RECORD} says {said['dtype']} {said['shape']}"
            )
    extra = sorted(found.keys() - tensors.keys())
    if extra:
        raise errors.UserError(f"{found[extra[0]].where}: {RECORD} names no such tensor")
    return found
