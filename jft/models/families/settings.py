# SPDX-License-Identifier: Apache-2.0
"""A config.json that is read key by key, and that says in the end which keys nobody has asked for.

A family reads what it implements. Every key that changes the numbers in some family is a switch (`_NEUTRAL`): one that
is set, and that the family at hand has not read, is refused by name.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from jft import errors, json_text
from jft.models import architecture

# Switches, and the values at which they change nothing; null, false and empty lists never do.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "add_cross_attention": (),
    "alibi": (),
    "attention_bias": (),
    "attention_multiplier": (),
    "attn_logit_softcapping": (),
    "attn_qkv_bias": (),
    "clip_qkv": (),
    "embedding_multiplier": (1,),
    "final_logit_softcapping": (),
    "first_k_dense_replace": (0,),
    "global_attn_every_n_layers": (),
    "hidden_activation": (),
    "is_encoder_decoder": (),
    "layer_types": (),
    "logit_scale": (1,),
    "logits_scaling": (1,),
    "lm_head_bias": (),
    "mlp_bias": (),
    "n_shared_experts": (0,),
    "no_rope_layer_interval": (),
    "no_rope_layers": (),
    "num_experts": (0,),
    "num_local_experts": (0,),
    "parallel_attn": (),
    "partial_rotary_factor": (1,),
    "pretraining_tp": (1,),
    "qk_layernorm": (),
    "quantization_config": (),
    "query_pre_attn_scalar": (),
    "residual_multiplier": (1,),
    "rope_interleaved": (),
    "rope_local_base_freq": (),
    "rotary_pct": (1,),
    "rotary_percent": (1,),
    "scale_attn_by_inverse_layer_idx": (),
    "shared_expert_intermediate_size": (0,),
    "sliding_window": (),
    "sliding_window_pattern": (),
    "use_bidirectional_attention": (),
    "use_parallel_residual": (),
    "use_qk_norm": (),
    "use_sliding_window": (),
}
LAYERS = 1000  # something is made for each before a weight is read; published models have up to 126
_LARGEST = 1 << 31  # of any size
_TYPES = ("full_attention", "sliding_attention")
_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}


class Settings:
    """The keys of a config.json; `where` is the file's name, for messages."""

    def __init__(self, values: Mapping[str, Any], where: str):
        self.values, self.where = values, where
        self._read: set[str] = set()

    def get(self, key: str, default: Any = None) -> Any:
        """The value as it is; null is as good as absent."""
        self._read.add(key)
        value = self.values.get(key)
        return default if value is None else value

    def refuse(self, why: str) -> errors.UserError:
        return errors.UserError(f"{self.where}: {why}")

    def need(self, key: str, default: Any = None) -> Any:
        value = self.get(key, default)
        if value is None:
            raise self.refuse(f"{key} is missing")
        return value

    def count(self, key: str, default: int | None = None, most: int = _LARGEST) -> int:
        value = self.need(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise self.refuse(f"{key} is {json_text.shown(repr(value))}, not a positive integer")
        if value > most:
            raise self.refuse(f"{key} is {json_text.shown(value)}, and {most:,} is the most")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self.need(key, default)
        if (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or not 0 < value < math.inf
        ):
            raise self.refuse(f"{key} is {value!r}, not a positive number")
        return float(value)

    def optional(self, key: str) -> float | None:
        """A positive number, or None where it is null or absent."""
        return None if self.get(key) is None else self.number(key)

    def flag(self, key: str, default: bool = False) -> bool:
        value = self.get(key, default)
        if not isinstance(value, bool):
            raise self.refuse(f"{key} is {value!r}, not true or false")
        return value

    def only(self, key: str, *allowed: Any) -> None:
        """Refuses a value that changes the numbers in a way that is not implemented."""
        value = self.get(key)
        if value is not None and value not in allowed:
            wanted = " or ".join(repr(x) for x in allowed) or "null"
            raise self.refuse(f"{key} is {value!r}, which is not implemented (only {wanted} is)")

    def activation(self, key: str = "hidden_act", default: str = "silu") -> str:
        value = self.need(key, default)
        if not isinstance(value, str) or value not in _ACTIVATIONS:
            known = ", ".join(_ACTIVATIONS)
            raise self.refuse(f"{key} is {value!r}, which is not implemented (only {known} are)")
        return _ACTIVATIONS[value]

    def sliding(self, num_layers: int, default: Sequence[bool]) -> list[bool]:
        """Which layers have a window: `layer_types`, or the family's own rule where there are none."""
        kinds = self.get("layer_types")
        if kinds is None:
            return list(default)
        odd = next((kind for kind in kinds if kind not in _TYPES), None)
        if odd is not None:
            raise self.refuse(f"layer_types holds {odd!r}; implemented are {' and '.join(_TYPES)}")
        if len(kinds) != num_layers:
            raise self.refuse(f"layer_types has {len(kinds)} entries for {num_layers} layers")
        return [kind == "sliding_attention" for kind in kinds]

    def done(self) -> None:
        """Refuses a switch that is set and that nothing has read."""
        for key, neutral in _NEUTRAL.items():
            value = self.values.get(key)
            if key in self._read or value in (None, False, [], {}, *neutral):
                continue
            if key == "layer_types" and set(value) == {"full_attention"}:
                continue
            raise self.refuse(f"{key} is {value!r}, which is not implemented for this family")


def common(s: Settings, *, tied: bool = False, eps: float = 1e-6) -> dict[str, Any]:
    """The fields of `Config` whose keys most families share.

    Args:
      s: the file.
      tied: whether the head is the embedding where the file does not say.
      eps: of the norms where the file does not say.
    """
    D, N = s.count("hidden_size"), s.count("num_attention_heads")
    K = s.count("num_key_value_heads", default=N)
    if N % K:
        raise s.refuse(f"num_attention_heads {N} is not a multiple of num_key_value_heads {K}")
    if s.get("head_dim") is None and D % N:
        raise s.refuse(f"hidden_size {D} is not a multiple of num_attention_heads {N}")
    H = s.count("head_dim", default=D // N)
    if H % 2:
        raise s.refuse(f"head_dim {H} is odd, and rotary positions need pairs")
    return {
        "vocab_size": s.count("vocab_size"),
        "d_model": D,
        "num_layers": s.count("num_hidden_layers", most=LAYERS),
        "num_heads": N,
        "num_kv_heads": K,
        "head_dim": H,
        "d_ff": s.count("intermediate_size"),
        "max_length": s.count("max_position_embeddings", default=2048),
        "norm_eps": s.number("rms_norm_eps", default=eps),
        "tie_embeddings": s.flag("tie_word_embeddings", default=tied),
    }


def write_common(c: architecture.Config) -> dict[str, Any]:
    """The inverse of `common`, with the rotary base: transformers 4's spelling, which version 5 reads as well."""
    return {
        "vocab_size": c.vocab_size,
        "hidden_size": c.d_model,
        "intermediate_size": c.d_ff,
        "num_hidden_layers": c.num_layers,
        "num_attention_heads": c.num_heads,
        "num_key_value_heads": c.num_kv_heads,
        "head_dim": c.head_dim,
        "max_position_embeddings": c.max_length,
        "rms_norm_eps": c.norm_eps,
        "tie_word_embeddings": c.tie_embeddings,
    }


def hf_activation(name: str) -> str:
    """transformers' name of an activation."""
    return {"gelu_tanh": "gelu_pytorch_tanh"}.get(name, name)


def pattern(layers: Sequence[architecture.Layer]) -> tuple[architecture.Layer, ...]:
    """The shortest pattern that gives these layers when it is repeated."""
    for period in range(1, len(layers)):
        if all(layer == layers[i % period] for i, layer in enumerate(layers)):
            return tuple(layers[:period])
    return tuple(layers)


def windows(
    sliding: Sequence[bool], window: int | None, rope: architecture.Rope
) -> tuple[architecture.Layer, ...]:
    """The pattern of layers that share one rope, some of them with a window."""
    return pattern([architecture.Layer(rope, window if own else None) for own in sliding])


def layer_types(c: architecture.Config) -> list[str]:
    return [_TYPES[c.layer(i).window is not None] for i in range(c.num_layers)]


def window(c: architecture.Config) -> int | None:
    """That of the layers that have one."""
    return next((layer.window for layer in c.pattern if layer.window is not None), None)
