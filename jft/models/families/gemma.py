# SPDX-License-Identifier: Apache-2.0
"""Gemma 1, 2 and 3 (text): norms with scales around zero, scaled embeddings, soft caps, windows between whole layers.

Papers: https://arxiv.org/abs/2403.08295, https://arxiv.org/abs/2408.00118, https://arxiv.org/abs/2503.19786.
"""

from typing import Any

from jft import errors
from jft.models import architecture, names
from jft.models.families import family, rope_settings, settings


def _fields(s: settings.Settings, name: str) -> dict[str, Any]:
    fields = settings.common(s, tied=True)
    biased = s.flag("attention_bias")
    s.only("use_bidirectional_attention", False)
    return fields | {
        "family": name,
        "norm": "rms_plus_one",
        "qkv_bias": biased,
        "out_bias": biased,
        "embedding_scale": fields["d_model"] ** 0.5,
    }


def read_gemma(s: settings.Settings) -> architecture.Config:
    fields = _fields(s, "gemma")
    found, rotary_dim = rope_settings.read(s, fields["head_dim"], fields["max_length"])
    # "gelu" in the first releases' files means its tanh approximation, with which the models were trained.
    own = s.get("hidden_activation")
    name = s.activation("hidden_activation") if own else s.activation(default="gelu_pytorch_tanh")
    return architecture.Config(
        **fields,
        pattern=(architecture.Layer(found),),
        rotary_dim=rotary_dim,
        activation="gelu_tanh" if name == "gelu" else name,
    )


def _later(s: settings.Settings, name: str) -> dict[str, Any]:
    scalar = s.number("query_pre_attn_scalar", 256.0)
    s.get("hidden_act")  # hidden_activation is what is used
    return _fields(s, name) | {
        "norms": "both",
        "attention_scale": scalar**-0.5,
        "attention_softcap": s.optional("attn_logit_softcapping"),
        "logits_softcap": s.optional("final_logit_softcapping"),
        "activation": s.activation("hidden_activation", "gelu_pytorch_tanh"),
    }


def read_gemma2(s: settings.Settings) -> architecture.Config:
    fields = _later(s, "gemma2")
    L = fields["num_layers"]
    found, rotary_dim = rope_settings.read(s, fields["head_dim"], fields["max_length"])
    sliding = s.sliding(L, [i % 2 == 0 for i in range(L)])
    window = s.count("sliding_window", 4096)
    return architecture.Config(
        **fields, pattern=settings.windows(sliding, window, found), rotary_dim=rotary_dim
    )


def read_gemma3(s: settings.Settings) -> architecture.Config:
    fields = _later(s, "gemma3_text")
    L, H = fields["num_layers"], fields["head_dim"]
    every = s.count("sliding_window_pattern", s.get("_sliding_window_pattern", 6))
    sliding = s.sliding(L, [bool((i + 1) % every) for i in range(L)])
    window = s.count("sliding_window", 4096)
    whole, local = _ropes(s, H, fields["max_length"])
    layers = [
        architecture.Layer(local, window) if own else architecture.Layer(whole) for own in sliding
    ]
    return architecture.Config(**fields, qk_norm="head", pattern=settings.pattern(layers))


def _ropes(
    s: settings.Settings, head_dim: int, max_length: int
) -> tuple[architecture.Rope, architecture.Rope]:
    """The ropes of whole and of sliding layers; transformers 5 has an object for each."""
    nested = s.get("rope_parameters")
    if isinstance(nested, dict) and ("full_attention" in nested or "sliding_attention" in nested):
        parts = [nested.get(key) or {} for key in ("full_attention", "sliding_attention")]
        files = [settings.Settings({"rope_parameters": part}, s.where) for part in parts]
    else:
        base = s.number("rope_local_base_freq", 10000.0)
        files = [s, settings.Settings({"rope_theta": base}, s.where)]
    found = [
        rope_settings.read(own, head_dim, max_length, theta=theta)
        for own, theta in zip(files, (1000000.0, 10000.0), strict=True)
    ]
    if any(rotary_dim for _, rotary_dim in found):
        raise s.refuse("partial_rotary_factor is not implemented for this family")
    return found[0][0], found[1][0]


def write(c: architecture.Config) -> dict[str, Any]:
    keys = settings.write_common(c) | rope_settings.write(c)
    name = settings.hf_activation(str(c.activation))
    keys |= {"hidden_act": name, "hidden_activation": name, "attention_bias": c.qkv_bias}
    if c.family == "gemma":
        return keys
    scale = c.attention_scale or c.head_dim**-0.5
    keys |= {
        "query_pre_attn_scalar": _whole(scale**-2),
        "attn_logit_softcapping": c.attention_softcap,
        "final_logit_softcapping": c.logits_softcap,
        "sliding_window": settings.window(c),
        "layer_types": settings.layer_types(c),
    }
    if c.family == "gemma3_text":
        local = next((x.rope for x in c.pattern if x.window is not None and x.rope), None)
        if local and local.scaling:
            raise errors.UserError("config.json can't say that Gemma 3's sliding layers are scaled")
        keys["rope_local_base_freq"] = local.theta if local else 10000.0
    return keys


def _whole(number: float) -> float | int:
    """A number that was an integer before a square root."""
    near = round(number)
    return near if abs(number - near) < 1e-9 * near else number


_LAYER = "model.layers.{layer}."
_LATER = names.table(
    names.standard(),
    (
        names.norm(_LAYER + "post_attention_layernorm", "layers/attention_post_norm"),
        names.norm(_LAYER + "pre_feedforward_layernorm", "layers/mlp_norm"),
        names.norm(_LAYER + "post_feedforward_layernorm", "layers/mlp_post_norm"),
        names.norm(_LAYER + "self_attn.q_norm", "layers/attention/query_norm", "H"),
        names.norm(_LAYER + "self_attn.k_norm", "layers/attention/key_norm", "H"),
    ),
)


def _model(D: int, L: int, N: int, K: int, F: int, **rest: Any) -> architecture.Config:
    fields = {
        "vocab_size": 256000,
        "head_dim": 256,
        "max_length": 8192,
        "family": "gemma",
        "norm": "rms_plus_one",
        "norm_eps": 1e-6,
        "activation": "gelu_tanh",
        "embedding_scale": D**0.5,
        "tie_embeddings": True,
    }
    sizes = {"d_model": D, "num_layers": L, "num_heads": N, "num_kv_heads": K, "d_ff": F}
    return architecture.Config(**(fields | sizes | rest))


_TURNED = architecture.Rope()
_GEMMA2: dict[str, Any] = {
    "family": "gemma2",
    "norms": "both",
    "attention_softcap": 50.0,
    "logits_softcap": 30.0,
    "attention_scale": 256.0**-0.5,
    "pattern": (architecture.Layer(_TURNED, 4096), architecture.Layer(_TURNED)),
}


def _gemma3(window: int) -> dict[str, Any]:
    layer = architecture.Layer(_TURNED, window)
    whole = architecture.Layer(architecture.Rope(1000000.0))
    return {
        "vocab_size": 262144,
        "family": "gemma3_text",
        "norms": "both",
        "qk_norm": "head",
        "max_length": 32768,
        "attention_scale": 256.0**-0.5,
        "pattern": (*[layer] * 5, whole),
    }


GEMMA = family.Family(
    "gemma",
    "GemmaForCausalLM",
    read_gemma,
    write,
    names.standard(),
    {
        "gemma-2b": _model(2048, 18, 8, 1, 16384),
        "gemma-7b": _model(3072, 28, 16, 16, 24576),
    },
)
GEMMA2 = family.Family(
    "gemma2",
    "Gemma2ForCausalLM",
    read_gemma2,
    write,
    _LATER,
    {
        "gemma2-2b": _model(2304, 26, 8, 4, 9216, **_GEMMA2),
        "gemma2-9b": _model(3584, 42, 16, 8, 14336, **_GEMMA2),
        "gemma2-27b": _model(
            4608,
            46,
            32,
            16,
            36864,
            **(_GEMMA2 | {"head_dim": 128, "attention_scale": 144.0**-0.5}),
        ),
    },
)
GEMMA3 = family.Family(
    "gemma3_text",
    "Gemma3ForCausalLM",
    read_gemma3,
    write,
    _LATER,
    {
        "gemma3-270m": _model(640, 18, 4, 1, 2048, **_gemma3(512)),
        "gemma3-1b": _model(1152, 26, 4, 1, 6912, **_gemma3(512)),
    },
)
