# SPDX-License-Identifier: Apache-2.0
"""The models of tests/goldens/families: a configuration each, small and with every setting in force.

Windows are shorter than the rows, rotary bases small enough that every kind of frequency turns within
them, and caps and limits low enough to bite. `make_family_goldens.py` makes them.
"""

from __future__ import annotations

import dataclasses
from typing import Any

VOCABULARY, PAD = 24, 0


@dataclasses.dataclass(frozen=True)
class Case:
    """One model: its configuration, and changes of config.json each of which must change the logits."""

    config: str
    keys: dict[str, Any]
    switches: tuple[dict[str, Any], ...] = ()
    short_batch: bool = False  # also a batch whose rows are at most 12 tokens long
    gradients: str = ""  # regular expression over the names in the safetensors file


COMMON = {
    "vocab_size": VOCABULARY,
    "num_hidden_layers": 3,
    "max_position_embeddings": 128,
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# Grouped heads with head_dim * heads != hidden; for families that know only head_dim = hidden/heads.
GROUPED = {
    "hidden_size": 16,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 12,
}
SQUARE = {
    "hidden_size": 16,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 12,
}
GEMMA = GROUPED | {"hidden_size": 20}  # sqrt(20) is irrational: rounding of this factor shows
EXPERTS = {"num_experts_per_tok": 2, "intermediate_size": 8}
QWEN_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
DEFAULT_ROPE = {"rope_theta": 100.0, "rope_type": "default"}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 100.0,  # wavelengths 6.3 (kept), 20 (between), 63 and 199 (divided by the factor)
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 100.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN_EXACT = YARN | {"factor": 2.0, "beta_fast": 4.0, "beta_slow": 1.0, "truncate": False}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 100.0,
    "partial_rotary_factor": 0.75,
    "original_max_position_embeddings": 12,
    "short_factor": [1.1, 1.4, 1.9],
    "long_factor": [1.5, 3.0, 4.5],
}
GEMMA3_ROPE = {
    "full_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1000.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
}
FULL = {"layer_types": ["full_attention"] * 3}
GRADIENTS = (  # of the first layer and the last; k and v of the last depend on all that q and o do
    r"layers\.0\.(self_attn|input_layernorm)|layers\.2\.(self_attn\.[kv]|post_attention_layernorm)"
    r"|embed_tokens|model\.norm"
)
GRANITE = {
    "embedding_multiplier": 1.7,
    "attention_multiplier": 0.45,
    "residual_multiplier": 0.6,
    "logits_scaling": 1.3,
}


def each(keys: dict[str, Any], value: Any) -> tuple[dict[str, Any], ...]:
    return tuple({key: value} for key in keys)


CASES = {
    "llama": Case(
        "LlamaConfig",
        GROUPED | {"rope_parameters": LLAMA3},
        (
            {"rope_parameters": DEFAULT_ROPE},
            {"rope_parameters": LLAMA3 | {"low_freq_factor": 1.5}},
            {"rope_parameters": LLAMA3 | {"high_freq_factor": 6.0}},
            {"rms_norm_eps": 1e-3},
        ),
    ),
    "llama_bias": Case(
        "LlamaConfig",
        SQUARE
        | {"rope_parameters": DEFAULT_ROPE | {"rope_type": "linear", "factor": 2.5}}
        | {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
        ({"rope_parameters": DEFAULT_ROPE}, {"attention_bias": False}, {"mlp_bias": False}),
    ),
    "smollm3": Case(
        "SmolLM3Config",
        SQUARE | {"no_rope_layer_interval": 2, "rope_parameters": DEFAULT_ROPE},
        ({"no_rope_layers": [1, 1, 1]}, {"no_rope_layers": [0, 0, 1]}),
    ),
    "mistral": Case(
        "MistralConfig",
        SQUARE | {"sliding_window": 6, "rope_parameters": DEFAULT_ROPE},
        ({"sliding_window": None}, {"sliding_window": 5}, {"sliding_window": 7}),
    ),
    "mixtral": Case(
        "MixtralConfig",
        GROUPED | EXPERTS | {"num_local_experts": 4, "rope_parameters": DEFAULT_ROPE},
        ({"num_experts_per_tok": 1},),
    ),
    "qwen2": Case(
        "Qwen2Config",
        SQUARE | {"tie_word_embeddings": True, "rope_parameters": DEFAULT_ROPE},
        ({"rope_parameters": DEFAULT_ROPE | {"rope_theta": 1e4}},),
    ),
    "qwen2_window": Case(
        "Qwen2Config",
        SQUARE
        | {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}
        | {"rope_parameters": YARN, "max_position_embeddings": 256},
        (
            FULL,
            {"layer_types": ["sliding_attention"] * 3},
            {"rope_parameters": DEFAULT_ROPE},
            {"rope_parameters": YARN | {"attention_factor": 1.0}},
            {"rope_parameters": YARN | {"truncate": False}},
        ),
    ),
    "qwen3": Case(
        "Qwen3Config",
        GROUPED | {"rope_parameters": DEFAULT_ROPE},
        ({"rope_parameters": DEFAULT_ROPE | {"rope_theta": 1e4}}, {"rms_norm_eps": 1e-3}),
    ),
    "qwen3_moe": Case(
        "Qwen3MoeConfig",
        GROUPED | QWEN_EXPERTS | {"norm_topk_prob": True, "rope_parameters": DEFAULT_ROPE},
        ({"norm_topk_prob": False}, {"num_experts_per_tok": 1}),
        gradients=GRADIENTS + r"|lm_head|layers\.[02]\.mlp\.(gate|experts\.1)\.",
    ),
    "qwen3_moe_raw": Case(
        "Qwen3MoeConfig",
        GROUPED | QWEN_EXPERTS | {"norm_topk_prob": False, "rope_parameters": DEFAULT_ROPE},
        ({"norm_topk_prob": True}, {"num_experts_per_tok": 1}),
    ),
    "gemma": Case(
        "GemmaConfig",
        GEMMA | {"rope_parameters": DEFAULT_ROPE},
        ({"hidden_act": "silu"},),
    ),
    "gemma2": Case(
        "Gemma2Config",
        GEMMA
        | {"sliding_window": 6, "query_pre_attn_scalar": 5, "rope_parameters": DEFAULT_ROPE}
        | {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
        (
            FULL,
            {"layer_types": ["full_attention", "sliding_attention", "full_attention"]},
            {"sliding_window": 7},
            {"attn_logit_softcapping": None},
            {"final_logit_softcapping": None},
            {"query_pre_attn_scalar": 8},
            {"hidden_activation": "silu"},
        ),
    ),
    "gemma3": Case(
        "Gemma3TextConfig",
        GEMMA
        | {"sliding_window": 6, "sliding_window_pattern": 2, "query_pre_attn_scalar": 5}
        | {"rope_parameters": GEMMA3_ROPE},
        (
            FULL,
            {"sliding_window": 7},
            {"query_pre_attn_scalar": 8},
            {"rope_parameters": dict.fromkeys(GEMMA3_ROPE, GEMMA3_ROPE["full_attention"])},
            {"rope_parameters": dict.fromkeys(GEMMA3_ROPE, GEMMA3_ROPE["sliding_attention"])},
            {
                "rope_parameters": {
                    kind: {"rope_type": "default", "rope_theta": rope["rope_theta"]}
                    for kind, rope in GEMMA3_ROPE.items()
                }
            },
        ),
        gradients=GRADIENTS + r"|layers\.0\.mlp\.|layers\.[02]\.\w+_feedforward",
    ),
    "phi3": Case(
        "Phi3Config",
        SQUARE | {"sliding_window": 6, "rope_parameters": DEFAULT_ROPE},
        ({"sliding_window": None}, {"sliding_window": 7}),
    ),
    "phi3_longrope": Case(
        "Phi3Config",
        SQUARE | {"rope_parameters": LONGROPE, "original_max_position_embeddings": 12},
        (
            {"rope_parameters": LONGROPE | {"long_factor": LONGROPE["short_factor"]}},
            {"rope_parameters": LONGROPE | {"short_factor": LONGROPE["long_factor"]}},
            {"rope_parameters": LONGROPE | {"attention_factor": 1.0}},
            {"rope_parameters": DEFAULT_ROPE | {"partial_rotary_factor": 0.75}},
        ),
        short_batch=True,
    ),
    "olmo2": Case(
        "Olmo2Config",
        SQUARE | {"rope_parameters": DEFAULT_ROPE},
        ({"rope_parameters": DEFAULT_ROPE | {"rope_theta": 1e4}}, {"rms_norm_eps": 1e-3}),
    ),
    "granite": Case(
        "GraniteConfig",
        SQUARE | {"num_key_value_heads": 2, "rope_parameters": DEFAULT_ROPE} | GRANITE,
        each(GRANITE, 1.0),
    ),
    "gpt2": Case(
        "GPT2Config",
        {"n_embd": 16, "n_head": 2, "n_inner": 12, "max_position_embeddings": 32},
        ({"activation_function": "gelu"}, {"layer_norm_epsilon": 1e-3}),
    ),
    "gpt_oss": Case(
        "GptOssConfig",
        GROUPED
        | EXPERTS
        | {"num_local_experts": 4, "sliding_window": 6, "swiglu_limit": 1.5}
        | {"rope_parameters": YARN_EXACT},
        (
            FULL,
            {"sliding_window": 7},
            {"swiglu_limit": 7.0},
            {"swiglu_alpha": 1.0},
            {"num_experts_per_tok": 1},
            {"rope_parameters": YARN_EXACT | {"truncate": True}},
            {"rope_parameters": YARN_EXACT | {"attention_factor": 1.0}},
            {"attention_bias": False},
        ),
    ),
}
