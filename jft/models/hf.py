# SPDX-License-Identifier: Apache-2.0
"""Reads a Hugging Face model folder: config.json, safetensors (one file or shards), tokenizer.

Tensors come through memory maps one at a time and go straight into their shards on the devices:
the peak is the parameters and the largest tensor. What the files hold must be exactly what the
configuration says; nothing is unpickled and no code of the folder is run.
"""

import pathlib
import re
import types
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax
import ml_dtypes
import numpy as np

from jft import errors, quant, tree
from jft.models import (
    architecture,
    decoder,
    families,
    fingerprint,
    folders,
    mxfp4,
    names,
    packing,
    pages,
    placing,
    quantizing,
    safetensors,
    tokenizer_files,
)

# Of a leaf's path and its shape: the leaf's sharding. For a quantised leaf it gets a QArray of shapes and gives one of
# shardings.
Shardings = Callable[[str, Any], Any]

_CONFIG = "config.json"
_HEAD, _EMBEDDING = "lm_head.weight", "embed/embedding"
# Constants that some releases saved: rotary frequencies, and GPT-2's causal mask and what it puts there.
_HARMLESS = re.compile(
    r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq"
    r"|transformer\.h\.\d+\.attn\.(bias|masked_bias)"
)
_COMPARED = 1 << 24  # bytes at once

tokenizer = tokenizer_files.load


def load(
    folder: str | pathlib.Path,
    dtype: Any,
    shardings: Shardings | None = None,
    quantize: quantizing.Settings = quantizing.DENSE,
) -> tuple[architecture.Config, decoder.Params, str]:
    """A model from its folder.

    Args:
      folder: holds config.json and model.safetensors, or its index and shards.
      dtype: of the parameters, such as "float32" or "bfloat16".
      shardings, quantize: as for `assemble`.

    Returns:
      The configuration, the parameters as a nested dict of arrays, and the fingerprint of the
      tensors as stored.

    Raises:
      errors.UserError: a file is missing or damaged, the configuration is not implemented, or the
        tensors are not exactly the expected ones, finite and of the right shapes.
    """
    folder = pathlib.Path(folder)
    config = read_config(folder)
    stored = _by_full_names(safetensors.read_folder(folder), config)
    packed = _packed(stored, families.tensors(config))
    _match(config, stored, packed, folder)

    def fetch(name: str) -> np.ndarray:
        if name not in packed:
            return stored[name].values()
        blocks, scales = (stored[part] for part in packed[name])
        values = mxfp4.experts(blocks.values(), scales.values())
        pages.release(blocks.raw)
        return values

    def where(name: str) -> str:
        return stored[packed[name][0] if name in packed else name].where

    params = assemble(config, dtype, fetch, where, shardings, quantize)
    used = [part for name in families.tensors(config) for part in packed.get(name, (name,))]
    raw = {name: (stored[name].dtype, stored[name].shape, stored[name].raw) for name in used}
    return config, params, fingerprint.compute(raw)


def _packed(
    stored: Mapping[str, safetensors.Tensor], expected: Collection[str]
) -> dict[str, tuple[str, str]]:
    """Tensors that are there as MXFP4 instead: by name, those of their blocks and scales."""
    parts = {name: (f"{name}_blocks", f"{name}_scales") for name in expected if name not in stored}
    return {name: both for name, both in parts.items() if all(part in stored for part in both)}


def read_config(folder: str | pathlib.Path) -> architecture.Config:
    """The configuration alone."""
    folder = pathlib.Path(folder)
    if not folders.has(folder, _CONFIG):
        raise errors.UserError(f"{folder}: no {_CONFIG}{folders.hint(folder)}")
    path = folders.file(folder, _CONFIG)
    return families.from_hf(folders.read_json(path), str(path))


def shapes(folder: str | pathlib.Path, dtype: Any, quantize: quantizing.Settings) -> dict[str, Any]:
    """Shapes of the parameters by path, those that are quantised as QArrays of shapes."""
    return expected(read_config(folder), dtype, quantize)


def expected(
    config: architecture.Config,
    dtype: Any,
    quantize: quantizing.Settings,
    blocks: Mapping[str, quant.QArray] = types.MappingProxyType({}),
) -> dict[str, Any]:
    """What `assemble` gives, as shapes by path."""
    dtype = float_dtype(dtype)

    def leaf(path: str, x: jax.ShapeDtypeStruct) -> Any:
        if path in blocks:
            return blocks[path]
        return quantizing.shape(path, jax.ShapeDtypeStruct(x.shape, dtype), quantize)

    return {path: leaf(path, x) for path, x in tree.flatten(decoder.shapes(config)).items()}


def notes(folder: str | pathlib.Path, quantize: quantizing.Settings) -> tuple[str, ...]:
    """What becomes of tensors that are stored as blocks in a model that is loaded quantised, for people."""
    folder = pathlib.Path(folder)
    config = read_config(folder)
    rows = families.tensors(config)
    packed = _packed(_by_full_names(safetensors.read_folder(folder), config), rows)
    paths = [rows[name][0].path for name in packed]
    count = sum(quantizing.kind(path, quantize) != quantizing.NONE for path in paths)
    told = f"{folder.name}: {count} MXFP4 tensors are dequantised and quantised again"
    return (told,) if count else ()


def assemble(
    config: architecture.Config,
    dtype: Any,
    fetch: Callable[[str], Any],
    where: Callable[[str], str],
    shardings: Shardings | None = None,
    quantize: quantizing.Settings = quantizing.DENSE,
    blocks: Mapping[str, quant.QArray] = types.MappingProxyType({}),
) -> decoder.Params:
    """Puts tensors, fetched by their Hugging Face names, into the stacked parameters on their devices.

    One parameter at a time is in host memory besides those that the devices keep there, as far as devices of this
    host hold it; of one that is quantised, its packed arrays and one tensor.

    Args:
      config: says which tensors there are and their shapes, which the caller has checked.
      dtype: of the parameters, and of the values of those that are quantised.
      fetch: gives a tensor by name; called once for each that this host needs. A view of a memory
        map is released after use (see `pages`).
      where: the place of a tensor, for messages.
      shardings: the sharding of each parameter by path and shape; None for the default device.
      quantize: which parameters are quantised, from the tensors as they are fetched.
      blocks: parameters, by path, whose tensors `fetch` gives as QArrays in our layout: the arrays' shapes.
    """
    dtype = float_dtype(dtype)
    stacks: dict[str, list[tuple[str, names.Weight, names.Index]]] = {}
    for name, (weight, index) in families.tensors(config).items():
        stacks.setdefault(weight.path, []).append((name, weight, index))

    def leaf(path: str, like: Any) -> Any:
        taking = placing.Leaf(like, shardings(path, like) if shardings else None)
        how = None if path in blocks else quantizing.way(path, like.shape, quantize)
        for name, weight, index in stacks[path]:
            if not taking.meets(index):
                continue
            tensor = fetch(name)
            if path in blocks:
                own = tensor
            elif how is None:
                own = weight.from_file(tensor, config)
            else:
                own = packing.quantized(tensor, weight, config, how, len(index))
            if own is None or not taking.fill(index, own):
                raise errors.UserError(f"{where(name)}: {placing.fault(tensor, dtype)}")
            if path not in blocks:
                pages.release(tensor)
        # Here the whole leaf is in hand, and nowhere else: what changes a leaf before it is placed goes here.
        return taking.place()

    likes = expected(config, dtype, quantize, blocks)
    return tree.unflatten({path: leaf(path, like) for path, like in likes.items()})


def _by_full_names(
    stored: Mapping[str, safetensors.Tensor], config: architecture.Config
) -> dict[str, safetensors.Tensor]:
    """The tensors by the names that they have in a whole model.

    A file of the model without its head, as OpenAI published GPT-2, lacks the prefix of all of them.
    """
    rows = families.tensors(config).items()
    prefix = next(name for name, (weight, _) in rows if weight.path == _EMBEDDING).split(".")[0]
    if any(name.startswith(f"{prefix}.") for name in stored):
        return dict(stored)
    return {
        name if name == _HEAD else f"{prefix}.{name}": tensor for name, tensor in stored.items()
    }


def _match(
    config: architecture.Config,
    stored: Mapping[str, safetensors.Tensor],
    packed: Mapping[str, tuple[str, str]],
    folder: pathlib.Path,
) -> None:
    """Each expected tensor exactly once, in its shape, and nothing else."""
    expected = families.tensors(config)
    missing = [name for name in expected if name not in stored and name not in packed]
    if missing:
        why = "; is tie_word_embeddings of config.json right?" if missing == [_HEAD] else ""
        raise errors.UserError(
            f"{folder}: {missing[0]} is missing ({len(missing)} of {len(expected)} tensors are)"
            + why
        )
    for name, both in packed.items():
        _check_packed([stored[part] for part in both], expected[name][0].stored_shape(config))
    halves = {part for both in packed.values() for part in both}
    for name, tensor in stored.items():
        if name in halves:
            continue
        if name in expected:
            shape = expected[name][0].stored_shape(config)
            if tensor.shape != shape:
                raise errors.UserError(
                    f"{tensor.where}: shape {tensor.shape}, config.json says {shape}"
                )
            if tensor.dtype not in safetensors.FLOATS:
                raise errors.UserError(f"{tensor.where}: stored as {tensor.dtype}, not a float")
        elif name == _HEAD:
            embedding = next(n for n, (w, _) in expected.items() if w.path == _EMBEDDING)
            _refuse_other_head(tensor, stored[embedding])
        elif not _HARMLESS.fullmatch(name):
            raise errors.UserError(f"{tensor.where}: config.json asks for no such tensor")


def _check_packed(both: Sequence[safetensors.Tensor], shape: tuple[int, ...]) -> None:
    """Raises UserError unless blocks and scales are bytes of the right shapes for [experts, inputs, outputs]."""
    experts, inputs, outputs = shape
    count = inputs // mxfp4.BLOCK
    for tensor, want in zip(both, ((count, mxfp4.BLOCK // 2), (count,)), strict=True):
        wanted = (experts, outputs, *want)
        if tensor.dtype != "U8" or tensor.shape != wanted or inputs % mxfp4.BLOCK:
            raise errors.UserError(
                f"{tensor.where}: {tensor.dtype} {tensor.shape}, config.json says U8 {wanted}"
            )


def _refuse_other_head(head: safetensors.Tensor, embedding: safetensors.Tensor) -> None:
    """A head saved beside a tied embedding is left out when it says the same."""
    same = head.shape == embedding.shape and head.dtype == embedding.dtype
    if not same or not _equal_bytes(head.raw, embedding.raw):
        raise errors.UserError(
            f"{head.where}: differs from {embedding.name}, and config.json says tie_word_embeddings"
        )


def _equal_bytes(one: np.ndarray, other: np.ndarray) -> bool:
    for start in range(0, one.size, _COMPARED):
        blocks = [raw[start : start + _COMPARED] for raw in (one, other)]
        same = np.array_equal(*blocks)
        for block in blocks:
            pages.release(block)
        if not same:
            return False
    return True


def float_dtype(dtype: Any) -> np.dtype:
    """A type that parameters can have; raises UserError for any other."""
    allowed = (np.float32, ml_dtypes.bfloat16, np.float16, np.float64)
    named = {np.dtype(kind).name: np.dtype(kind) for kind in allowed}
    name = dtype if isinstance(dtype, str) else np.dtype(dtype).name
    if name not in named:
        raise errors.UserError(f"dtype {name!r} is not one of {', '.join(named)}")
    if jax.dtypes.canonicalize_dtype(named[name]) != named[name]:
        raise errors.UserError(f"dtype {name!r} needs jax_enable_x64")
    return named[name]
