# SPDX-License-Identifier: Apache-2.0
"""Adapters on disk in PEFT's format: adapter_config.json and adapter_model.safetensors.

Loading is a bijection: the tensors in the file are exactly those that the configuration asks for on this base, each
with its shape, all finite. What the format can say and this reader does not implement is refused by name, because
PEFT itself ignores much of it in silence.

A table `names` connects torch modules with our leaves: {"model.layers.3.self_attn.q_proj": ("layers/attention/query/
kernel", 3)}, layer None for a leaf that is not stacked.
"""

import collections
import json
import math
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from jft import errors, tree
from jft.lora import layouts as layout_rules
from jft.lora import spec

Names = Mapping[str, tuple[str, int | None]]

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
# What we implement of adapter_config.json, beyond ranks, scales and targets: these keys, at these values only.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "bias": ("none", None),
    "lora_bias": (False, None),
    "use_dora": (False, None),
    "use_qalora": (False, None),
    "use_bdlora": (False, None, {}),
    "fan_in_fan_out": (False, None),
    "modules_to_save": ([], None),
    "target_parameters": ([], None),
    "trainable_token_indices": ([], {}, None),
    "layer_replication": ([], None),
    "alora_invocation_tokens": ([], None),
    "loftq_config": ({}, None),
    "init_lora_weights": (True, False, "gaussian", "orthogonal", "eva", None),
}


def save(
    folder: str | pathlib.Path,
    adapters: Mapping[str, spec.Factors],
    names: Names,
    *,
    base_name: str,
    revision: str | None = None,
) -> None:
    """Writes the adapters as PEFT would.

    Args:
      folder: is made; files of the same names are replaced.
      adapters: one rank and scale each; they may differ between leaves.
      names: the table of modules.
      base_name: goes to base_model_name_or_path.
      revision: of the base.

    Raises:
      UserError: a leaf has no module of its own in PEFT's world.
    """
    from safetensors import numpy as safetensors_numpy

    check_writable(adapters, names)
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for module, (path, layer) in names.items():
        if path in adapters:
            a, b = _matrices(adapters[path], layer)
            tensors[f"{_PREFIX}{module}.lora_A.weight"] = np.ascontiguousarray(a.T)
            tensors[f"{_PREFIX}{module}.lora_B.weight"] = np.ascontiguousarray(b.T)
    config = _config(adapters, names) | {
        "base_model_name_or_path": base_name,
        "revision": revision,
    }
    safetensors_numpy.save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def check_writable(adapters: Mapping[str, Any], names: Names) -> None:
    """Raises UserError for a leaf that PEFT's format has no LoRA keys for here; call it before training, not after."""
    owned = {path for path, _ in names.values()}
    for path in adapters:
        if path not in owned or path == "embed/embedding":
            raise errors.UserError(
                f"lora.targets reaches {path}, which the adapter format cannot hold as LoRA here;"
                " narrow lora.targets to kernels"
            )


def _matrices(factors: spec.Factors, layer: int | None) -> tuple[np.ndarray, np.ndarray]:
    """One module's A [in, r] and B [r, out], float32."""
    a, b = (np.asarray(x, np.float32) for x in (factors.a, factors.b))
    if layer is not None:
        a, b = a[layer], b[layer]
    return a.reshape(-1, a.shape[-1]), b.reshape(b.shape[0], -1)


def _config(adapters: Mapping[str, spec.Factors], names: Names) -> dict[str, Any]:
    """adapter_config.json; patterns only as exact module names, which no sorting can make ambiguous."""
    modules = {m: adapters[path] for m, (path, _) in names.items() if path in adapters}
    common = collections.Counter((f.rank, f.scale) for f in modules.values()).most_common(1)
    (rank, scale), _ = common[0]
    odd = {m: f for m, f in modules.items() if (f.rank, f.scale) != (rank, scale)}
    short = sorted({m.rsplit(".", 1)[-1] for m in modules})
    covered = {m for m in names if m.rsplit(".", 1)[-1] in short}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": _plain(scale * rank),
        "target_modules": short if covered == set(modules) else sorted(modules),
        "rank_pattern": {m: f.rank for m, f in odd.items()},
        "alpha_pattern": {m: _plain(f.scale * f.rank) for m, f in odd.items()},
        "use_rslora": False,  # alpha says the scale exactly, whichever rule it came from
        "use_dora": False,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "exclude_modules": None,
        "layers_to_transform": None,
        "layers_pattern": None,
    }


def _plain(x: float) -> float | int:
    return int(x) if float(x).is_integer() else x


def load(
    folder: str | pathlib.Path, names: Names, params: Any, layouts: tree.Rules
) -> spec.Adapters:
    """Reads an adapter for this base.

    Layers with other ranks or scales than the rest, or without an adapter, are padded with zeros to one stacked
    array; a leaf keeps the largest scale of its layers and the others' ratio goes into B. The update is the same.

    Args:
      folder: holds the two files.
      names: the base's table of modules.
      params: the base's parameters or their shapes.
      layouts: of the leaves, as in `Spec.layouts`.

    Raises:
      UserError: anything in the folder that is not understood, not expected, missing, misshapen or not finite.
    """
    folder = pathlib.Path(folder)
    config = _read_config(folder)
    where = folder / CONFIG_FILE
    _check_patterns(config, where)
    targets = [m for m in names if _is_target(config, m, where)]
    if not targets:
        raise errors.UserError(
            f"{where}: target_modules={config.get('target_modules')!r} names no module of this base"
        )
    tensors = _read_tensors(folder / WEIGHTS_FILE)
    expected = {f"{_PREFIX}{m}.lora_{x}.weight" for m in targets for x in "AB"}
    _compare(expected, set(tensors), folder / WEIGHTS_FILE)
    parts: dict[str, dict[int | None, tuple[np.ndarray, np.ndarray, float]]] = {}
    for module in targets:
        path, layer = names[module]
        a, b = (tensors[f"{_PREFIX}{module}.lora_{x}.weight"].T for x in "AB")
        rank, scale = _rank_and_scale(config, module, where)
        if a.shape[-1] != rank or b.shape[0] != rank:
            raise errors.UserError(
                f"{folder / WEIGHTS_FILE}: {module} has A {a.T.shape} and B {b.T.shape}, but {CONFIG_FILE} says r={rank}"
            )
        parts.setdefault(path, {})[layer] = (a, b, scale)
    leaves = tree.flatten(params)
    if absent := sorted(parts.keys() - leaves.keys()):
        raise errors.UserError(
            f"{where}: adapts {absent[0]}, which this base does not have: its embeddings are tied, and an"
            " adapter of the head alone would untie them"
        )
    return {
        path: _assemble(path, layers, leaves[path].shape, layouts, folder / WEIGHTS_FILE)
        for path, layers in parts.items()
    }


def _assemble(
    path: str,
    layers: Mapping[int | None, tuple[np.ndarray, np.ndarray, float]],
    shape: tuple[int, ...],
    layouts: tree.Rules,
    where: pathlib.Path,
) -> spec.Factors:
    """One leaf's factors from its layers' matrices."""
    layout = layout_rules.find(layouts, path, len(shape))
    rank = max(a.shape[-1] for a, _, _ in layers.values())
    scale = max(s for _, _, s in layers.values())
    inputs = [n for n, kind in zip(shape, layout, strict=True) if kind == "i"]
    outputs = [n for n, kind in zip(shape, layout, strict=True) if kind == "o"]
    stack = [n for n, kind in zip(shape, layout, strict=True) if kind == "b"]
    a_all = np.zeros((math.prod(stack), math.prod(inputs), rank), np.float32)
    b_all = np.zeros((math.prod(stack), rank, math.prod(outputs)), np.float32)
    for layer, (a, b, s) in layers.items():
        if a.shape[0] != a_all.shape[1] or b.shape[1] != b_all.shape[2]:
            raise errors.UserError(
                f"{where}: {path} layer {layer} has A {a.T.shape} and B {b.T.shape}, which do not fit"
                f" this base ({a_all.shape[1]} inputs, {b_all.shape[2]} outputs)"
            )
        a_all[layer or 0, :, : a.shape[-1]] = a
        b_all[layer or 0, : b.shape[0]] = b if s == scale else b * (s / scale)
    return spec.Factors(
        jnp.asarray(a_all.reshape(*stack, *inputs, rank)),
        jnp.asarray(b_all.reshape(*stack, rank, *outputs)),
        scale,
        layout,
    )


def _read_config(folder: pathlib.Path) -> dict[str, Any]:
    where = folder / CONFIG_FILE
    try:
        config = json.loads(where.read_bytes())
    except FileNotFoundError as error:
        raise errors.UserError(f"{folder} is no adapter: it has no {CONFIG_FILE}") from error
    except ValueError as error:
        raise errors.UserError(f"{where} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise errors.UserError(f"{where} is no JSON object")
    if config.get("peft_type") != "LORA":
        raise errors.UserError(f"{where}: peft_type={config.get('peft_type')!r}; only LORA is read")
    for key, allowed in _NEUTRAL.items():
        if config.get(key) not in allowed:
            raise errors.UserError(f"{where}: {key}={config[key]!r} is not implemented")
    for key in ("r", "lora_alpha"):
        if not isinstance(config.get(key), int | float):
            raise errors.UserError(f"{where}: {key} is missing; PEFT would silently take 8")
    return config


def _check_patterns(config: Mapping[str, Any], where: pathlib.Path) -> None:
    """Raises UserError for a regular expression that is none."""
    patterns = [(key, config.get(key)) for key in ("target_modules", "exclude_modules")]
    patterns += [
        (key, k) for key in ("rank_pattern", "alpha_pattern") for k in config.get(key) or {}
    ]
    for key, pattern in patterns:
        try:
            re.compile(pattern if isinstance(pattern, str) else "")
        except re.error as error:
            raise errors.UserError(
                f"{where}: {key}: {pattern!r} is not a regular expression: {error}"
            ) from error


def _named(rule: Any, module: str) -> bool:
    """PEFT's matching: a list holds names or their last parts, a string is a regular expression."""
    if isinstance(rule, str):
        return re.fullmatch(rule, module) is not None
    return any(module == name or module.endswith(f".{name}") for name in rule)


def _is_target(config: Mapping[str, Any], module: str, where: pathlib.Path) -> bool:
    rule = config.get("target_modules")
    if not rule:
        raise errors.UserError(f"{where}: target_modules is missing")
    if rule == "all-linear":
        hit = not module.endswith(("lm_head", "embed_tokens"))
    else:
        hit = _named(rule, module)
    if not hit or (config.get("exclude_modules") and _named(config["exclude_modules"], module)):
        return False
    layers = config.get("layers_to_transform")
    if layers is None:
        return True
    number = re.search(r"\.(\d+)\.", module)
    return number is not None and int(number[1]) in (
        layers if isinstance(layers, list) else [layers]
    )


def _rank_and_scale(
    config: Mapping[str, Any], module: str, where: pathlib.Path
) -> tuple[int, float]:
    rank = _pattern(config, "rank_pattern", module, config["r"], where)
    alpha = _pattern(config, "alpha_pattern", module, config["lora_alpha"], where)
    if rank < 1 or rank != int(rank):
        raise errors.UserError(f"{where}: r={rank} for {module}; a rank is 1 or more")
    return int(rank), alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _pattern(
    config: Mapping[str, Any], key: str, module: str, default: float, where: pathlib.Path
) -> float:
    """The value of the patterns that match; PEFT takes the first, but sorts them when it saves."""
    patterns = config.get(key) or {}
    hits = {v for k, v in patterns.items() if re.match(rf"(.*\.)?({k})$", module)}
    if len(hits) > 1:
        raise errors.UserError(
            f"{where}: several entries of {key} match {module} with different values {sorted(hits)}:"
            " which one holds depends on an order that the file has lost"
        )
    return hits.pop() if hits else default


def _read_tensors(path: pathlib.Path) -> dict[str, np.ndarray]:
    from safetensors import numpy as safetensors_numpy

    if not path.is_file():
        raise errors.UserError(
            f"{path.parent}: no {path.name} (adapter_model.bin is not read: pickle)"
        )
    try:
        tensors = safetensors_numpy.load_file(path)
    except Exception as error:
        raise errors.UserError(f"{path} is not a readable safetensors file: {error}") from error
    for name, tensor in tensors.items():
        if not np.isfinite(tensor.astype(np.float32)).all():
            raise errors.UserError(f"{path}: {name} holds values that are not finite")
    return tensors


def _compare(expected: set[str], found: set[str], where: pathlib.Path) -> None:
    def some(keys: Sequence[str]) -> str:
        return f"{', '.join(sorted(keys)[:3])}{' ...' if len(keys) > 3 else ''} ({len(keys)})"

    if missing := expected - found:
        raise errors.UserError(
            f"{where}: missing {some(list(missing))}, which {CONFIG_FILE} asks for"
        )
    if extra := found - expected:
        raise errors.UserError(
            f"{where}: holds {some(list(extra))}, which {CONFIG_FILE} does not ask for"
        )
