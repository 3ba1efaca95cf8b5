# SPDX-License-Identifier: Apache-2.0
"""SmolLM3: a Llama of which every fourth layer has no rotary positions (https://arxiv.org/abs/2501.18795)."""

import dataclasses
from typing import Any

from jft.models import architecture
from jft.models.families import family, llama, rope_settings, settings


def read(s: settings.Settings) -> architecture.Config:
    fields = settings.common(s, tied=True)
    L = fields["num_layers"]
    found, rotary_dim = rope_settings.read(
        s, fields["head_dim"], fields["max_length"], theta=2000000.0
    )
    interval = s.count("no_rope_layer_interval", 4)
    turned = s.get("no_rope_layers", [int((i + 1) % interval != 0) for i in range(L)])
    if not isinstance(turned, list) or len(turned) != L or set(turned) - {0, 1}:
        raise s.refuse(f"no_rope_layers is not a list of {L} zeros and ones")
    given = s.get("sliding_window") is not None  # without use_sliding_window of no effect
    slides = s.flag("use_sliding_window") and given
    sliding = s.sliding(L, [slides and not own for own in turned])
    window = s.count("sliding_window") if slides else None
    layers = [
        architecture.Layer(found if own else None, window if slides and short else None)
        for own, short in zip(turned, sliding, strict=True)
    ]
    s.get("pretraining_tp")  # in the published file, and of no effect in this family
    biased = s.flag("attention_bias")
    return architecture.Config(
        **fields,
        family="smollm3",
        pattern=settings.pattern(layers),
        rotary_dim=rotary_dim,
        activation=s.activation(),
        qkv_bias=biased,
        out_bias=biased,
        mlp_bias=s.flag("mlp_bias"),
    )


def write(c: architecture.Config) -> dict[str, Any]:
    turned = [int(c.layer(i).rope is not None) for i in range(c.num_layers)]
    return llama.write(c) | {
        "no_rope_layers": turned,
        "use_sliding_window": settings.window(c) is not None,
        "sliding_window": settings.window(c),
        "layer_types": settings.layer_types(c),
    }


_TURNED = architecture.Layer(architecture.Rope(5000000.0))
PRESETS = {
    "smollm3-3b": architecture.Config(
        vocab_size=128256,
        d_model=2048,
        num_layers=36,
        num_heads=16,
        num_kv_heads=4,
        head_dim=128,
        d_ff=11008,
        max_length=65536,
        family="smollm3",
        pattern=(_TURNED, _TURNED, _TURNED, dataclasses.replace(_TURNED, rope=None)),
        norm_eps=1e-6,
        tie_embeddings=True,
    ),
}

SMOLLM3 = family.Family("smollm3", "SmolLM3ForCausalLM", read, write, llama.WEIGHTS, PRESETS)
