# SPDX-License-Identifier: Apache-2.0
"""gpt-oss (https://arxiv.org/abs/2508.10925): mixtures of experts with biases, attention sinks, every other layer windowed.

Files hold the experts of a layer as one array, gate and up by turns.
"""

import dataclasses
from typing import Any

from jft.models import architecture, names
from jft.models.families import family, rope_settings, settings


def read(s: settings.Settings) -> architecture.Config:
    fields = settings.common(s, eps=1e-5)
    L = fields["num_layers"]
    found, rotary_dim = rope_settings.read(
        s, fields["head_dim"], fields["max_length"], theta=150000.0
    )
    if found.scaling is None and not rope_settings.section(s):
        raise s.refuse(
            "rope_scaling is missing: without it the family's own would have to be guessed"
        )
    s.only("hidden_act", "silu")
    method = (s.get("quantization_config") or {}).get("quant_method", "mxfp4")
    if method != "mxfp4":
        raise s.refuse(
            f"quantization_config has quant_method {method!r}; mxfp4 is read, dequantised"
        )
    biased = s.flag("attention_bias", default=True)
    sliding = s.sliding(L, [i % 2 == 0 for i in range(L)])
    window = s.count("sliding_window", 128) if any(sliding) else None
    experts = architecture.Experts(
        s.count("num_local_experts"),
        s.count("num_experts_per_tok", s.get("experts_per_token", 4)),
        router_bias=True,
        fused=True,
    )
    return architecture.Config(
        **fields,
        family="gpt_oss",
        pattern=settings.windows(sliding, window, found),
        rotary_dim=rotary_dim,
        qkv_bias=biased,
        out_bias=biased,
        mlp_bias=True,
        sinks=True,
        activation=architecture.ClampedSwiglu(
            s.number("swiglu_alpha", 1.702), s.number("swiglu_limit", 7.0)
        ),
        experts=experts,
    )


def write(c: architecture.Config) -> dict[str, Any]:
    assert c.experts and isinstance(c.activation, architecture.ClampedSwiglu)
    return (
        settings.write_common(c)
        | rope_settings.write(c)
        | {
            "hidden_act": "silu",
            "attention_bias": c.qkv_bias,
            "layer_types": settings.layer_types(c),
            "sliding_window": settings.window(c),
            "num_local_experts": c.experts.count,
            "num_experts_per_tok": c.experts.top_k,
            "swiglu_alpha": c.activation.alpha,
            "swiglu_limit": c.activation.limit,
        }
    )


_LAYER, _MLP = "model.layers.{layer}.", "model.layers.{layer}.mlp."
WEIGHTS = names.table(
    names.standard(),
    (
        names.Weight(_LAYER + "self_attn.sinks", "layers/attention/sinks", ("N",), "N"),
        names.Weight(_MLP + "router.weight", "layers/router/kernel", ("E", "D"), "DE"),
        names.Weight(_MLP + "router.bias", "layers/router/bias", ("E",), "E"),
        names.Weight(
            _MLP + "experts.gate_up_proj",
            "layers/experts/gate_up/kernel",
            ("E", "D", "FZ"),
            "EDFZ",
        ),
        names.Weight(
            _MLP + "experts.gate_up_proj_bias", "layers/experts/gate_up/bias", ("E", "FZ"), "EFZ"
        ),
        names.Weight(
            _MLP + "experts.down_proj", "layers/experts/down/kernel", ("E", "F", "D"), "EFD"
        ),
        names.Weight(_MLP + "experts.down_proj_bias", "layers/experts/down/bias", ("E", "D"), "ED"),
    ),
)

_ROPE = architecture.Rope(
    150000.0,
    architecture.Yarn(32.0, 4096, 0.1 * 3.4657359027997265 + 1.0, 32.0, 1.0, truncate=False),
)
_20B = architecture.Config(
    vocab_size=201088,
    d_model=2880,
    num_layers=24,
    num_heads=64,
    num_kv_heads=8,
    head_dim=64,
    d_ff=2880,
    max_length=131072,
    family="gpt_oss",
    pattern=(architecture.Layer(_ROPE, 128), architecture.Layer(_ROPE)),
    qkv_bias=True,
    out_bias=True,
    mlp_bias=True,
    sinks=True,
    activation=architecture.ClampedSwiglu(),
    experts=architecture.Experts(32, 4, router_bias=True, fused=True),
)

GPT_OSS = family.Family(
    "gpt_oss",
    "GptOssForCausalLM",
    read,
    write,
    WEIGHTS,
    {
        "gpt-oss-20b": _20B,
        "gpt-oss-120b": dataclasses.replace(
            _20B,
            num_layers=36,
            experts=architecture.Experts(128, 4, router_bias=True, fused=True),
        ),
    },
)
