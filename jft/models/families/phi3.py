# SPDX-License-Identifier: Apache-2.0
"""Phi-3 and Phi-4: fused projections; some with LongRoPE, some turning only a part of each head."""

from typing import Any

from jft.models import architecture, names, rope
from jft.models.families import family, rope_settings, settings


def read(s: settings.Settings) -> architecture.Config:
    fields = settings.common(s, eps=1e-5)
    found, rotary_dim = rope_settings.read(s, fields["head_dim"], fields["max_length"])
    if isinstance(found.scaling, architecture.Linear | architecture.Llama3 | architecture.Yarn):
        raise s.refuse("rope_scaling of this family is longrope or none")
    window = None if s.get("sliding_window") is None else s.count("sliding_window")
    return architecture.Config(
        **fields,
        family="phi3",
        pattern=(architecture.Layer(found, window),),
        rotary_dim=rotary_dim,
        fused=True,
        activation=s.activation(),
    )


def write(c: architecture.Config) -> dict[str, Any]:
    keys = settings.write_common(c) | rope_settings.write(c)
    del keys["head_dim"]  # transformers' class has none: it is hidden_size / num_attention_heads
    scaling = keys["rope_scaling"]
    if scaling:
        # transformers 4 wants these keys alone, so the attention factor goes in only where it is not the usual one.
        original = scaling.pop("original_max_position_embeddings")
        keys["original_max_position_embeddings"] = original
        usual = rope.longrope_attention_factor(c.max_length / original, original)
        if scaling["attention_factor"] == usual:
            del scaling["attention_factor"]
        scaling["type"] = scaling.pop("rope_type")
    return keys | {
        "hidden_act": settings.hf_activation(str(c.activation)),
        "sliding_window": settings.window(c),
    }


_LAYER = "model.layers.{layer}."
WEIGHTS = names.table(
    names.standard(),
    (
        *names.linear(_LAYER + "self_attn.qkv_proj", "layers/attention/qkv", "XH", "D"),
        *names.linear(_LAYER + "mlp.gate_up_proj", "layers/mlp/gate_up", "ZF", "D"),
    ),
)

PHI3 = family.Family(
    "phi3",
    "Phi3ForCausalLM",
    read,
    write,
    WEIGHTS,
    {
        "phi3-mini-4k": architecture.Config(
            vocab_size=32064,
            d_model=3072,
            num_layers=32,
            num_heads=32,
            num_kv_heads=32,
            head_dim=96,
            d_ff=8192,
            max_length=4096,
            family="phi3",
            pattern=(architecture.Layer(architecture.Rope(10000.0), 2047),),
            fused=True,
        ),
        "phi4": architecture.Config(
            vocab_size=100352,
            d_model=5120,
            num_layers=40,
            num_heads=40,
            num_kv_heads=10,
            head_dim=128,
            d_ff=17920,
            max_length=16384,
            family="phi3",
            pattern=(architecture.Layer(architecture.Rope(250000.0)),),
            fused=True,
        ),
    },
)
