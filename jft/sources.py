# SPDX-License-Identifier: Apache-2.0
"""What flags name: a run's result, an adapter and its base, a base model on the host in the numbers it is stored in."""

import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jft import errors, json_text, runs, tree
from jft.lora import peft
from jft.models import (
    architecture,
    decoder,
    families,
    gguf,
    gguf_file,
    hf,
    packed_folder,
    quantizing,
    resolve,
    safetensors,
    shards,
)

# ggml's types that are floats and no blocks.
_GGUF_FLOATS = {0: "float32", 1: "float16", 30: "bfloat16", 28: "float64"}
_STORED = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@dataclasses.dataclass(frozen=True)
class Base:
    """A model on the host.

    Attributes:
      name: what was asked for.
      revision: the commit of a Hub name; None for other places.
      place: the folder or file that it was read from.
      config: of the decoder.
      params: nested dict of numpy arrays.
      tokenizer: of transformers.
      fingerprint: of the tensors as stored.
    """

    name: str
    revision: str | None
    place: pathlib.Path
    config: architecture.Config
    params: decoder.Params
    tokenizer: Any
    fingerprint: str


@dataclasses.dataclass(frozen=True)
class Adapter:
    """An adapter's folder, and the base it says it belongs to.

    Attributes:
      folder: holds adapter_config.json.
      base: a name that `resolve` takes; "" where the folder does not say.
      revision: of the base.
      sidecar: its jft.json; None for one that jft has not trained.
    """

    folder: pathlib.Path
    base: str
    revision: str | None
    sidecar: runs.Sidecar | None

    def revision_of(self, name: str, asked: str | None) -> str | None:
        """Which revision of a base to take: the one asked for, else that of training if this is the base."""
        return asked or (self.revision if name == self.base else None)

    def check_base(self, name: str, fingerprint: str, force: bool) -> None:
        """Raises UserError for a base that is not the one of training, as far as that is known."""
        if self.sidecar and self.sidecar.fingerprint != fingerprint and not force:
            raise errors.UserError(
                f"{self.folder}: trained on {self.sidecar.base} with fingerprint {self.sidecar.fingerprint}, but"
                f" {name} has {fingerprint}; --force uses it all the same"
            )


def result_folder(run: str | pathlib.Path, which: str = "best") -> pathlib.Path:
    """best/ or last/ of a run, or the folder itself when it is one of those; "best" falls back on last/.

    Raises:
      UserError: it is neither.
    """
    run = pathlib.Path(run)
    if not run.is_dir():
        raise errors.UserError(f"--run={run}: no such folder")
    if (run / runs.SIDECAR).exists():
        if model_record(run):
            raise errors.UserError(f"--run={run}: is a model, no run; give --model={run}")
        return run
    wanted = [which] if which == "last" else ["best", "last"]
    for name in wanted:
        if (run / name / runs.SIDECAR).exists():
            return run / name
    raise errors.UserError(
        f"--run={run}: no {' or '.join(f'{n}/' for n in wanted)} there: has its training got to the first validation?"
    )


def model_record(folder: pathlib.Path) -> dict[str, Any]:
    """jft.json of a model that `jft export` or `jft import` wrote; empty for everything else."""
    try:
        record = json_text.read(folder / runs.SIDECAR)
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) and record.get("kind") == "model" else {}


def adapter(folder: str | pathlib.Path) -> Adapter:
    """An adapter by its folder, or by that of its run.

    Raises:
      UserError: there is none.
    """
    place = pathlib.Path(folder)
    if not (place / peft.CONFIG_FILE).exists():
        for name in ("best", "last"):
            if (place / name / peft.CONFIG_FILE).exists():
                place = place / name
                break
        else:
            raise errors.UserError(
                f"{folder}: no adapter there ({peft.CONFIG_FILE} is missing{_instead(place)})"
            )
    if (place / runs.SIDECAR).exists():
        sidecar = runs.read_sidecar(place)
        return Adapter(place, sidecar.base, sidecar.revision or None, sidecar)
    said = runs.read_json(place / peft.CONFIG_FILE)
    said = said if isinstance(said, dict) else {}
    base, revision = (said.get(key) or "" for key in ("base_model_name_or_path", "revision"))
    return Adapter(place, str(base), str(revision) or None, None)


def _instead(place: pathlib.Path) -> str:
    if not place.is_dir():
        return "; there is no such folder"
    return "; it holds a whole model" if (place / "config.json").exists() else ""


def original(name: str, revision: str | None) -> tuple[str, str | None]:
    """Name and revision of what a quantised base was made of; of every other model, its own."""
    if not packed_folder.is_one(pathlib.Path(name)):
        return name, revision
    made_of = packed_folder.origin(pathlib.Path(name))
    return made_of.base, made_of.revision


def base(
    name: str,
    *,
    revision: str | None = None,
    dtype: str | None = None,
    quantize: quantizing.Settings = quantizing.DENSE,
) -> Base:
    """Loads a model to the host.

    Args:
      name: a folder, a .gguf file, an embedded model or a Hub name.
      revision: of a Hub name.
      dtype: of the parameters; None keeps what is stored: each parameter's own float type (the widest of its tensors), and
        float32 for blocks of a quantised GGUF file.
      quantize: which parameters are quantised, and how.

    Raises:
      UserError: it cannot be had, or is damaged or not implemented.
    """
    place = resolve.resolve(name, revision)
    if packed_folder.is_one(place):
        made_of = packed_folder.origin(place).base
        raise errors.UserError(f"{name}: holds a quantised base; give its original: {made_of}")
    room = gguf if place.suffix == ".gguf" else hf
    if dtype:
        config, params, fingerprint = _on_host(room.load, place, dtype, quantize)
    elif room is gguf:
        config, params, fingerprint = _on_host(gguf.load, place, "float32", quantize)
        params = _narrowed(params, place)
    else:
        config, params, fingerprint = _as_stored(place, quantize)
    return Base(
        name, resolve.commit(place), place, config, params, room.tokenizer(place), fingerprint
    )


def _on_host(
    load: Any, place: pathlib.Path, dtype: Any, quantize: quantizing.Settings
) -> tuple[architecture.Config, decoder.Params, str]:
    """A model with its parameters as numpy arrays, views where they lie in this memory already."""
    with jax.enable_x64(True):  # float64 files keep their bits
        config, params, fingerprint = load(place, dtype, None, quantize)
    return config, jax.tree.map(np.asarray, params), fingerprint


def _as_stored(
    folder: pathlib.Path, quantize: quantizing.Settings
) -> tuple[architecture.Config, decoder.Params, str]:
    stored, own = _dtypes(folder), dict[str, Any]()
    for name, (weight, _) in families.tensors(hf.read_config(folder)).items():
        # What is stored as blocks (MXFP4) has another name; bfloat16 holds its values exactly.
        dtype = stored.get(name, "bfloat16")
        own[weight.path] = jnp.promote_types(dtype, own.get(weight.path, dtype))
    config, params, fingerprint = _on_host(hf.load, folder, shards.widest(own.values()), quantize)
    cast = lambda path, x: x.astype(own[path], copy=False)  # noqa: E731
    return config, _each_dense(params, cast), fingerprint


def _each_dense(params: decoder.Params, change: Callable[[str, np.ndarray], Any]) -> decoder.Params:
    """The parameters with those changed that are not quantised."""
    leaves = tree.flatten(params)
    return tree.unflatten(
        {path: x if tree.is_quantized(x) else change(path, x) for path, x in leaves.items()}
    )


def _dtypes(folder: pathlib.Path) -> dict[str, str]:
    """The float type of each tensor, by its name; the checks are those of `hf.load`, which comes next."""
    files, index = {"model.safetensors"}, folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            files = set(json_text.read(index)["weight_map"].values())
        except (ValueError, KeyError, TypeError, AttributeError):
            return {}
    inside = [folder / file for file in files if file in {path.name for path in folder.iterdir()}]
    tensors = [tensor for file in inside for tensor in safetensors.read(file).values()]
    return {t.name: _STORED[t.dtype] for t in tensors if t.dtype in _STORED}


def _narrowed(params: decoder.Params, path: pathlib.Path) -> decoder.Params:
    """float32 parameters of a GGUF file of floats, each in the file's narrow type where that holds it exactly.

    Converters widen norms to float32 that were bfloat16 before.
    """
    kinds = {tensor.kind for tensor in gguf_file.read(path).tensors.values()}
    narrow = [_GGUF_FLOATS[kind] for kind in kinds & {1, 30}]
    if not kinds <= _GGUF_FLOATS.keys() or len(narrow) != 1:
        return params
    return _each_dense(params, lambda _, x: _exact(x, narrow[0]))


def _exact(leaf: np.ndarray, dtype: str) -> np.ndarray:
    with np.errstate(over="ignore"):
        cast = leaf.astype(jnp.dtype(dtype))
    return cast if np.array_equal(cast.astype(leaf.dtype), leaf) else leaf
