# SPDX-License-Identifier: Apache-2.0
"""OLMo 2 (https://arxiv.org/abs/2501.00656): norms after attention and MLP, and over all heads of queries and keys."""

from typing import Any

from jft.models import architecture, names
from jft.models.families import family, rope_settings, settings


def read(s: settings.Settings) -> architecture.Config:
    fields = settings.common(s, eps=1e-5)
    found, rotary_dim = rope_settings.read(s, fields["head_dim"], fields["max_length"])
    biased = s.flag("attention_bias")
    return architecture.Config(
        **fields,
        family="olmo2",
        pattern=(architecture.Layer(found),),
        rotary_dim=rotary_dim,
        norms="post",
        qk_norm="all",
        activation=s.activation(),
        qkv_bias=biased,
        out_bias=biased,
    )


def write(c: architecture.Config) -> dict[str, Any]:
    keys = settings.write_common(c) | rope_settings.write(c)
    name = settings.hf_activation(str(c.activation))
    return keys | {"hidden_act": name, "attention_bias": c.qkv_bias}


_LAYER = "model.layers.{layer}."
WEIGHTS = names.table(
    names.standard(),
    (
        names.norm(_LAYER + "post_attention_layernorm", "layers/attention_post_norm"),
        names.norm(_LAYER + "post_feedforward_layernorm", "layers/mlp_post_norm"),
        names.norm(_LAYER + "self_attn.q_norm", "layers/attention/query_norm", "NH"),
        names.norm(_LAYER + "self_attn.k_norm", "layers/attention/key_norm", "KH"),
    ),
)


def _model(D: int, L: int, N: int, F: int) -> architecture.Config:
    return architecture.Config(
        vocab_size=100352,
        d_model=D,
        num_layers=L,
        num_heads=N,
        num_kv_heads=N,
        head_dim=128,
        d_ff=F,
        max_length=4096,
        family="olmo2",
        pattern=(architecture.Layer(architecture.Rope(500000.0)),),
        norm_eps=1e-6,
        norms="post",
        qk_norm="all",
    )


OLMO2 = family.Family(
    "olmo2",
    "Olmo2ForCausalLM",
    read,
    write,
    WEIGHTS,
    {
        "olmo2-1b": _model(2048, 16, 16, 8192),
        "olmo2-7b": _model(4096, 32, 32, 11008),
        "olmo2-13b": _model(5120, 40, 40, 13824),
    },
)
