# SPDX-License-Identifier: Apache-2.0
"""Writes a model as one .gguf file, for llama.cpp and what is built on it, tensor by tensor."""

import collections
import dataclasses
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from jft import errors, tree
from jft.models import (
    architecture,
    decoder,
    gguf_architectures,
    gguf_blocks,
    gguf_metadata,
    gguf_names,
    gguf_rope,
)

# llama.cpp's numbers for general.file_type.
_FILE_TYPES = {"f32": 0, "f16": 1, "bf16": 32, "q8_0": 7}
_QUANTIZATION_VERSION = 2


@dataclasses.dataclass(frozen=True)
class Report:
    """What was written.

    Attributes:
      path: of the file.
      kinds: how many tensors there are of each type.
      halved: names of tensors of a q8_0 file that are float16, for their rows are no whole blocks of 32.
      notes: what the file says less than the model, or llama.cpp does otherwise; for people.
    """

    path: pathlib.Path
    kinds: Mapping[str, int]
    halved: tuple[str, ...]
    notes: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class _Planned:
    """One tensor to be written: where it comes from, or its values."""

    name: str
    shape: tuple[int, ...]
    kind: str
    row: gguf_names.Row | None = None
    index: tuple[int, ...] = ()
    values: np.ndarray | None = None


def save(
    path: str | pathlib.Path,
    config: architecture.Config,
    params: decoder.Params,
    tokenizer: Any,
    kind: str = "f16",
) -> Report:
    """Writes the file, whole or not at all.

    Args:
      path: of the file; one of the same name is replaced.
      config: of the decoder.
      params: nested dict of arrays, layers stacked.
      tokenizer: of transformers; None for a file without one, which only takes token numbers.
      kind: of the large tensors: "f32", "f16", "bf16" or "q8_0". Norms, biases and routers stay float32.

    Returns:
      What was written, with notes that the user should see.

    Raises:
      errors.UserError: the model can't be said in GGUF, a value does not fit the type, or the file can't be written.
    """
    path = pathlib.Path(path)
    if kind not in gguf_blocks.KINDS:
        raise errors.UserError(f"{path}: {kind!r} is not one of {', '.join(gguf_blocks.KINDS)}")
    notes, config = gguf_metadata.notes(config), gguf_metadata.written(config)
    leaves = _leaves(config, params, path)
    planned = _plan(config, kind)
    gguf_metadata.check(config, {own.name: own.shape for own in planned}, path)
    metadata = gguf_metadata.write(config) | {
        "general.name": path.stem,
        "general.file_type": _FILE_TYPES[kind],
        "general.quantization_version": _QUANTIZATION_VERSION,
    }
    vocabulary, unsaid = _vocabulary(tokenizer, config, path)
    metadata |= vocabulary
    part = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _write(part, metadata, planned, config, leaves, path)
        os.replace(part, path)
    except OSError as error:
        raise errors.UserError(f"{path}: can't be written: {error.strerror or error}") from error
    finally:
        part.unlink(missing_ok=True)
    kinds = collections.Counter(own.kind for own in planned)
    halved = [own.name for own in planned if kind == "q8_0" and own.kind == "f16"]
    return Report(path, dict(kinds), tuple(halved), notes + unsaid)


def _leaves(
    config: architecture.Config, params: decoder.Params, path: pathlib.Path
) -> dict[str, Any]:
    """The parameters by path, which must be exactly the configuration's."""
    leaves, expected = tree.flatten(params), tree.flatten(decoder.shapes(config))
    for name in sorted(leaves.keys() | expected.keys()):
        got = tuple(leaves[name].shape) if name in leaves else "nothing"
        wanted = expected[name].shape if name in expected else "nothing"
        if tree.is_quantized(leaves.get(name)):
            raise errors.UserError(f"{path}: parameter {name} is quantised; give it dequantised")
        if got != wanted:
            raise errors.UserError(
                f"{path}: parameter {name} is {got}, the configuration says {wanted}"
            )
    return leaves


def _plan(config: architecture.Config, kind: str) -> list[_Planned]:
    values = gguf_rope.write_tensors(config.rope, config.rotary_dim or config.head_dim)
    found = [_Planned(name, value.shape, "f32", values=value) for name, value in values.items()]
    for row in gguf_names.rows(config):
        shape = row.weight.stored_shape(config)
        for index in gguf_names.layers(config, row):
            name = row.tensor(*(index or (None,)))
            own = gguf_blocks.chosen(kind, name, shape)
            found.append(_Planned(name, shape, own, row, index))
    return found


def _write(
    part: pathlib.Path,
    metadata: Mapping[str, Any],
    planned: list[_Planned],
    config: architecture.Config,
    leaves: Mapping[str, Any],
    path: pathlib.Path,
) -> None:
    """Writes to `part`; messages name `path`."""
    import gguf

    writer = gguf.GGUFWriter(str(part), metadata["general.architecture"])
    for key, value in metadata.items():
        _add(writer, key, value)
    for own in planned:
        size = gguf_blocks.size(own.kind, own.shape)
        # A dtype other than uint8, for which the writer would take the shape for bytes.
        writer.add_tensor_info(
            own.name, own.shape, np.dtype(np.float32), size, gguf_blocks.gguf_type(own.kind)
        )
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for own in planned:
            array = own.values
            if own.row:
                array = own.row.to_file(np.asarray(leaves[own.row.weight.path][own.index]), config)
            assert array is not None
            writer.write_tensor_data(gguf_blocks.encode(array, own.kind, f"{path}: {own.name}"))
    finally:
        writer.close()


def _add(writer: Any, key: str, value: Any) -> None:
    """One key, of the type that llama.cpp expects for a Python value."""
    import gguf

    types = gguf.GGUFValueType
    if key == "general.architecture":  # the writer's own
        return
    if isinstance(value, bool):
        writer.add_key_value(key, value, types.BOOL)
    elif isinstance(value, int):
        writer.add_key_value(key, value, types.UINT32)
    elif isinstance(value, float):
        writer.add_key_value(key, value, types.FLOAT32)
    elif isinstance(value, str):
        writer.add_key_value(key, value, types.STRING)
    else:
        writer.add_array(key, value)


def _vocabulary(
    tokenizer: Any, config: architecture.Config, path: pathlib.Path
) -> tuple[Mapping[str, Any], tuple[str, ...]]:
    """The tokenizer's keys, and what they do not say."""
    if tokenizer is None:
        return {"tokenizer.ggml.model": "none"}, ()
    from jft.models import gguf_vocabulary

    own = gguf_architectures.of_family(config.family).name
    keys, unsaid = gguf_vocabulary.metadata(
        tokenizer, str(path), vocab_size=config.vocab_size, architecture=own
    )
    return keys, tuple(unsaid)
