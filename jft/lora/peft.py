# SPDX-License-Identifier: Apache-2.0
"""Adapters on disk in PEFT's format: adapter_config.json and adapter_model.safetensors.

Loading is a bijection: the tensors in the file are exactly those that the configuration asks for on this base, each
with its shape, all finite. What the format can say and this reader does not implement is refused by name, because
PEFT itself ignores much of it in silence. Saving is reproducible: the same adapters give the same bytes, and what was
saved, read and saved again too.

A table `names` connects torch modules with our leaves: {"model.layers.3.self_attn.q_proj": ("layers/attention/query/
kernel", 3)}, layer None for a leaf that is not stacked. Where experts are stacked under layers, the number counts
through both.
"""

import dataclasses
import json
import math
import os
import pathlib
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jft import errors, tree
from jft.lora import dora, peft_config, peft_matching, spec
from jft.lora import layouts as layout_rules

Names = Mapping[str, tuple[str, int | None]]

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_A, _B, _MAGNITUDE = ".lora_A.weight", ".lora_B.weight", ".lora_magnitude_vector"
_EMBEDDING = (
    "embed/embedding"  # PEFT's keys for it, lora_embedding_A, come with the whole embedding
)
_HEADER = 100_000_000  # bytes, the format's own limit
_DTYPES = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": jnp.bfloat16}


@dataclasses.dataclass(frozen=True)
class _File:
    """The weights as they were read, with the configuration beside them; `where` is for messages."""

    where: pathlib.Path
    tensors: Mapping[str, np.ndarray]
    config: peft_matching.Config


@dataclasses.dataclass(frozen=True)
class _Part:
    """One module's share of a leaf: A [in, r], B [r, out] and, with DoRA, magnitude [out]; float32."""

    a: np.ndarray
    b: np.ndarray
    scale: float
    magnitude: np.ndarray | None


def save(
    folder: str | pathlib.Path,
    adapters: Mapping[str, spec.Factors],
    names: Names,
    *,
    base_name: str,
    revision: str | None = None,
) -> None:
    """Writes the adapters as PEFT would, in float32.

    Args:
      folder: is made; files of the same names are replaced.
      adapters: one rank and scale each; they may differ between leaves.
      names: the table of modules.
      base_name: goes to base_model_name_or_path.
      revision: of the base.

    Raises:
      UserError: see `check_writable`.
    """
    from safetensors import numpy as safetensors_numpy

    check_writable(adapters, names)
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors, modules = {}, {}
    for module, (path, layer) in names.items():
        if path in adapters:
            modules[module] = adapters[path]
            tensors |= _module_tensors(module, adapters[path], layer)
    config = peft_config.describe(modules, names) | {
        "base_model_name_or_path": base_name,
        "revision": revision,
    }
    safetensors_numpy.save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def check_writable(adapters: Mapping[str, spec.Factors], names: Names) -> None:
    """Raises UserError for what PEFT's format cannot hold; call it before training, not after."""
    if not adapters:
        raise errors.UserError("there is no adapter to write")
    layers: dict[str, list[int | None]] = {}
    for path, layer in names.values():
        layers.setdefault(path, []).append(layer)
    for path, factors in adapters.items():
        if path not in layers or path == _EMBEDDING:
            raise errors.UserError(
                f"lora.targets reaches {path}, which the adapter format cannot hold as LoRA here;"
                " narrow lora.targets to kernels"
            )
        if not math.isfinite(factors.scale):
            raise errors.UserError(f"adapter {path}: scale {factors.scale} is not finite")
        _check_layers(path, factors.layout, factors.a.shape, layers[path])
    _check_alike("dropout", {path: f.dropout for path, f in adapters.items()})
    _check_alike("use_dora", {path: f.magnitude is not None for path, f in adapters.items()})


def _check_layers(
    path: str, layout: str, shape: Sequence[int], layers: Sequence[int | None]
) -> None:
    """Raises UserError unless the modules cover the leaf: each layer once, or the whole as one."""
    stacked = layout.count("b")
    want = set(range(math.prod(shape[:stacked]))) if stacked else {None}
    leading = layout.startswith("b" * stacked)
    if not leading or len(layers) != len(want) or set(layers) != want:
        raise errors.UserError(
            f"{path}: layout {layout!r} and shape {tuple(shape)} are not the {len(layers)} modules that the table of"
            " names has for it"
        )


def _check_alike(key: str, values: Mapping[str, Any]) -> None:
    first, *others = values
    for other in others:
        if values[other] != values[first]:
            raise errors.UserError(
                f"lora.{key} is {values[first]} for {first} but {values[other]} for {other}: PEFT's format has"
                " one for all"
            )


def _module_tensors(module: str, factors: spec.Factors, layer: int | None) -> dict[str, np.ndarray]:
    """One module's tensors as torch has them, [out, in]."""

    stacked = factors.layout.count("b")

    def own(x: Any) -> np.ndarray:
        x = np.asarray(x, np.float32)
        return x if layer is None else x.reshape(-1, *x.shape[stacked:])[layer]

    a, b = own(factors.a), own(factors.b)
    tensors: dict[str, np.ndarray] = {}
    tensors[_A], tensors[_B] = a.reshape(-1, a.shape[-1]).T, b.reshape(b.shape[0], -1).T
    if factors.magnitude is not None:
        tensors[_MAGNITUDE] = own(factors.magnitude).reshape(-1)
    return {f"{_PREFIX}{module}{k}": np.ascontiguousarray(x) for k, x in tensors.items()}


def load(
    folder: str | pathlib.Path, names: Names, params: Any, layouts: tree.Rules
) -> spec.Adapters:
    """Reads an adapter for this base.

    Layers with other ranks or scales than the rest, or without an adapter, are padded with zeros to one stacked
    array; a leaf keeps the largest scale of its layers and the others' ratio goes into B. A layer without DoRA gets the
    norms of its weights as magnitude. The function is the same.

    Args:
      folder: holds the two files.
      names: the base's table of modules.
      params: the base's parameters; their shapes will do unless DoRA adapts some layers of a leaf and not others.
      layouts: of the leaves, as in `Spec.layouts`.

    Returns:
      {path: Factors}, float32 whatever the file's dtype: the file's values exactly, but for float64.

    Raises:
      UserError: anything in the folder that is not understood, not expected, missing, misshapen or not finite.
    """
    folder, leaves = pathlib.Path(folder), tree.flatten(params)
    config = peft_config.read(_locate(folder, CONFIG_FILE))
    targets = config.targets(names)
    _check_targets(targets, names, leaves, config.where)
    where = _locate(folder, WEIGHTS_FILE)
    sizes = {
        path: _sizes(layouts, path, leaves[path].shape)
        for path, _ in names.values()
        if path in leaves
    }
    _check_size(where, config, {module: sizes[names[module][0]] for module in targets})
    file = _File(where, _read_tensors(where), config)
    _compare(file, targets, names)
    paths = dict.fromkeys(names[module][0] for module in targets)
    return {path: _leaf(file, path, leaves[path], targets, names, layouts) for path in paths}


def _locate(folder: pathlib.Path, name: str) -> pathlib.Path:
    """A file of the folder. A link must stay inside, or lead to the blobs of a Hub cache that the folder is in."""
    file = folder / name
    if not os.path.isfile(file):
        why = ""
        if folder.is_file():
            why = ": it is a file, and an adapter is a folder"
        elif (folder / "adapter_model.bin").exists():
            why = "; adapter_model.bin is pickle and is not read: let PEFT save it again"
        raise errors.UserError(f"{folder} is no adapter: it has no {name}{why}")
    home, real = folder.resolve(), file.resolve()
    blobs = [x.parents[1] / "blobs" for x in (home, *home.parents) if x.parent.name == "snapshots"]
    if not any(real.is_relative_to(root) for root in (home, *blobs)):
        raise errors.UserError(
            f"{file} is a link to {real}, outside its folder; put the file there"
        )
    return file


def _check_targets(
    targets: Sequence[str], names: Names, leaves: Collection[str], where: pathlib.Path
) -> None:
    for module in targets:
        path, _ = names[module]
        if path == _EMBEDDING:
            raise errors.UserError(
                f"{where}: target_modules names {module}: an adapter of the embedding is not read"
            )
        if path not in leaves:
            raise errors.UserError(
                f"{where}: target_modules names {module}, but this base has no {path}: its embeddings are tied, and"
                " an adapter of the head alone would untie them"
            )


def _check_size(
    where: pathlib.Path,
    config: peft_matching.Config,
    targets: Mapping[str, tuple[int, int]],
) -> None:
    """Before the file is read: it can't have more bytes than the targets' tensors, whatever their type."""
    most = _HEADER
    for module, (inputs, outputs) in targets.items():
        rank, _ = config.rank_and_scale(module)
        most += 8 * (rank * (inputs + outputs) + outputs)
    size = where.stat().st_size
    if size > most:
        raise errors.UserError(
            f"{where}: has {size:,} bytes, and what {CONFIG_FILE} asks for has {most:,} at most"
        )


def _sizes(layouts: tree.Rules, path: str, shape: Sequence[int]) -> tuple[int, int]:
    """Inputs and outputs of each of a leaf's modules."""
    layout = layout_rules.find(layouts, path, len(shape))
    _, inputs, outputs = layout_rules.split(layout, tuple(shape))
    return math.prod(inputs), math.prod(outputs)


def _read_tensors(path: pathlib.Path) -> dict[str, np.ndarray]:
    """All tensors, float32."""
    import safetensors

    try:
        stored = safetensors.deserialize(path.read_bytes())
    except OSError as error:
        raise errors.UserError(f"{path}: {error.strerror}") from error
    except safetensors.SafetensorError as error:
        raise errors.UserError(
            f"{path} is not a readable safetensors file: {peft_matching.plain(str(error))}"
        ) from error
    tensors = {}
    for name, entry in stored:
        told, dtype = f"{path}: {peft_matching.plain(name)}", entry["dtype"]
        if dtype not in _DTYPES:
            raise errors.UserError(
                f"{told} is stored as {dtype}; only {', '.join(_DTYPES)} are read"
            )
        values = np.frombuffer(entry["data"], _DTYPES[dtype]).reshape(entry["shape"])
        with np.errstate(over="ignore"):  # beyond float32 is infinite, and told below
            tensors[name] = values.astype(np.float32)
        if not np.isfinite(tensors[name]).all():
            raise errors.UserError(f"{told} holds values that are not finite")
    return tensors


def _compare(file: _File, targets: Sequence[str], names: Names) -> None:
    """Raises UserError unless the file has the tensors of the targets and no others."""
    config = file.config
    kinds = (_A, _B, _MAGNITUDE) if config.use_dora else (_A, _B)
    expected, found = {f"{_PREFIX}{m}{kind}" for m in targets for kind in kinds}, set(file.tensors)
    told = []
    if expected - found:
        told.append(f"missing {_some(expected - found)}, which {CONFIG_FILE} asks for")
    if found - expected:
        told.append(f"holds {_some(found - expected)}, which {CONFIG_FILE} does not ask for")
    if told and (unmatched := config.unmatched(names)):
        told.append(f"target_modules has {_some(unmatched)}, which this base does not have")
    if any(key.endswith(_MAGNITUDE) for key in expected ^ found):
        told.append(f"use_dora is {str(config.use_dora).lower()}")
    if told:
        raise errors.UserError(f"{file.where}: {'; '.join(told)}")


def _some(keys: Collection[str]) -> str:
    names = ", ".join(map(peft_matching.plain, sorted(keys)[:3]))
    return f"{names}{' ...' if len(keys) > 3 else ''} ({len(keys)})"


def _leaf(
    file: _File,
    path: str,
    leaf: Any,
    targets: Sequence[str],
    names: Names,
    layouts: tree.Rules,
) -> spec.Factors:
    """One leaf's factors, from its modules' tensors."""
    layout = layout_rules.find(layouts, path, len(leaf.shape))
    batch, inputs, outputs = layout_rules.split(layout, leaf.shape)
    modules = {module: layer for module, (p, layer) in names.items() if p == path}
    _check_layers(path, layout, leaf.shape, list(modules.values()))
    sizes = math.prod(batch), math.prod(inputs), math.prod(outputs)
    parts = {modules[m] or 0: _part(file, m, *sizes[1:]) for m in targets if m in modules}
    a, b, scale = _stack(parts, sizes)
    factors = spec.Factors(
        jnp.asarray(a.reshape(*batch, *inputs, a.shape[-1])),
        jnp.asarray(b.reshape(*batch, b.shape[1], *outputs)),
        scale,
        layout,
        dropout=file.config.dropout,
    )
    return dataclasses.replace(factors, magnitude=_magnitude(path, parts, leaf, factors))


def _part(file: _File, module: str, inputs: int, outputs: int) -> _Part:
    """One module's tensors, which must have the shapes of its rank and of the base."""
    rank, scale = file.config.rank_and_scale(module)
    own = {}
    for kind, shape in ((_A, (rank, inputs)), (_B, (outputs, rank)), (_MAGNITUDE, (outputs,))):
        key = f"{_PREFIX}{module}{kind}"
        own[kind] = file.tensors.get(key)
        if own[kind] is not None and own[kind].shape != shape:
            raise errors.UserError(
                f"{file.where}: {key} has shape {own[kind].shape}, but r={rank} in {CONFIG_FILE} and this base ask"
                f" for {shape}"
            )
    # A magnitude starts as a norm, but training may take it anywhere, and that of an output of zeros is 0.
    return _Part(own[_A].T, own[_B].T, scale, own[_MAGNITUDE])


def _stack(
    parts: Mapping[int, _Part], sizes: tuple[int, int, int]
) -> tuple[np.ndarray, np.ndarray, float]:
    """A [layers, in, r], B [layers, r, out] and the scale of layers that may differ in rank and scale."""
    layers, inputs, outputs = sizes
    rank = max(part.a.shape[-1] for part in parts.values())
    scale = max((part.scale for part in parts.values()), key=abs)
    a = np.zeros((layers, inputs, rank), np.float32)
    b = np.zeros((layers, rank, outputs), np.float32)
    for layer, part in parts.items():
        a[layer, :, : part.a.shape[1]] = part.a
        b[layer, : part.b.shape[0]] = (
            part.b if part.scale == scale else part.b * (part.scale / scale)
        )
    return a, b, scale


def _magnitude(
    path: str, parts: Mapping[int, _Part], leaf: Any, factors: spec.Factors
) -> jax.Array | None:
    """The layers' magnitudes, [*batch, *outputs]; where a layer has none, its norms, which change nothing."""
    given = {i: x.magnitude for i, x in parts.items() if x.magnitude is not None}
    if not given:
        return None
    batch, _, outputs = layout_rules.split(factors.layout, leaf.shape)
    count = math.prod(batch)
    shapes_only = any(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(leaf))
    if len(given) < count and shapes_only:
        absent = min(set(range(count)) - given.keys())
        raise errors.UserError(
            f"{path}: layer {absent} has no adapter beside others with DoRA: its magnitude is the norm of the"
            " base's weights, so reading this adapter needs their values, not only shapes"
        )
    if len(given) < count:
        args = factors.a, factors.b, factors.scale, factors.layout
        values = jax.tree.map(jnp.asarray, leaf)  # which may be quantised: several arrays
        all_layers = np.array(dora.norms(values, *args)).reshape(count, -1)
    else:
        all_layers = np.zeros((count, math.prod(outputs)), np.float32)
    for layer, magnitude in given.items():
        all_layers[layer] = magnitude
    return jnp.asarray(all_layers.reshape(*batch, *outputs))
