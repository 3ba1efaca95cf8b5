# SPDX-License-Identifier: Apache-2.0
"""Writes a model as a Hugging Face folder: config.json, safetensors in shards, tokenizer, generation_config.json.

Tensors are brought to the host, turned and written one by one, so that writing needs memory for one of them. The folder
is made beside its place and moved there when it is whole: an export that was interrupted leaves no folder that looks
like a model.
"""

import dataclasses
import json
import os
import pathlib
import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from jft import errors, json_text, tree
from jft.models import architecture, families, fingerprint, packed_folder, safetensors, shards

RECORD = "jft.json"  # says what a folder of ours is
MAX_SHARD_SIZE = 5_000_000_000
_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_CONFIG, _INDEX = "config.json", "model.safetensors.index.json"
# Parts of a model: what another model's folder may hold of these would be mixed with ours.
_PARTS = (
    *(_CONFIG, "generation_config.json", _INDEX, "model*.safetensors", RECORD),
    *(packed_folder.RECORD, "quantized*.safetensors"),
    *(
        "tokenizer.*",
        "tokenizer_config.json",
        "*chat_template*",
        "special_tokens_map.json",
        "added_tokens.json",
    ),
    *("vocab.json", "vocab.txt", "merges.txt"),
)


@dataclasses.dataclass(frozen=True)
class Written:
    """What `save` wrote.

    Attributes:
      folder: where.
      files: the names of its files.
      weight_bytes: of all tensors.
      dtype: of config.json, in which every tensor fits.
      fingerprint: of the tensors as written, or of those that a quantised base was made of; what loading gives.
    """

    folder: pathlib.Path
    files: tuple[str, ...]
    weight_bytes: int
    dtype: str
    fingerprint: str


def save(
    folder: str | pathlib.Path,
    config: architecture.Config,
    params: Any,
    tokenizer: Any,
    *,
    dtype: str | None = None,
    stop: Collection[int] = (),
    max_shard_size: int = MAX_SHARD_SIZE,
    record: Mapping[str, Any] | None = None,
    origin: packed_folder.Origin | None = None,
    force: bool = False,
) -> Written:
    """Writes the folder.

    Args:
      folder: is made. See `check_target` for one that is there.
      config: of the decoder.
      params: nested dict, layers stacked; numpy or jax arrays, sharded or not.
      tokenizer: of transformers, whose template goes along; None writes none.
      dtype: of the tensors; None keeps each parameter's own.
      stop: ids that end generation, beside the tokenizer's end token.
      max_shard_size: in bytes; a larger tensor has a file of its own.
      origin: writes a quantised base, which was made of this: quantised parameters are written as they are.
      record: what jft.json says beside the fingerprint.
      force: see `check_target`.

    Raises:
      errors.UserError: the folder can't be used or written, or a value is not finite in the dtype.
    """
    check_target(folder, force=force)
    place = pathlib.Path(folder).expanduser().resolve()
    part = place.with_name(f".{place.name}.part")
    try:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        try:
            leaves = tree.flatten(params)
            if origin is None:
                tensors, own = _write_weights(part, config, leaves, dtype, max_shard_size)
            else:
                tensors = packed_folder.write(part, leaves, origin, max_shard_size)
                own = origin.fingerprint
            written = _write_rest(part, config, tokenizer, stop, tensors, own)
            said = {"kind": "model"} | dict(record or {})
            _write_json(part / RECORD, said | {"fingerprint": written.fingerprint})
            files = tuple(sorted(path.name for path in part.iterdir()))
            _move(part, place)
        finally:
            shutil.rmtree(part, ignore_errors=True)
    except OSError as error:
        raise errors.UserError(f"{folder}: can't be written: {error.strerror or error}") from error
    return dataclasses.replace(written, folder=pathlib.Path(folder), files=files)


def check_target(folder: str | pathlib.Path, *, force: bool = False) -> None:
    """Raises UserError for a folder that an export must not write into: call it before work that takes long.

    A folder that is new, empty or an earlier export is fine. With `force`, any other will do: the files of a model in
    it are replaced and the rest stays.
    """
    place = pathlib.Path(folder).expanduser().resolve()
    if not place.name:
        raise errors.UserError(f"{folder}: is no place for a model; name a new folder")
    above = next(path for path in (place, *place.parents) if path.exists())
    if not above.is_dir():
        what = "is a file; a model is a folder" if above == place else f"{above} is a file"
        raise errors.UserError(f"{folder}: {what}")
    if not os.access(above, os.W_OK | os.X_OK):
        raise errors.UserError(f"{folder}: {above} can't be written to")
    if above != place or not any(place.iterdir()):
        return
    if (place / "adapter_config.json").exists():
        raise errors.UserError(f"{folder}: holds an adapter; write the model to another folder")
    if not force and kind(place) not in ("model", "full"):
        raise errors.UserError(
            f"{folder}: is not empty, and no model that jft wrote; name another folder, or --force replaces"
            " the model's files in it"
        )


def kind(folder: pathlib.Path) -> Any:
    """What jft.json calls a folder: "model" (written here), "full" or "lora" (of a run); None without one."""
    try:
        return json_text.read(folder / RECORD)["kind"]
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _write_weights(
    part: pathlib.Path,
    config: architecture.Config,
    leaves: Mapping[str, Any],
    dtype: str | None,
    max_shard_size: int,
) -> tuple[list[shards.Tensor], str]:
    """Writes the files of weights and their index; what they hold, and its fingerprint."""
    tensors = _tensors(config, leaves, dtype)
    files = shards.split(tensors, max_shard_size)
    for file, own in files.items():
        shards.write(part / file, own, _arrays(own, leaves, config))
    if len(files) > 1:
        total = sum(tensor.nbytes for tensor in tensors)
        placed = {tensor.name: file for file, own in files.items() for tensor in own}
        _write_json(part / _INDEX, {"metadata": {"total_size": total}, "weight_map": placed})
    return tensors, _fingerprint(part / file for file in files)


def _write_rest(
    part: pathlib.Path,
    config: architecture.Config,
    tokenizer: Any,
    stop: Collection[int],
    tensors: Sequence[shards.Tensor],
    own: str,
) -> Written:
    """Writes config.json and what belongs to the tokenizer, beside weights with a fingerprint of their own."""
    floats = [tensor.dtype for tensor in tensors if tensor.dtype.name in shards.DTYPES]
    widest = shards.widest(floats)
    # torch_dtype is what releases of transformers before 4.56 look for.
    described = families.to_hf(config) | {"dtype": widest, "torch_dtype": widest}
    # Null, too, where there is none: an absent id becomes the family's, which may lie beyond a small vocabulary.
    ids = {key: getattr(tokenizer, key, None) for key in _IDS}
    _write_json(part / _CONFIG, described | ids)
    if tokenizer is not None:
        _save_tokenizer(part, tokenizer)
        _write_json(part / "generation_config.json", _generation(ids, stop))
    return Written(part, (), sum(tensor.nbytes for tensor in tensors), widest, own)


def _tensors(
    config: architecture.Config, leaves: Mapping[str, Any], dtype: str | None
) -> list[shards.Tensor]:
    """What the files hold, the tensors of one parameter one after the other."""
    if dtype is not None and dtype not in shards.DTYPES:
        raise errors.UserError(f"dtype={dtype!r}: one of {', '.join(shards.DTYPES)}")
    found = []
    for name, (weight, _) in families.tensors(config).items():
        own = jnp.dtype(dtype or leaves[weight.path].dtype)
        if own.name not in shards.DTYPES:
            raise errors.UserError(
                f"{weight.path} is {own.name}; written are {', '.join(shards.DTYPES)}"
            )
        found.append(shards.Tensor(name, weight.stored_shape(config), own))
    return found


def _arrays(
    tensors: Sequence[shards.Tensor], leaves: Mapping[str, Any], config: architecture.Config
) -> Iterator[np.ndarray]:
    """The tensors as files have them, one at a time; of a quantised leaf the whole is unpacked, once."""
    table, path, leaf = families.tensors(config), "", None
    for tensor in tensors:
        weight, index = table[tensor.name]
        if weight.path != path:
            path = weight.path
            leaf = tree.dense(leaves[path])
        yield _cast(weight.to_file(shards.host(leaf, index), config), tensor)


def _cast(array: np.ndarray, tensor: shards.Tensor) -> np.ndarray:
    with np.errstate(over="ignore", invalid="ignore"):
        cast = array.astype(tensor.dtype, copy=False)
    if not np.isfinite(cast).all():
        finite = np.isfinite(array).all()
        why = f"values too large for {tensor.dtype}" if finite else "values that are not finite"
        raise errors.UserError(f"{tensor.name}: has {why}; nothing was written")
    return cast


def _save_tokenizer(part: pathlib.Path, tokenizer: Any) -> None:
    tokenizer.save_pretrained(part)
    path = part / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    # transformers 5's name of the class, which releases before it refuse; it takes theirs.
    if settings.get("tokenizer_class") == "TokenizersBackend":
        _write_json(path, settings | {"tokenizer_class": "PreTrainedTokenizerFast"})


def _generation(ids: Mapping[str, int | None], stop: Collection[int]) -> dict[str, Any]:
    own = ids["eos_token_id"]
    ends = ([] if own is None else [own]) + sorted(set(stop) - {own})
    found = {**ids, "eos_token_id": ends[0] if len(ends) == 1 else ends or None}
    return {key: value for key, value in found.items() if value is not None}


def _fingerprint(files: Iterator[pathlib.Path]) -> str:
    found = {t.name: t for file in files for t in safetensors.read(file).values()}
    return fingerprint.compute({name: (t.dtype, t.shape, t.raw) for name, t in found.items()})


def _write_json(path: pathlib.Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _move(part: pathlib.Path, place: pathlib.Path) -> None:
    """Puts the finished folder in its place; into one that is there, config.json is out first and in last."""
    if not place.exists() or not any(place.iterdir()):
        if place.exists():
            place.rmdir()
        os.replace(part, place)
        return
    (place / _CONFIG).unlink(missing_ok=True)
    for old in [path for pattern in _PARTS for path in place.glob(pattern)]:
        shutil.rmtree(old) if old.is_dir() else old.unlink(missing_ok=True)
    for path in sorted(part.iterdir(), key=lambda path: path.name == _CONFIG):
        os.replace(path, place / path.name)
