# SPDX-License-Identifier: Apache-2.0
"""Rotary positions: frequencies under every scaling that the families use, and the rotation itself."""

import math
from typing import Any

import jax
import jax.numpy as jnp

from jft.models import architecture


def frequencies(
    rope: architecture.Rope, dim: int, dtype: Any, *, stretched: bool = False
) -> jax.Array:
    """Frequencies [dim / 2] in radians per position.

    Args:
      rope: base and scaling.
      dim: how many dimensions of a head turn.
      dtype: of the result.
      stretched: LongRoPE's divisors for long sequences instead of those for short ones.
    """
    exponent = jnp.arange(0, dim, 2, dtype=dtype) / dim
    freq = 1.0 / rope.theta**exponent
    match rope.scaling:
        case None:
            return freq
        case architecture.Linear(factor):
            return freq / factor
        case architecture.Llama3():
            return _llama3(freq, rope.scaling)
        case architecture.Yarn():
            return _yarn(freq, rope.theta, rope.scaling)
        case architecture.LongRope():
            divisors = rope.scaling.long if stretched else rope.scaling.short
            return freq / jnp.asarray(divisors, dtype)


def _llama3(freq: jax.Array, s: architecture.Llama3) -> jax.Array:
    wavelength = 2 * jnp.pi / freq
    ramp = s.original_max_length / wavelength - s.low_freq_factor
    ramp = jnp.clip(ramp / (s.high_freq_factor - s.low_freq_factor), 0.0, 1.0)
    return (1 - ramp) * freq / s.factor + ramp * freq


def _yarn(freq: jax.Array, theta: float, s: architecture.Yarn) -> jax.Array:
    """Equations 17 to 19 of the paper: few turns within the original length are stretched, many are kept."""
    dim = 2 * freq.shape[0]

    def dimension(turns: float) -> float:
        """The dimension that turns so often within the original length."""
        return dim * math.log(s.original_max_length / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dimension(s.beta_fast), dimension(s.beta_slow)
    if s.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    width = high - low or 0.001
    kept = 1 - jnp.clip((jnp.arange(dim // 2, dtype=freq.dtype) - low) / width, 0.0, 1.0)
    return freq / s.factor * (1 - kept) + freq * kept


def yarn_attention_factor(factor: float, mscale: float = 1.0) -> float:
    """What YaRN multiplies queries and keys by (section 3.4 of the paper)."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def longrope_attention_factor(stretch: float, original_max_length: int) -> float:
    """What LongRoPE multiplies queries and keys by, for a context `stretch` times the original one."""
    return 1.0 if stretch <= 1 else math.sqrt(1 + math.log(stretch) / math.log(original_max_length))


def tables(
    rope: architecture.Rope | None,
    dim: int,
    positions_BT: jax.Array,
    stretched_BT: jax.Array | None,
    dtype: Any,
) -> tuple[jax.Array, jax.Array]:
    """sin_BTR and cos_BTR, [B, T, dim / 2]; those of a layer without rotary positions turn nothing.

    Args:
      rope: None for a layer without.
      dim: how many dimensions of a head turn.
      positions_BT: of the tokens.
      stretched_BT: where LongRoPE's long divisors hold; may be None without LongRoPE.
      dtype: of the angles, at least float32.
    """
    if rope is None:
        zeros = jnp.zeros((*positions_BT.shape, dim // 2), dtype)
        return zeros, zeros + 1
    scaling = rope.scaling
    freq = frequencies(rope, dim, dtype)
    if isinstance(scaling, architecture.LongRope) and stretched_BT is not None:
        long = frequencies(rope, dim, dtype, stretched=True)
        freq = jnp.where(stretched_BT[..., None], long, freq)
    angles = positions_BT[..., None].astype(dtype) * freq
    heat = 1.0
    if isinstance(scaling, architecture.LongRope | architecture.Yarn):
        heat = scaling.attention_factor
    return heat * jnp.sin(angles), heat * jnp.cos(angles)


def rotate(x_BTNH: jax.Array, sin_BTR: jax.Array, cos_BTR: jax.Array) -> jax.Array:
    """Rotates pairs (i, i + R) of the first 2 R dimensions, the order of Hugging Face checkpoints."""
    R = sin_BTR.shape[-1]
    a, b, rest = jnp.split(x_BTNH, [R, 2 * R], axis=-1)
    sin, cos = sin_BTR[:, :, None, :], cos_BTR[:, :, None, :]
    turned = [(a * cos - b * sin).astype(x_BTNH.dtype), (b * cos + a * sin).astype(x_BTNH.dtype)]
    return jnp.concatenate([*turned, rest] if rest.shape[-1] else turned, axis=-1)


def needs_lengths(c: architecture.Config) -> bool:
    """Whether angles depend on how long the sequence is."""
    ropes = [layer.rope for layer in c.kinds if layer.rope]
    return any(isinstance(rope.scaling, architecture.LongRope) for rope in ropes)


def original_length(c: architecture.Config) -> int:
    """The length beyond which a model that `needs_lengths` uses its long divisors."""
    ropes = [layer.rope for layer in c.kinds if layer.rope]
    return next(
        r.scaling.original_max_length for r in ropes if isinstance(r.scaling, architecture.LongRope)
    )
