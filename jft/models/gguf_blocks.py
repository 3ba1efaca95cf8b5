# SPDX-License-Identifier: Apache-2.0
"""Numbers to a GGUF file's types and back, one tensor at a time."""

import pathlib
from typing import Any

import ml_dtypes
import numpy as np

from jft import errors
from jft.models import gguf_file

_NARROW = {"f32": np.float32, "f16": np.float16, "bf16": ml_dtypes.bfloat16, "q8_0": np.float16}
KINDS = tuple(_NARROW)
_Q8_STEPS = 127  # a block's scale is its largest number divided by this, in float16


def dequantise(tensor: gguf_file.Tensor, path: pathlib.Path, part: int | None = None) -> np.ndarray:
    """A tensor of a file in float32, or the part of it at one index of its first axis."""
    import gguf

    kind = gguf.GGMLQuantizationType(tensor.kind)
    rows = tensor.raw.reshape(*tensor.shape[:-1], -1)
    try:
        return gguf.quants.dequantize(rows if part is None else rows[part], kind)
    except NotImplementedError as error:
        raise errors.UserError(
            f"{path}: {tensor.name} is stored as {kind.name}, which `gguf` can't dequantise"
        ) from error


def type_name(tensor: gguf_file.Tensor) -> str:
    """ggml's name of a tensor's type."""
    import gguf

    return gguf.GGMLQuantizationType(tensor.kind).name


def quantise(values: np.ndarray, name: str) -> np.ndarray:
    """float32 numbers as blocks of a type by ggml's name; what is not finite has a scale that is not."""
    import gguf

    with np.errstate(all="ignore"):
        return gguf.quants.quantize(values, gguf.GGMLQuantizationType[name])


def is_exact(name: str, shape: tuple[int, ...]) -> bool:
    """Whether llama.cpp wants a tensor in float32 in every file: norms, biases, routers and other small ones."""
    large = name.endswith(".weight") and not name.endswith("_norm.weight")
    return (
        len(shape) == 1
        or not large
        or ".ffn_gate_inp." in name
        or name.startswith("position_embd.")
    )


def chosen(kind: str, name: str, shape: tuple[int, ...]) -> str:
    """The type of one tensor in a file of a kind: float16 where its rows are no whole blocks."""
    if is_exact(name, shape):
        return "f32"
    return "f16" if kind == "q8_0" and shape[-1] % 32 else kind


def size(kind: str, shape: tuple[int, ...]) -> int:
    """Bytes on disk."""
    import gguf

    block, stored = gguf.GGML_QUANT_SIZES[gguf_type(kind)]
    return int(np.prod(shape)) // block * stored


def gguf_type(kind: str) -> Any:
    """The package's name of a kind."""
    import gguf

    return gguf.GGMLQuantizationType[kind.upper()]


def encode(array: np.ndarray, kind: str, where: str) -> np.ndarray:
    """An array as a file's numbers or blocks.

    Args:
      array: of floats.
      kind: one of `KINDS`.
      where: the place, for messages.

    Raises:
      errors.UserError: a number is not finite, or too large for the type.
    """
    import gguf

    with np.errstate(over="ignore"):
        values = np.ascontiguousarray(array, np.float32)
        largest = max(float(values.max()), -float(values.min()))  # NaN where there is one
        fits = np.isfinite(_NARROW[kind](largest / (_Q8_STEPS if kind == "q8_0" else 1)))
    if not fits:
        if not np.isfinite(array).all():
            raise errors.UserError(f"{where}: has a value that is not finite")
        advice = "" if kind == "f32" else "; write f32"
        raise errors.UserError(f"{where}: holds {largest:g}, too large for {kind}{advice}")
    return gguf.quants.quantize(values, gguf_type(kind))
