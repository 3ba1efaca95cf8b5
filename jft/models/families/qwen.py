# SPDX-License-Identifier: Apache-2.0
"""Qwen2 and 2.5 (biases on query, key and value), Qwen3 (norms of queries and keys) and its mixtures of experts."""

import dataclasses
from typing import Any

from jft.models import architecture, names
from jft.models.families import family, rope_settings, settings


def _fields(s: settings.Settings, name: str) -> dict[str, Any]:
    fields = settings.common(s)
    L = fields["num_layers"]
    found, rotary_dim = rope_settings.read(s, fields["head_dim"], fields["max_length"])
    # Files give a width also where use_sliding_window is false, and it is of no effect.
    given = s.get("sliding_window") is not None
    slides = s.flag("use_sliding_window") and given
    window = s.count("sliding_window") if slides else None
    return fields | {
        "family": name,
        "pattern": settings.windows(_sliding(s, L, slides), window, found),
        "rotary_dim": rotary_dim,
        "activation": s.activation(),
    }


def _sliding(s: settings.Settings, num_layers: int, slides: bool) -> list[bool]:
    first = s.get("max_window_layers", 28)
    if type(first) is not int:
        raise s.refuse(f"max_window_layers is {first!r}, not a whole number")
    default = [slides and i >= first for i in range(num_layers)]
    sliding = s.sliding(num_layers, default)
    if any(sliding) and not slides:
        raise s.refuse("layer_types has sliding layers, and use_sliding_window is not set")
    return sliding


def read_qwen2(s: settings.Settings) -> architecture.Config:
    return architecture.Config(**_fields(s, "qwen2"), qkv_bias=True)


def _read_qwen3(s: settings.Settings, name: str) -> architecture.Config:
    biased = s.flag("attention_bias")
    fields = _fields(s, name)
    return architecture.Config(**fields, qk_norm="head", qkv_bias=biased, out_bias=biased)


def read_qwen3(s: settings.Settings) -> architecture.Config:
    if s.get("head_dim") is None:
        raise s.refuse("head_dim is missing")
    return _read_qwen3(s, "qwen3")


def read_qwen3_moe(s: settings.Settings) -> architecture.Config:
    # Layers that differ in shape can't be stacked.
    s.only("decoder_sparse_step", 1)
    s.only("mlp_only_layers", [])
    # Unlike its siblings, this family gives the window to every layer.
    if s.flag("use_sliding_window") and s.get("sliding_window") is not None:
        raise s.refuse("use_sliding_window is true, which is not implemented for this family")
    count = s.count("num_experts", s.get("num_local_experts"))
    experts = architecture.Experts(
        count, s.count("num_experts_per_tok"), normalise=s.flag("norm_topk_prob")
    )
    if experts.top_k > experts.count:
        raise s.refuse(f"num_experts_per_tok {experts.top_k} is more than num_experts {count}")
    dense = _read_qwen3(s, "qwen3_moe")
    return dataclasses.replace(dense, d_ff=s.count("moe_intermediate_size"), experts=experts)


def write(c: architecture.Config) -> dict[str, Any]:
    keys = settings.write_common(c) | rope_settings.write(c)
    window = settings.window(c)
    keys |= {
        "hidden_act": settings.hf_activation(str(c.activation)),
        "use_sliding_window": window is not None,
        "sliding_window": window,
        "layer_types": settings.layer_types(c),
    }
    if c.family != "qwen2":
        keys["attention_bias"] = c.qkv_bias
    if c.experts:
        del keys["layer_types"]
        keys |= {
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "moe_intermediate_size": c.d_ff,
            "norm_topk_prob": c.experts.normalise,
            "num_experts": c.experts.count,
            "num_experts_per_tok": c.experts.top_k,
        }
    return keys


_ATTENTION, _MLP = "model.layers.{layer}.self_attn.", "model.layers.{layer}.mlp."
QWEN3_WEIGHTS = names.table(
    names.standard(),
    (
        names.norm(_ATTENTION + "q_norm", "layers/attention/query_norm", "H"),
        names.norm(_ATTENTION + "k_norm", "layers/attention/key_norm", "H"),
    ),
)
_EXPERT = _MLP + "experts.{expert}."
QWEN3_MOE_WEIGHTS = names.table(
    QWEN3_WEIGHTS,
    (
        names.Weight(_MLP + "gate.weight", "layers/router/kernel", ("E", "D"), "DE"),
        *names.linear(_EXPERT + "gate_proj", "layers/experts/gate", "F", "D"),
        *names.linear(_EXPERT + "up_proj", "layers/experts/up", "F", "D"),
        *names.linear(_EXPERT + "down_proj", "layers/experts/down", "D", "F"),
    ),
)


def _dense(
    family_name: str, D: int, L: int, N: int, K: int, F: int, **rest: Any
) -> architecture.Config:
    fields = {
        "vocab_size": 151936,
        "head_dim": 128,
        "max_length": 32768 if family_name == "qwen2" else 40960,
        "family": family_name,
        "pattern": (architecture.Layer(architecture.Rope(1000000.0)),),
        "norm_eps": 1e-6,
        "qkv_bias": family_name == "qwen2",
        "qk_norm": None if family_name == "qwen2" else "head",
    }
    sizes = {"d_model": D, "num_layers": L, "num_heads": N, "num_kv_heads": K, "d_ff": F}
    return architecture.Config(**(fields | sizes | rest))


_WIDE: dict[str, Any] = {"vocab_size": 152064, "norm_eps": 1e-6}
_TIED: dict[str, Any] = {"tie_embeddings": True}

QWEN2 = family.Family(
    "qwen2",
    "Qwen2ForCausalLM",
    read_qwen2,
    write,
    names.standard(),
    {
        "qwen2.5-0.5b": _dense("qwen2", 896, 24, 14, 2, 4864, head_dim=64, **_TIED),
        "qwen2.5-1.5b": _dense("qwen2", 1536, 28, 12, 2, 8960, **_TIED),
        "qwen2.5-3b": _dense("qwen2", 2048, 36, 16, 2, 11008, **_TIED),
        "qwen2.5-7b": _dense("qwen2", 3584, 28, 28, 4, 18944, **_WIDE),
        "qwen2.5-14b": _dense("qwen2", 5120, 48, 40, 8, 13824, **_WIDE | {"norm_eps": 1e-5}),
        "qwen2.5-32b": _dense("qwen2", 5120, 64, 40, 8, 27648, **_WIDE | {"norm_eps": 1e-5}),
        "qwen2.5-72b": _dense("qwen2", 8192, 80, 64, 8, 29568, **_WIDE),
    },
)
QWEN3 = family.Family(
    "qwen3",
    "Qwen3ForCausalLM",
    read_qwen3,
    write,
    QWEN3_WEIGHTS,
    {
        "qwen3-0.6b": _dense("qwen3", 1024, 28, 16, 8, 3072, **_TIED),
        "qwen3-1.7b": _dense("qwen3", 2048, 28, 16, 8, 6144, **_TIED),
        "qwen3-4b": _dense("qwen3", 2560, 36, 32, 8, 9728, **_TIED),
        "qwen3-8b": _dense("qwen3", 4096, 36, 32, 8, 12288),
        "qwen3-14b": _dense("qwen3", 5120, 40, 40, 8, 17408),
        "qwen3-32b": _dense("qwen3", 5120, 64, 64, 8, 25600),
    },
)
QWEN3_MOE = family.Family(
    "qwen3_moe",
    "Qwen3MoeForCausalLM",
    read_qwen3_moe,
    write,
    QWEN3_MOE_WEIGHTS,
    {
        "qwen3-30b-a3b": _dense(
            "qwen3_moe", 2048, 48, 32, 4, 768, experts=architecture.Experts(128, 8)
        ),
        "qwen3-235b-a22b": _dense(
            "qwen3_moe", 4096, 94, 64, 4, 1536, experts=architecture.Experts(128, 8)
        ),
    },
)
