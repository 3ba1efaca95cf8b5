# SPDX-License-Identifier: Apache-2.0
"""The form of quantized.json: its seal is against damage, and whoever writes another record can seal it, too."""

import pathlib
import re
from collections.abc import Callable, Mapping
from typing import Any

from jft import errors, json_text, quant
from jft.models import safetensors

_LEVELS = 3  # a QArray, that of its scales, and one more
_HASH = re.compile(r"[0-9a-f]{64}")
_KINDS = (*quant.KINDS, "uint4", "dynamic8")


def check(record: Mapping[str, Any], path: pathlib.Path) -> None:
    """Raises UserError unless every key is there and is of its type."""
    for key, is_one in _FORM.items():
        if key not in record:
            raise errors.UserError(f"{path}: {key} is missing: write the folder again")
        if not is_one(record[key]):
            raise errors.UserError(
                f"{path}: {key} is {json_text.shown(record[key])}, not as jft writes it: write the folder again"
            )
    for key, is_one in (("leaves", _is_leaf), ("tensors", _is_tensor)):
        for name, said in record[key].items():
            if not is_one(said):
                raise errors.UserError(
                    f"{path}: {key} says of {json_text.shown(name)} {json_text.shown(said)}, not as jft writes it:"
                    " write the folder again"
                )


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 40


def _is_leaf(levels: Any) -> bool:
    return isinstance(levels, list) and len(levels) <= _LEVELS and all(map(_is_level, levels))


def _is_level(own: Any) -> bool:
    if not isinstance(own, dict) or own.keys() != {"kind", "axis", "block", "offsets"}:
        return False
    sizes = type(own["axis"]) is int and own["axis"] < 0 and _is_count(own["block"])
    return sizes and own["kind"] in _KINDS and own["block"] > 0 and isinstance(own["offsets"], bool)


def _is_tensor(said: Any) -> bool:
    if not isinstance(said, dict) or said.keys() != {"file", "dtype", "shape", "sha256"}:
        return False
    shape = isinstance(said["shape"], list) and all(map(_is_count, said["shape"]))
    texts = all(isinstance(said[key], str) for key in ("file", "dtype", "sha256"))
    return (
        shape
        and texts
        and safetensors.is_dtype(said["dtype"])
        and bool(_HASH.fullmatch(said["sha256"]))
    )


def _is_object(value: Any) -> bool:
    return isinstance(value, dict)


_FORM: dict[str, Callable[[Any], bool]] = {
    "quantize": _is_text,
    "quantize_embeddings": _is_text,
    "base": _is_text,
    "revision": lambda value: value is None or _is_text(value),
    "fingerprint": _is_text,
    "leaves": _is_object,
    "tensors": _is_object,
}
