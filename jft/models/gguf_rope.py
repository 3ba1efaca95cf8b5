# SPDX-License-Identifier: Apache-2.0
"""How GGUF says that rotary positions are stretched: keys below `rope.scaling.`, or tensors of divisors.

llama.cpp has no rule of Llama 3.1's own: its files hold what the rule gives, one divisor per frequency, and the rule is
found again here. YaRN's `attn_factor` multiplies what llama.cpp itself derives from the factor.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from jft.models import architecture, gguf_architectures, gguf_blocks, gguf_keys, rope

FREQS = "rope_freqs.weight"
LONG, SHORT = "rope_factors_long.weight", "rope_factors_short.weight"
TENSORS: dict[str | None, tuple[str, ...]] = {None: (), "freqs": (FREQS,), "factors": (LONG, SHORT)}

_TYPES = ("none", "linear", "yarn", "longrope")
_YARN_BETAS = {"beta_fast": 32.0, "beta_slow": 1.0}
# Lengths of pretraining that Llama 3.1's rule is looked for with: the published one first.
_LENGTHS = (8192, *(2**n for n in range(4, 21) if 2**n != 8192))


def read(
    keys: gguf_keys.Keys, own: gguf_architectures.Architecture, dim: int, max_length: int
) -> architecture.Rope:
    """The rope of the layers that see everything.

    Args:
      keys: of the file.
      own: its architecture.
      dim: how many dimensions of a head turn.
      max_length: of the context.
    """
    theta = keys.number("rope.freq_base", 10000.0)
    held = [name for name in TENSORS[own.rope_tensors] if name in keys.file.tensors]
    kind = keys.get("rope.scaling.type", "linear")  # llama.cpp's default where a factor stands
    if kind not in _TYPES or (kind == "longrope" and not held):
        raise keys.refuse(f"{own.name}.rope.scaling.type is {kind!r}: not implemented")
    original = keys.count("rope.scaling.original_context_length", max_length)
    factor = keys.scale("rope.scaling.factor") or keys.scale("rope.scale_linear")
    stretched = kind == "yarn" or (kind == "linear" and factor not in (None, 1.0))
    if held and stretched:
        raise keys.refuse(f"has {held[0]} and {kind} scaling as well")
    if kind == "yarn":
        return architecture.Rope(theta, _yarn(keys, own, original))
    if held == [FREQS]:
        return architecture.Rope(theta, _llama3(keys, theta, dim))
    if held:
        return architecture.Rope(theta, _longrope(keys, dim, original))
    return architecture.Rope(theta, architecture.Linear(factor) if factor and stretched else None)


def _yarn(
    keys: gguf_keys.Keys, own: gguf_architectures.Architecture, original: int
) -> architecture.Yarn:
    factor = keys.number("rope.scaling.factor")
    heat = rope.yarn_attention_factor(factor)
    keys.only("rope.scaling.yarn_ext_factor", (1.0, -1.0))
    # The converter copies config.json's attention_factor here; llama.cpp computes its own instead.
    copied = keys.number("rope.scaling.yarn_attn_factor", heat)
    if not math.isclose(copied, heat, rel_tol=1e-4) and copied != 1.0:
        raise keys.refuse(
            f"{own.name}.rope.scaling.yarn_attn_factor is {copied}, and a factor of {factor} gives {heat:.6g}: "
            "not implemented"
        )
    fast, slow = (keys.number(f"rope.scaling.yarn_{k}", v) for k, v in _YARN_BETAS.items())
    attention = heat * keys.number("rope.scaling.attn_factor", 1.0)
    # No key says whether the ramp ends at whole dimensions. gpt-oss was trained with one that does not.
    return architecture.Yarn(factor, original, attention, fast, slow, own.name != "gpt-oss")


def _longrope(keys: gguf_keys.Keys, dim: int, original: int) -> architecture.LongRope:
    found = {}
    for name in (SHORT, LONG):
        if name not in keys.file.tensors:
            raise keys.refuse(f"{name} is missing")
        values = gguf_blocks.dequantise(keys.file.tensors[name], keys.file.path)
        if values.shape != (dim // 2,) or not (np.isfinite(values) & (values > 0)).all():
            raise keys.refuse(
                f"{name} is not {dim // 2} positive numbers, for {dim} dimensions that turn"
            )
        found[name] = tuple(gguf_keys.shortest(x) for x in values)
    heat = keys.number("rope.scaling.attn_factor", 1.0)
    return architecture.LongRope(found[SHORT], found[LONG], original, heat)


def _llama3(keys: gguf_keys.Keys, theta: float, dim: int) -> architecture.Scaling | None:
    """The rule behind a file's divisors of the frequencies: llama.cpp stores only those."""
    divisors = gguf_blocks.dequantise(keys.file.tensors[FREQS], keys.file.path)
    if divisors.shape == (dim // 2,) and np.isfinite(divisors).all() and divisors.min() > 0:
        if np.all(divisors == 1.0):
            return None
        at = int(divisors.argmax())
        for length in _LENGTHS:
            kept = _kept(architecture.Llama3(1.0, original_max_length=length), theta, dim)
            # 1 / divisor = (1 - kept) / factor + kept
            rest = 1.0 / float(divisors[at]) - kept[at]
            if rest <= 0 or kept[at] == 1.0:
                continue
            factor = (1.0 - kept[at]) / rest
            scaling = architecture.Llama3(float(f"{factor:.6g}"), original_max_length=length)
            # The converter computes in float32; another rule would differ by far more.
            if np.allclose(divisors, llama3_divisors(scaling, theta, dim), rtol=1e-4):
                return scaling
    raise keys.refuse(
        f"{FREQS} follows another rule than Llama 3.1's with factors 1 and 4 of 8192 or another power of two: "
        "not implemented"
    )


def _kept(s: architecture.Llama3, theta: float, dim: int) -> np.ndarray:
    """How much of each frequency is kept, from 0 (all divided by the factor) to 1."""
    turns = s.original_max_length * theta ** -(np.arange(0, dim, 2) / dim) / (2 * np.pi)
    return np.clip((turns - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor), 0.0, 1.0)


def llama3_divisors(s: architecture.Llama3, theta: float, dim: int) -> np.ndarray:
    """What Llama 3.1's rule divides each frequency by."""
    kept = _kept(s, theta, dim)
    return 1.0 / ((1.0 - kept) / s.factor + kept)


def write(found: architecture.Rope) -> dict[str, Any]:
    """The metadata keys of a rope, without the architecture's prefix."""
    keys: dict[str, Any] = {"rope.freq_base": found.theta}
    scaling = found.scaling
    match scaling:
        case architecture.Linear(factor):
            keys |= {"rope.scaling.type": "linear", "rope.scaling.factor": factor}
        case architecture.Yarn():
            keys |= {
                "rope.scaling.type": "yarn",
                "rope.scaling.factor": scaling.factor,
                "rope.scaling.original_context_length": scaling.original_max_length,
                "rope.scaling.yarn_beta_fast": scaling.beta_fast,
                "rope.scaling.yarn_beta_slow": scaling.beta_slow,
            }
            heat = rope.yarn_attention_factor(scaling.factor)
            if scaling.attention_factor != heat:
                keys["rope.scaling.attn_factor"] = scaling.attention_factor / heat
        case architecture.LongRope():
            keys |= {
                "rope.scaling.original_context_length": scaling.original_max_length,
                "rope.scaling.attn_factor": scaling.attention_factor,
            }
    return keys


def write_tensors(found: architecture.Rope | None, dim: int) -> Mapping[str, np.ndarray]:
    """The tensors of a rope, float32."""
    values: dict[str, Any] = {}
    if found and isinstance(found.scaling, architecture.Llama3):
        values = {FREQS: llama3_divisors(found.scaling, found.theta, dim)}
    elif found and isinstance(found.scaling, architecture.LongRope):
        values = {SHORT: found.scaling.short, LONG: found.scaling.long}
    return {name: np.asarray(value, np.float32) for name, value in values.items()}


def notes(found: architecture.Rope | None) -> list[str]:
    """What llama.cpp computes otherwise than the model, although the file says it."""
    scaling = found.scaling if found else None
    if isinstance(scaling, architecture.LongRope):
        return [
            "llama.cpp takes LongRoPE's long divisors where its context is set beyond "
            f"{scaling.original_max_length} tokens, however short the text is"
        ]
    if not isinstance(scaling, architecture.Yarn):
        return []
    said = []
    if (scaling.beta_fast, scaling.beta_slow) != tuple(_YARN_BETAS.values()):
        said.append(
            f"llama.cpp takes 32 and 1 for YaRN's beta_fast and beta_slow, not {scaling.beta_fast:g} and {scaling.beta_slow:g}"
        )
    if not scaling.truncate:
        said.append("llama.cpp ends YaRN's ramp at whole dimensions, which this model does not")
    return said
