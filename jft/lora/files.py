# SPDX-License-Identifier: Apache-2.0
"""Adapters of any pytree in one safetensors file. For the models that PEFT knows, `jft.lora.peft` writes its format.

Tensors are `PATH/a`, `PATH/b` and `PATH/magnitude`; the header says scale, layout and dropout of each. The same
adapters give the same bytes.
"""

import json
import math
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jft import errors, json_text
from jft.lora import spec

FORMAT = "jft.lora.1"


def save(path: str | pathlib.Path, adapters: Mapping[str, spec.Factors]) -> None:
    """Writes the adapters; dtypes are kept."""
    from safetensors import numpy as safetensors_numpy

    tensors, header = {}, {}
    for leaf, factors in sorted(adapters.items()):
        header[leaf] = {k: getattr(factors, k) for k in ("scale", "layout", "dropout")}
        for name in ("a", "b", "magnitude"):
            if (array := getattr(factors, name)) is not None:
                tensors[f"{leaf}/{name}"] = np.ascontiguousarray(jax.device_get(array))
    # One key: the header is a hash map, and two keys would come in either order.
    metadata = {FORMAT: json.dumps(header, sort_keys=True)}
    pathlib.Path(path).write_bytes(safetensors_numpy.save(tensors, metadata))


def load(path: str | pathlib.Path, params: Any) -> spec.Adapters:
    """Reads what `save` wrote, for this base.

    Raises:
      UserError: the file is not one, is damaged, holds values that are not finite, or does not fit the base.
    """
    import safetensors

    path = pathlib.Path(path)
    if not path.is_file():
        raise errors.UserError(f"{path}: no such file")
    try:
        with safetensors.safe_open(path, "np") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except Exception as error:
        raise errors.UserError(f"{path} is not a readable safetensors file: {error}") from error
    if FORMAT not in metadata:
        raise errors.UserError(
            f"{path} is no adapter of jft.lora.save; a PEFT folder is read by jft.lora.peft.load"
        )
    adapters = {
        leaf: _factors(leaf, saved, tensors, path)
        for leaf, saved in _header(metadata[FORMAT], path).items()
    }
    if tensors:
        raise errors.UserError(f"{path}: holds {min(tensors)}, which its header does not know")
    spec.check(adapters, params)
    return adapters


def _header(text: str, path: pathlib.Path) -> dict[str, Any]:
    """{leaf: what is said of it}."""
    try:
        header = json_text.loads(text, "it is")
        for saved in header.values():
            good = saved.keys() == {"scale", "layout", "dropout"} and isinstance(
                saved["layout"], str
            )
            if not good or not math.isfinite(saved["scale"]) or not 0 <= saved["dropout"] < 1:
                raise ValueError(f"it says {saved}")
    except (ValueError, TypeError, AttributeError, OverflowError) as error:
        raise errors.UserError(f"{path}: its header is damaged: {error}") from error
    return header


def _factors(
    leaf: str, saved: dict[str, Any], tensors: dict[str, np.ndarray], path: pathlib.Path
) -> spec.Factors:
    """One leaf's factors, taken out of `tensors`."""
    arrays = {}
    for name in ("a", "b", "magnitude"):
        tensor = tensors.pop(f"{leaf}/{name}", None)
        if tensor is None and name != "magnitude":
            raise errors.UserError(f"{path}: {leaf}/{name} is missing")
        if tensor is not None and not np.isfinite(tensor.astype(np.float64)).all():
            raise errors.UserError(f"{path}: {leaf}/{name} holds values that are not finite")
        arrays[name] = None if tensor is None else jnp.asarray(tensor)
    return spec.Factors(**arrays, **saved)
