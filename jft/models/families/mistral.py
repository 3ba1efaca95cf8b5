# SPDX-License-Identifier: Apache-2.0
"""Mistral (https://arxiv.org/abs/2310.06825), and Mixtral, whose MLPs are mixtures of experts."""

import dataclasses
from typing import Any

from jft.models import architecture, names
from jft.models.families import family, rope_settings, settings


def _fields(s: settings.Settings, theta: float, eps: float) -> dict[str, Any]:
    fields = settings.common(s, eps=eps)
    found, rotary_dim = rope_settings.read(s, fields["head_dim"], fields["max_length"], theta=theta)
    window = None if s.get("sliding_window") is None else s.count("sliding_window")
    return fields | {
        "pattern": (architecture.Layer(found, window),),
        "rotary_dim": rotary_dim,
        "activation": s.activation(),
    }


def read_mistral(s: settings.Settings) -> architecture.Config:
    return architecture.Config(**_fields(s, 10000.0, 1e-6), family="mistral")


def read_mixtral(s: settings.Settings) -> architecture.Config:
    experts = architecture.Experts(
        s.count("num_local_experts", 8), s.count("num_experts_per_tok", 2)
    )
    if experts.top_k > experts.count:
        raise s.refuse(
            f"num_experts_per_tok {experts.top_k} is more than num_local_experts {experts.count}"
        )
    fields = _fields(s, 1000000.0, 1e-5)
    return architecture.Config(**fields, family="mixtral", experts=experts)


def write(c: architecture.Config) -> dict[str, Any]:
    keys = settings.write_common(c) | rope_settings.write(c)
    keys |= {
        "hidden_act": settings.hf_activation(str(c.activation)),
        "sliding_window": settings.window(c),
    }
    if c.experts:
        keys |= {"num_local_experts": c.experts.count, "num_experts_per_tok": c.experts.top_k}
    return keys


_EXPERT = "model.layers.{layer}.block_sparse_moe.experts.{expert}."
MIXTRAL_WEIGHTS = names.table(
    names.standard(),
    (
        names.Weight(
            "model.layers.{layer}.block_sparse_moe.gate.weight",
            "layers/router/kernel",
            ("E", "D"),
            "DE",
        ),
        *names.linear(_EXPERT + "w1", "layers/experts/gate", "F", "D"),
        *names.linear(_EXPERT + "w3", "layers/experts/up", "F", "D"),
        *names.linear(_EXPERT + "w2", "layers/experts/down", "D", "F"),
    ),
)

_7B = architecture.Config(
    vocab_size=32000,
    d_model=4096,
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    d_ff=14336,
    max_length=32768,
    family="mistral",
    pattern=(architecture.Layer(architecture.Rope(10000.0), 4096),),
)
_MILLION = (architecture.Layer(architecture.Rope(1000000.0)),)
_MIXTRAL = dataclasses.replace(
    _7B, family="mixtral", pattern=_MILLION, experts=architecture.Experts(8, 2)
)

MISTRAL = family.Family(
    "mistral",
    "MistralForCausalLM",
    read_mistral,
    write,
    names.standard(),
    {
        "mistral-7b-v0.1": _7B,
        "mistral-7b-v0.3": dataclasses.replace(_7B, vocab_size=32768, pattern=_MILLION),
        "mistral-nemo-12b": dataclasses.replace(
            _7B,
            vocab_size=131072,
            d_model=5120,
            num_layers=40,
            max_length=131072,
            pattern=_MILLION,
        ),
    },
)
MIXTRAL = family.Family(
    "mixtral",
    "MixtralForCausalLM",
    read_mixtral,
    write,
    MIXTRAL_WEIGHTS,
    {
        "mixtral-8x7b": _MIXTRAL,
        "mixtral-8x22b": dataclasses.replace(
            _MIXTRAL,
            vocab_size=32768,
            d_model=6144,
            num_layers=56,
            num_heads=48,
            d_ff=16384,
            max_length=65536,
        ),
    },
)
