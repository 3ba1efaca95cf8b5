# SPDX-License-Identifier: Apache-2.0
"""Our configuration as metadata of a GGUF file.

Writing reads back what it would write: whatever a file can't say is found by comparing, and refused by name.
"""

import dataclasses
import math
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from jft import errors
from jft.models import (
    architecture,
    gguf_architectures,
    gguf_config,
    gguf_file,
    gguf_keys,
    gguf_rope,
)
from jft.models.families import settings

# Files hold float32: a number that is no short decimal comes back with its rounding, of 6e-8.
_ROUNDING = 1e-6


def write(c: architecture.Config) -> dict[str, Any]:
    """The keys of a configuration, in full, with `general.architecture`. Numbers are Python's."""
    own = gguf_architectures.of_family(c.family)
    eps = "layer_norm_epsilon" if c.norm == "layer" else "layer_norm_rms_epsilon"
    keys: dict[str, Any] = {
        "vocab_size": c.vocab_size,
        "context_length": c.max_length,
        "embedding_length": c.d_model,
        "block_count": c.num_layers,
        "feed_forward_length": c.d_ff,
        "attention.head_count": c.num_heads,
        "attention.head_count_kv": c.num_kv_heads,
        "attention.key_length": c.head_dim,
        "attention.value_length": c.head_dim,
        f"attention.{eps}": c.norm_eps,
    }
    if c.experts:
        keys |= {"expert_count": c.experts.count, "expert_used_count": c.experts.top_k}
        if own.name != "llama":
            keys["expert_feed_forward_length"] = c.d_ff
    if c.rope:
        keys |= {"rope.dimension_count": c.rotary_dim or c.head_dim} | gguf_rope.write(c.rope)
    keys |= _scales(c, own) | _windows(c, own)
    named = {f"{own.name}.{key}": value for key, value in keys.items()}
    return {"general.architecture": own.name} | named


def _scales(c: architecture.Config, own: gguf_architectures.Architecture) -> dict[str, Any]:
    if own.name == "granite":
        return {
            "attention.scale": c.attention_scale,
            "embedding_scale": c.embedding_scale,
            "residual_scale": c.residual_scale,
            "logit_scale": c.logits_divisor,
        }
    caps = {
        "attn_logit_softcapping": c.attention_softcap,
        "final_logit_softcapping": c.logits_softcap,
    }
    return {key: cap for key, cap in caps.items() if cap}


def _windows(c: architecture.Config, own: gguf_architectures.Architecture) -> dict[str, Any]:
    every, window = own.whole_every, settings.window(c)
    if every is None:
        return {}
    if window is None:  # phi3's way to say that there is none; Gemma 3's is silence
        return {"attention.sliding_window": 0} if every == 0 else {}
    keys: dict[str, Any] = {"attention.sliding_window": window}
    slides = [c.layer(i).window is not None for i in range(c.num_layers)]
    if slides != [not every or (i + 1) % every != 0 for i in range(c.num_layers)]:
        keys["attention.sliding_window_pattern"] = slides
    if own.local_theta:
        local = next(layer.rope for layer in c.pattern if layer.window is not None)
        keys["rope.freq_base_swa"] = local.theta if local else own.local_theta
    return keys


def written(c: architecture.Config) -> architecture.Config:
    """A configuration as files name it: another family's name, and a window where there is no word for one.

    Up to the width of the window, a model with one and a model without are the same function; so the context of a file
    that can't speak of windows ends there.
    """
    own = gguf_architectures.of_family(c.family)
    changed: dict[str, Any] = {"family": "mixtral" if c.family == "mixtral" else own.families[0]}
    if own.averaged_at or own.name == "granite":
        changed["attention_scale"] = c.attention_scale or c.head_dim**-0.5
    windows = [layer.window for layer in c.pattern if layer.window is not None]
    if windows and own.whole_every is None:
        layers = [dataclasses.replace(c.layer(i), window=None) for i in range(c.num_layers)]
        changed |= {
            "pattern": settings.pattern(layers),
            "max_length": min(c.max_length, *windows),
        }
    return dataclasses.replace(c, **changed)


def notes(c: architecture.Config) -> tuple[str, ...]:
    """What a reader of the file should know: where it says less than the model, or llama.cpp heeds less than it says."""
    own, window = gguf_architectures.of_family(c.family), settings.window(c)
    said = gguf_rope.notes(c.rope)
    if own.whole_every is None and window is not None and written(c).max_length < c.max_length:
        said.append(
            f"architecture {own.name!r} has no sliding window, and this model has one of {window}: the file's context is "
            f"{written(c).max_length} tokens, not {c.max_length}, and up to there the two are the same"
        )
    if own.name == "phi3" and window is not None and window < c.max_length:
        said.append(
            f"llama.cpp does not heed phi3's sliding window of {window} tokens, which the file states"
        )
    if "attention.sliding_window_pattern" in _windows(c, own):
        said.append(
            "the layers with a window are not those that llama.cpp has built in: builds that do not read "
            f"{own.name}.attention.sliding_window_pattern, such as b9190, compute something else"
        )
    return tuple(said)


def check(c: architecture.Config, tensors: Mapping[str, tuple[int, ...]], path: Any) -> None:
    """Refuses a model of which a file would say something else.

    Args:
      c: as `written`.
      tensors: the names and shapes that the file will have.
      path: of the file, for messages.

    Raises:
      errors.UserError: what can't be said, and what would be read instead.
    """
    own = gguf_architectures.of_family(c.family)
    place = f"{path}: architecture {own.name!r} of GGUF"
    try:
        found = gguf_config.read(_as_read(c, tensors))
    except errors.UserError as error:
        raise errors.UserError(f"{place} can't hold this model: {error}") from error
    for field, ours, theirs in _differences(_unrolled(c), _unrolled(found)):
        raise errors.UserError(
            f"{place} can't say {field} {gguf_keys.shown(ours)}: llama.cpp takes it for {gguf_keys.shown(theirs)}"
        )


def _unrolled(c: architecture.Config) -> architecture.Config:
    """With every layer named, so that what is told is one layer's."""
    return dataclasses.replace(c, pattern=tuple(c.layer(i) for i in range(c.num_layers)))


def _as_read(c: architecture.Config, tensors: Mapping[str, tuple[int, ...]]) -> gguf_file.File:
    """A file's header as it will be read; of its tensors only those of the rope have values."""
    values = gguf_rope.write_tensors(c.rope, c.rotary_dim or c.head_dim)
    metadata = {key: float32(value) for key, value in write(c).items()}
    stubs = {name: (shape, name.encode()) for name, shape in tensors.items()}
    stubs |= {name: (value.shape, value.tobytes()) for name, value in values.items()}
    found = {
        name: gguf_file.Tensor(name, 0, shape, np.frombuffer(raw, np.uint8))
        for name, (shape, raw) in stubs.items()
    }
    return gguf_file.File(pathlib.Path("metadata"), metadata, found)


def float32(value: Any) -> Any:
    return float(np.float32(value)) if isinstance(value, float) else value


def _differences(ours: Any, theirs: Any, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(path of field, ours, theirs) where two configurations differ by more than rounding."""
    if dataclasses.is_dataclass(ours) and type(ours) is type(theirs):
        for field in dataclasses.fields(ours):
            parts = (getattr(x, field.name) for x in (ours, theirs))
            yield from _differences(*parts, f"{name}.{field.name}".lstrip("."))
    elif isinstance(ours, tuple) and isinstance(theirs, tuple) and len(ours) == len(theirs):
        for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            yield from _differences(a, b, f"{name}[{i}]")
    elif isinstance(ours, float) and isinstance(theirs, float):
        if not math.isclose(ours, theirs, rel_tol=_ROUNDING):
            yield name, ours, theirs
    elif ours != theirs:
        yield name, ours, theirs
