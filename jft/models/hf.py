# SPDX-License-Identifier: Apache-2.0
"""Reads a Hugging Face model folder: config.json, safetensors (one file or shards), tokenizer.

Tensors come through memory maps one at a time and go straight into the stacked arrays, allocated
once: the peak is the parameters and a few rows. What the files hold must be exactly what the
configuration says; nothing is unpickled and no code of the folder is run.
"""

import json
import pathlib
import re
from collections.abc import Callable, Mapping
from typing import Any

import ml_dtypes
import numpy as np

from jft import errors, tree
from jft.models import architecture, decoder, families, fingerprint, safetensors

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_ROWS = 128  # rows cast, checked and turned at once: small enough for the cache, 2.4 times faster
_HARMLESS = re.compile(r".*rotary_emb\.inv_freq")  # a buffer that old releases saved
_HEAD = "lm_head.weight"


def load(folder: str | pathlib.Path, dtype: Any) -> tuple[architecture.Config, decoder.Params, str]:
    """A model from its folder.

    Args:
      folder: holds config.json and model.safetensors, or its index and shards.
      dtype: of the parameters, such as "float32" or "bfloat16".

    Returns:
      The configuration, the parameters as a nested dict of numpy arrays, and the fingerprint of
      the tensors as stored.

    Raises:
      errors.UserError: a file is missing or damaged, the configuration is not implemented, or the
        tensors are not exactly the expected ones, finite and of the right shapes.
    """
    folder = pathlib.Path(folder)
    config = read_config(folder)
    stored = _read_weights(folder)
    _match(config, stored, folder)
    params = assemble(
        config, dtype, lambda name: stored[name].values(), lambda name: stored[name].where
    )
    used = [stored[name] for name in families.tensors(config)]
    return config, params, fingerprint.compute({t.name: (t.dtype, t.shape, t.raw) for t in used})


def read_config(folder: str | pathlib.Path) -> architecture.Config:
    """The configuration alone."""
    path = pathlib.Path(folder) / "config.json"
    if not path.is_file():
        raise errors.UserError(f"{folder}: no config.json{_hint(pathlib.Path(folder))}")
    return families.from_hf(_read_json(path), str(path))


def assemble(
    config: architecture.Config,
    dtype: Any,
    fetch: Callable[[str], np.ndarray],
    where: Callable[[str], str],
) -> decoder.Params:
    """Puts tensors, fetched by their Hugging Face names, into the stacked parameters.

    Args:
      config: says which tensors there are and their shapes, which the caller has checked.
      dtype: of the parameters.
      fetch: gives a tensor by name; called once for each.
      where: the place of a tensor, for messages.
    """
    dtype = _float_dtype(dtype)
    leaves: dict[str, np.ndarray] = {}
    shapes = tree.flatten(decoder.shapes(config))
    for name, (weight, index) in families.tensors(config).items():
        if weight.path not in leaves:
            leaves[weight.path] = np.empty(shapes[weight.path].shape, dtype)
        # `to_file` of a contiguous array is a view (only whole axes move), so this fills the target.
        _fill(weight.to_file(leaves[weight.path][index], config), fetch(name), where(name))
    return tree.unflatten(leaves)


def tokenizer(folder: str | pathlib.Path) -> Any:
    """The folder's tokenizer, without network and without running code from the folder."""
    import transformers

    folder = pathlib.Path(folder)
    if not (folder / "tokenizer_config.json").is_file() and not _tokenizer_json(folder).is_file():
        raise errors.UserError(f"{folder}: no tokenizer.json and no tokenizer_config.json")
    options = {"trust_remote_code": False, "local_files_only": True}
    try:
        found = transformers.AutoTokenizer.from_pretrained(str(folder), **options)
        if _tokenizer_json(folder).is_file() and not _as_written(found, folder):
            found = transformers.PreTrainedTokenizerFast.from_pretrained(str(folder), **options)
    # The tokenizers library raises bare Exception on a file it can't parse.
    except Exception as error:
        cause = str(error).strip().splitlines() or [type(error).__name__]
        raise errors.UserError(f"{folder}: the tokenizer can't be loaded: {cause[0]}") from error
    return found


def _tokenizer_json(folder: pathlib.Path) -> pathlib.Path:
    return folder / "tokenizer.json"


def _as_written(found: Any, folder: pathlib.Path) -> bool:
    """Whether a tokenizer cuts text as tokenizer.json says.

    transformers 5 builds some classes anew from the vocabulary: GPT2Tokenizer, which SmolLM2 names,
    drops the rule that splits digits one by one, and every number gets other ids than in training.
    """
    backend = getattr(found, "backend_tokenizer", None)
    if backend is None:
        return False
    got, written = json.loads(backend.to_str()), _read_json(_tokenizer_json(folder))
    return all(got.get(part) == written.get(part) for part in ("normalizer", "pre_tokenizer"))


def _read_json(path: pathlib.Path) -> dict[str, Any]:
    try:
        parsed = json.loads(path.read_bytes())
    except OSError as error:
        raise errors.UserError(f"{path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise errors.UserError(f"{path}: not JSON: {error}") from error
    if not isinstance(parsed, dict):
        raise errors.UserError(f"{path}: a JSON object is expected, not {type(parsed).__name__}")
    return parsed


def _read_weights(folder: pathlib.Path) -> dict[str, safetensors.Tensor]:
    single, index = folder / _SINGLE, folder / _INDEX
    if single.is_file() and index.is_file():
        raise errors.UserError(f"{folder}: both {_SINGLE} and {_INDEX} are there; remove one")
    if single.is_file():
        return safetensors.read(single)
    if index.is_file():
        return _read_shards(folder, index)
    raise errors.UserError(f"{folder}: no {_SINGLE} and no {_INDEX}{_hint(folder)}")


def _hint(folder: pathlib.Path) -> str:
    """What a folder without a model in safetensors holds instead."""
    if not folder.is_dir():
        return " (there is no such folder)"
    names = sorted(path.name for path in folder.iterdir())
    if "adapter_config.json" in names:
        return " (this is an adapter's folder; give the base model's)"
    for suffix, advice in (
        (".gguf", "give that file's path"),
        (".bin", "pickled files are never read; convert them to safetensors"),
        (".pth", "pickled files are never read; convert them to safetensors"),
        (".safetensors", "not a name that is looked for"),
    ):
        held = [name for name in names if name.endswith(suffix)]
        if held:
            return f" (there is {held[0]}: {advice})"
    return ""


def _read_shards(folder: pathlib.Path, index: pathlib.Path) -> dict[str, safetensors.Tensor]:
    placed = _read_json(index).get("weight_map")
    if not isinstance(placed, dict) or not all(isinstance(file, str) for file in placed.values()):
        raise errors.UserError(f"{index}: weight_map is not an object of names and files")
    found: dict[str, safetensors.Tensor] = {}
    for file in sorted(set(placed.values())):
        # By the letters of the path: a hub's cache links files to elsewhere, rightly.
        if pathlib.PurePosixPath(file).parts != (file,) or "\\" in file or file in (".", ".."):
            raise errors.UserError(
                f"{index}: weight_map names {file!r}, not a file's name in the folder"
            )
        if not (folder / file).is_file():
            raise errors.UserError(f"{index}: names {file}, which is not in the folder")
        for name, tensor in safetensors.read(folder / file).items():
            if name in found:
                raise errors.UserError(f"{tensor.where}: is also in {found[name].file.name}")
            found[name] = tensor
    _check_index(placed, found, index)
    return found


def _check_index(
    placed: Mapping[str, str], found: Mapping[str, safetensors.Tensor], index: pathlib.Path
) -> None:
    for name, file in placed.items():
        if name not in found or found[name].file.name != file:
            raise errors.UserError(f"{index}: {name} should be in {file} and is not")
    unlisted = sorted(set(found) - set(placed))
    if unlisted:
        raise errors.UserError(f"{found[unlisted[0]].where}: is not in {index.name}")


def _match(
    config: architecture.Config, stored: Mapping[str, safetensors.Tensor], folder: pathlib.Path
) -> None:
    """Each expected tensor exactly once, in its shape, and nothing else."""
    expected = families.tensors(config)
    missing = [name for name in expected if name not in stored]
    if missing:
        why = "; is tie_word_embeddings of config.json right?" if missing == [_HEAD] else ""
        raise errors.UserError(
            f"{folder}: {missing[0]} is missing ({len(missing)} of {len(expected)} tensors are)"
            + why
        )
    for name, tensor in stored.items():
        if name in expected:
            shape = expected[name][0].stored_shape(config)
            if tensor.shape != shape:
                raise errors.UserError(
                    f"{tensor.where}: shape {tensor.shape}, config.json says {shape}"
                )
            if tensor.dtype not in safetensors.FLOATS:
                raise errors.UserError(f"{tensor.where}: stored as {tensor.dtype}, not a float")
        elif name == _HEAD:
            embedding = next(n for n, (w, _) in expected.items() if w.path == "embed/embedding")
            _refuse_other_head(tensor, stored[embedding])
        elif not _HARMLESS.fullmatch(name):
            raise errors.UserError(f"{tensor.where}: config.json asks for no such tensor")


def _refuse_other_head(head: safetensors.Tensor, embedding: safetensors.Tensor) -> None:
    """A head saved beside a tied embedding is left out when it says the same."""
    same = head.shape == embedding.shape and head.dtype == embedding.dtype
    if not same or not np.array_equal(head.raw, embedding.raw):
        raise errors.UserError(
            f"{head.where}: differs from {embedding.name}, and config.json says tie_word_embeddings"
        )


def _float_dtype(dtype: Any) -> np.dtype:
    allowed = (np.float32, ml_dtypes.bfloat16, np.float16, np.float64)
    named = {np.dtype(kind).name: np.dtype(kind) for kind in allowed}
    name = dtype if isinstance(dtype, str) else np.dtype(dtype).name
    if name not in named:
        raise errors.UserError(f"dtype {name!r} is not one of {', '.join(named)}")
    return named[name]


def _fill(target: np.ndarray, tensor: np.ndarray, where: str) -> None:
    """target[...] = tensor, by blocks of rows, refusing what is not finite."""
    for start in range(0, len(tensor), _ROWS):
        block = tensor[start : start + _ROWS]
        with np.errstate(over="ignore", invalid="ignore"):
            cast = block.astype(target.dtype, copy=False)
        if not np.isfinite(cast).all():
            if np.isfinite(block).all():
                raise errors.UserError(f"{where}: has values too large for {target.dtype}")
            row = start + int(np.argwhere(~np.isfinite(block))[0][0])
            raise errors.UserError(f"{where}: has a value that is not finite, in row {row}")
        target[start : start + _ROWS] = cast
