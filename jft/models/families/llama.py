# SPDX-License-Identifier: Apache-2.0
"""Llama 2, 3, 3.1, 3.2 and 3.3, and SmolLM2, which has its architecture."""

import dataclasses
from typing import Any

from jft.models import architecture, names
from jft.models.families import family, rope_settings, settings

WEIGHTS = names.standard()


def read(s: settings.Settings, name: str = "llama") -> architecture.Config:
    fields = settings.common(s)
    found, rotary_dim = rope_settings.read(s, fields["head_dim"], fields["max_length"])
    biased = s.flag("attention_bias")
    return architecture.Config(
        **fields,
        family=name,
        pattern=(architecture.Layer(found),),
        rotary_dim=rotary_dim,
        activation=s.activation(),
        qkv_bias=biased,
        out_bias=biased,
        mlp_bias=s.flag("mlp_bias"),
    )


def write(c: architecture.Config) -> dict[str, Any]:
    return (
        settings.write_common(c)
        | rope_settings.write(c)
        | {
            "hidden_act": settings.hf_activation(str(c.activation)),
            "attention_bias": c.qkv_bias,
            "mlp_bias": c.mlp_bias,
        }
    )


def _rope(theta: float, factor: float | None = None) -> tuple[architecture.Layer, ...]:
    scaling = None if factor is None else architecture.Llama3(factor)
    return (architecture.Layer(architecture.Rope(theta, scaling)),)


_SMOLLM2 = architecture.Config(
    vocab_size=49152,
    d_model=576,
    num_layers=30,
    num_heads=9,
    num_kv_heads=3,
    head_dim=64,
    d_ff=1536,
    max_length=8192,
    pattern=_rope(100000.0),
    tie_embeddings=True,
)
_LLAMA2 = architecture.Config(
    vocab_size=32000,
    d_model=4096,
    num_layers=32,
    num_heads=32,
    num_kv_heads=32,
    head_dim=128,
    d_ff=11008,
    max_length=4096,
)
_LLAMA31 = architecture.Config(
    vocab_size=128256,
    d_model=4096,
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    d_ff=14336,
    max_length=131072,
    pattern=_rope(500000.0, 8.0),
)
_LLAMA31_70B = dataclasses.replace(_LLAMA31, d_model=8192, num_layers=80, num_heads=64, d_ff=28672)
_LLAMA32 = dataclasses.replace(
    _LLAMA31, pattern=_rope(500000.0, 32.0), d_ff=8192, tie_embeddings=True
)

PRESETS: dict[str, architecture.Config] = {
    "smollm2-135m": _SMOLLM2,
    "smollm2-360m": dataclasses.replace(
        _SMOLLM2, d_model=960, num_layers=32, num_heads=15, num_kv_heads=5, d_ff=2560
    ),
    "smollm2-1.7b": dataclasses.replace(
        _SMOLLM2,
        d_model=2048,
        num_layers=24,
        num_heads=32,
        num_kv_heads=32,
        d_ff=8192,
        pattern=_rope(130000.0),
    ),
    "llama2-7b": _LLAMA2,
    "llama2-13b": dataclasses.replace(
        _LLAMA2, d_model=5120, num_layers=40, num_heads=40, num_kv_heads=40, d_ff=13824
    ),
    "llama2-70b": dataclasses.replace(
        _LLAMA2, d_model=8192, num_layers=80, num_heads=64, num_kv_heads=8, d_ff=28672
    ),
    "llama3-8b": dataclasses.replace(_LLAMA31, pattern=_rope(500000.0), max_length=8192),
    "llama3.2-1b": dataclasses.replace(_LLAMA32, d_model=2048, num_layers=16, head_dim=64),
    "llama3.2-3b": dataclasses.replace(_LLAMA32, d_model=3072, num_layers=28, num_heads=24),
    "llama3.1-8b": _LLAMA31,
    "llama3.1-70b": _LLAMA31_70B,
    "llama3.3-70b": _LLAMA31_70B,
    "llama3.1-405b": dataclasses.replace(
        _LLAMA31, d_model=16384, num_layers=126, num_heads=128, d_ff=53248
    ),
}

LLAMA = family.Family("llama", "LlamaForCausalLM", read, write, WEIGHTS, PRESETS)
