# SPDX-License-Identifier: Apache-2.0
"""Loads a model of any family from a .gguf file: configuration, weights (dequantised) and tokenizer in one.

What llama.cpp's converter changed is undone: see `gguf_names` for the tensors, `gguf_config` for the metadata.
"""

import dataclasses
import pathlib
from typing import Any

import numpy as np

from jft import errors
from jft.models import (
    architecture,
    decoder,
    families,
    fingerprint,
    gguf_architectures,
    gguf_blocks,
    gguf_config,
    gguf_file,
    gguf_names,
    gguf_packed,
    gguf_rope,
    gguf_tokenizer,
    hf,
    names,
    pages,
    quantizing,
)


def load(
    path: str | pathlib.Path,
    dtype: Any,
    shardings: hf.Shardings | None = None,
    quantize: quantizing.Settings = quantizing.DENSE,
) -> tuple[architecture.Config, decoder.Params, str]:
    """A model from its file; as `hf.load`.

    Args:
      path: the .gguf file; any block type that the `gguf` package can dequantise.
      dtype: of the parameters, such as "float32".
      shardings, quantize: as in `hf.load`; blocks of the kind that is asked for are kept, see `gguf_packed`.

    Returns:
      The configuration, the parameters as a nested dict of arrays, and the fingerprint of the
      tensors as stored.

    Raises:
      errors.UserError: damaged, another architecture, or tensors that are not the expected ones.
    """
    file = gguf_file.read(path)
    config = gguf_config.read(file)
    _match(config, file)
    tensors = families.tensors(config)
    wanted = {name: _sources(config, *place) for name, place in tensors.items()}

    leaves = gguf_packed.leaves(file, config, quantize, hf.float_dtype(dtype))

    def fetch(name: str) -> Any:
        weight, _ = tensors[name]
        if leaf := leaves.get(weight.path):
            return leaf.join([source.packed(file, config, leaf) for source in wanted[name]])
        parts = [source.read(file, config) for source in wanted[name]]
        return weight.to_file(parts[0] if len(parts) == 1 else np.stack(parts, -1), config)

    def where(name: str) -> str:
        return f"{file.path}: {' and '.join(source.name for source in wanted[name])}"

    blocks = {path: leaf.like for path, leaf in leaves.items()}
    params = hf.assemble(config, dtype, fetch, where, shardings, quantize, blocks)
    return config, params, _fingerprint(file, wanted)


def read_config(path: str | pathlib.Path) -> architecture.Config:
    """The configuration alone."""
    return gguf_config.read(gguf_file.read(path))


def shapes(path: str | pathlib.Path, dtype: Any, quantize: quantizing.Settings) -> dict[str, Any]:
    """Shapes of the parameters by path, those that are quantised as QArrays of shapes."""
    file = gguf_file.read(path)
    config = gguf_config.read(file)
    _match(config, file)
    leaves = gguf_packed.leaves(file, config, quantize, hf.float_dtype(dtype))
    return hf.expected(config, dtype, quantize, {path: own.like for path, own in leaves.items()})


def notes(path: str | pathlib.Path, quantize: quantizing.Settings) -> tuple[str, ...]:
    """What becomes of the file's blocks in a model that is loaded quantised, for people."""
    file = gguf_file.read(path)
    return gguf_packed.notes(file, gguf_config.read(file), quantize)


def tokenizer(path: str | pathlib.Path) -> Any:
    """The file's tokenizer, as transformers' PreTrainedTokenizerFast."""
    file = gguf_file.read(path)
    return gguf_tokenizer.build(file.metadata, str(path))


@dataclasses.dataclass(frozen=True)
class _Source:
    """A tensor of the file, or one expert's part of it, that a tensor of a Hugging Face checkpoint is made of."""

    row: gguf_names.Row
    name: str
    expert: int | None

    def read(self, file: gguf_file.File, c: architecture.Config) -> np.ndarray:
        """In our layout."""
        tensor = file.tensors[self.name]
        values = gguf_blocks.dequantise(tensor, file.path, self.expert)
        pages.release(tensor.raw)
        return self._turned(values, c)

    def packed(
        self, file: gguf_file.File, c: architecture.Config, leaf: gguf_packed.Leaf
    ) -> list[np.ndarray]:
        """The arrays of its blocks, in our layout."""
        tensor = file.tensors[self.name]
        arrays = leaf.arrays(file, tensor, self.expert)
        pages.release(tensor.raw)
        return [self._turned(x, c, block) for x, block in arrays]

    def _turned(self, x: np.ndarray, c: architecture.Config, block: int = 1) -> np.ndarray:
        if self.expert is None:
            return self.row.from_file(x, c, block)
        return self.row.from_file(x[None], _one_expert(c), block)[0]


def _one_expert(c: architecture.Config) -> architecture.Config:
    assert c.experts
    return dataclasses.replace(c, experts=dataclasses.replace(c.experts, count=1))


def _sources(
    config: architecture.Config, weight: names.Weight, index: names.Index
) -> tuple[_Source, ...]:
    """Where one tensor of a Hugging Face checkpoint comes from."""
    places = dict(zip(weight.stacked, index, strict=True))
    return tuple(
        _Source(row, row.tensor(places.get("L")), places.get("E"))
        for row in gguf_names.rows(config)
        if row.weight.path == weight.path
    )


def _match(config: architecture.Config, file: gguf_file.File) -> None:
    """Each expected tensor in its shape; nothing missing or left over."""
    own = gguf_architectures.of_family(config.family)
    used = set(gguf_rope.TENSORS[own.rope_tensors])
    if gguf_config.repeats_embedding(file):
        used.add("output.weight")
    for row in gguf_names.rows(config):
        shape = row.weight.stored_shape(config)
        for index in gguf_names.layers(config, row):
            name = row.tensor(*(index or (None,)))
            if name not in file.tensors:
                raise errors.UserError(f"{file.path}: {name} is missing")
            if file.tensors[name].shape != shape:
                raise errors.UserError(
                    f"{file.path}: {name} has shape {file.tensors[name].shape}, the metadata says {shape}"
                )
            used.add(name)
    extra = sorted(set(file.tensors) - used)
    if extra:
        raise errors.UserError(
            f"{file.path}: {extra[0]} is no tensor of this architecture ({len(extra)} such)"
        )


def _fingerprint(file: gguf_file.File, wanted: dict[str, tuple[_Source, ...]]) -> str:
    """Of the tensors as stored: under Hugging Face names where one is one, else under their own."""
    raw = {}
    for name, sources in wanted.items():
        for source in sources:
            tensor = file.tensors[source.name]
            one = len(sources) == 1 and source.expert is None
            raw[name if one else tensor.name] = (str(tensor.kind), tensor.shape, tensor.raw)
    return fingerprint.compute(raw)
