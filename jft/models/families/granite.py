# SPDX-License-Identifier: Apache-2.0
"""Granite 3: a Llama with four multipliers, of embeddings, scores, residuals and logits."""

import dataclasses
from typing import Any

from jft.models import architecture
from jft.models.families import family, llama, settings


def read(s: settings.Settings) -> architecture.Config:
    return dataclasses.replace(
        llama.read(s, "granite"),
        embedding_scale=s.number("embedding_multiplier", 1.0),
        attention_scale=s.number("attention_multiplier", 1.0),
        residual_scale=s.number("residual_multiplier", 1.0),
        logits_divisor=s.number("logits_scaling", 1.0),
    )


def write(c: architecture.Config) -> dict[str, Any]:
    return llama.write(c) | {
        "embedding_multiplier": c.embedding_scale,
        "attention_multiplier": c.attention_scale or c.head_dim**-0.5,
        "residual_multiplier": c.residual_scale,
        "logits_scaling": c.logits_divisor,
    }


_2B = architecture.Config(
    vocab_size=49152,
    d_model=2048,
    num_layers=40,
    num_heads=32,
    num_kv_heads=8,
    head_dim=64,
    d_ff=8192,
    max_length=131072,
    family="granite",
    pattern=(architecture.Layer(architecture.Rope(5000000.0)),),
    embedding_scale=12.0,
    attention_scale=0.015625,
    residual_scale=0.22,
    logits_divisor=8.0,
    tie_embeddings=True,
)
_8B: dict[str, Any] = {"vocab_size": 49159, "d_model": 4096, "head_dim": 128, "d_ff": 12800}

GRANITE = family.Family(
    "granite",
    "GraniteForCausalLM",
    read,
    write,
    llama.WEIGHTS,
    {
        "granite3.1-2b": _2B,
        "granite3.3-8b": dataclasses.replace(
            _2B,
            **_8B,
            pattern=(architecture.Layer(architecture.Rope(10000000.0)),),
            attention_scale=0.0078125,
            logits_divisor=16.0,
        ),
    },
)
