# SPDX-License-Identifier: Apache-2.0
"""Rotary positions in config.json: transformers 4 has rope_theta and rope_scaling, version 5 one rope_parameters."""

from collections.abc import Mapping
from typing import Any

from jft.models import architecture, rope
from jft.models.families import settings

_KEYS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": (
        "factor",
        "original_max_position_embeddings",
        "attention_factor",
        "beta_fast",
        "beta_slow",
        "mscale",
        "mscale_all_dim",
        "truncate",
    ),
    "longrope": (
        "factor",
        "short_factor",
        "long_factor",
        "original_max_position_embeddings",
        "attention_factor",
    ),
}
_ALIASES = {"su": "longrope"}
_ANYWHERE = ("rope_type", "type", "rope_theta", "partial_rotary_factor")
# Copied into every rope_parameters by transformers 5; without effect on the kinds that don't have it above.
_COPIED = "original_max_position_embeddings"


def read(
    s: settings.Settings, head_dim: int, max_length: int, *, theta: float = 10000.0
) -> tuple[architecture.Rope, int | None]:
    """The rope, and how many dimensions of a head turn (None: all).

    Args:
      s: the file.
      head_dim: dimensions of a head.
      max_length: the model's positions.
      theta: the base where the file does not say.
    """
    found = section(s)
    where = "rope_scaling" if s.get("rope_scaling") else "rope_parameters"
    own = settings.Settings(found, f"{s.where}: {where}")
    base = own if own.get("rope_theta") is not None else s
    fraction = own.get("partial_rotary_factor", s.get("partial_rotary_factor", 1.0))
    if isinstance(fraction, bool) or not isinstance(fraction, int | float) or not 0 < fraction <= 1:
        raise s.refuse(f"partial_rotary_factor is {fraction!r}, not above 0 and at most 1")
    dim = int(head_dim * fraction)
    if dim % 2 or not dim:
        raise s.refuse(f"partial_rotary_factor {fraction}: {dim} dimensions can't turn in pairs")
    original = s.get(_COPIED, max_length)
    scaling = _scaling(own, dim, max_length, original)
    found_rope = architecture.Rope(base.number("rope_theta", theta), scaling)
    return found_rope, None if dim == head_dim else dim


def section(s: settings.Settings) -> Mapping[str, Any]:
    """The object that describes the rope, in either spelling."""
    old, new = s.get("rope_scaling"), s.get("rope_parameters")
    if old and new and old != new:
        raise s.refuse(f"rope_scaling {old!r} and rope_parameters {new!r} disagree; remove one")
    key, found = ("rope_scaling", old) if old else ("rope_parameters", new or {})
    if not isinstance(found, Mapping):
        raise s.refuse(f"{key} is {found!r}, not an object")
    return found


def _scaling(
    own: settings.Settings, dim: int, max_length: int, original: int
) -> architecture.Scaling | None:
    kind = own.get("rope_type", own.get("type", "default"))
    kind = _ALIASES.get(kind, kind)
    if kind not in _KEYS:
        raise own.refuse(f"rope_type is {kind!r}; implemented are {', '.join(_KEYS)}")
    odd = [
        key
        for key, value in own.values.items()
        if value is not None and key not in (*_KEYS[kind], *_ANYWHERE, _COPIED)
    ]
    if odd:
        raise own.refuse(f"{odd[0]} is nothing that rope_type {kind!r} has")
    match kind:
        case "default":
            return None
        case "linear":
            return architecture.Linear(own.number("factor"))
        case "llama3":
            return architecture.Llama3(
                own.number("factor"),
                own.number("low_freq_factor"),
                own.number("high_freq_factor"),
                own.count(_COPIED, original),
            )
        case "yarn":
            return _yarn(own, max_length, original)
        case _:
            return _longrope(own, dim, max_length, original)


def _yarn(own: settings.Settings, max_length: int, original: int) -> architecture.Yarn:
    original = own.count(_COPIED, original)
    factor = own.number("factor", max_length / original)
    all_dim, one = own.optional("mscale_all_dim"), own.optional("mscale")
    heat = rope.yarn_attention_factor(factor)
    if all_dim and one:
        heat = rope.yarn_attention_factor(factor, one) / rope.yarn_attention_factor(factor, all_dim)
    return architecture.Yarn(
        factor,
        original,
        own.number("attention_factor", heat),
        own.number("beta_fast", 32.0),
        own.number("beta_slow", 1.0),
        own.flag("truncate", True),
    )


def _longrope(
    own: settings.Settings, dim: int, max_length: int, original: int
) -> architecture.LongRope:
    original = own.count(_COPIED, original)
    stretch = own.number("factor", max_length / original)
    heat = rope.longrope_attention_factor(stretch, original)
    factors = []
    for key in ("short_factor", "long_factor"):
        values = own.need(key)
        if not isinstance(values, list) or not all(isinstance(x, int | float) for x in values):
            raise own.refuse(f"{key} is not a list of numbers")
        if len(values) != dim // 2:
            raise own.refuse(f"{key} has {len(values)} numbers for {dim // 2} frequencies")
        factors.append(tuple(float(x) for x in values))
    return architecture.LongRope(*factors, original, own.number("attention_factor", heat))


def write(c: architecture.Config) -> dict[str, Any]:
    """rope_theta, rope_scaling and partial_rotary_factor, of the layers that see everything if they turn."""
    found = c.rope or architecture.Rope()
    keys: dict[str, Any] = {
        "rope_theta": found.theta,
        "rope_scaling": write_scaling(found.scaling),
    }
    if c.rotary_dim:
        keys["partial_rotary_factor"] = c.rotary_dim / c.head_dim
    return keys


def write_scaling(scaling: architecture.Scaling | None) -> dict[str, Any] | None:
    match scaling:
        case None:
            return None
        case architecture.Linear(factor):
            return {"rope_type": "linear", "factor": factor}
        case architecture.Llama3():
            return {
                "rope_type": "llama3",
                "factor": scaling.factor,
                "low_freq_factor": scaling.low_freq_factor,
                "high_freq_factor": scaling.high_freq_factor,
                _COPIED: scaling.original_max_length,
            }
        case architecture.Yarn():
            return {
                "rope_type": "yarn",
                "factor": scaling.factor,
                _COPIED: scaling.original_max_length,
                "attention_factor": scaling.attention_factor,
                "beta_fast": scaling.beta_fast,
                "beta_slow": scaling.beta_slow,
                "truncate": scaling.truncate,
            }
        case architecture.LongRope():
            return {
                "rope_type": "longrope",
                "short_factor": list(scaling.short),
                "long_factor": list(scaling.long),
                _COPIED: scaling.original_max_length,
                "attention_factor": scaling.attention_factor,
            }
