# SPDX-License-Identifier: Apache-2.0
"""The Llama family: what its config.json means, its presets and the one table of tensor names.

The table `WEIGHTS` is the only place that knows how a Hugging Face tensor lies in our parameters.
Loading, export and adapter files all go through it, so that they cannot disagree. A Hugging Face
kernel is [out, in]; ours has the inputs first and the heads apart, so that a contraction is an
einsum in the letters of `decoder`.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from jft import errors
from jft.models import decoder

ARCHITECTURE = "LlamaForCausalLM"


@dataclasses.dataclass(frozen=True)
class Weight:
    """One row of the name table: where a Hugging Face tensor goes, and how it is turned.

    Attributes:
      name: the tensor's name in a checkpoint, with `{layer}` where it is per layer.
      path: our parameter, in which per-layer tensors are stacked on a leading axis L.
      stored: the checkpoint's axes as letters; "NH" is one axis of size N * H, head-major.
      axes: our axes, the leading L aside.
    """

    name: str
    path: str
    stored: tuple[str, ...]
    axes: str

    @property
    def per_layer(self) -> bool:
        return "{layer}" in self.name

    @property
    def module(self) -> str:
        """The name of the torch module that owns the tensor, still with `{layer}`."""
        return self.name.removesuffix(".weight")

    def stored_shape(self, config: decoder.Config) -> tuple[int, ...]:
        """The shape in a checkpoint."""
        sizes = _sizes(config)
        return tuple(math.prod(sizes[letter] for letter in group) for group in self.stored)

    def shape(self, config: decoder.Config) -> tuple[int, ...]:
        """Our shape of one layer's tensor, the leading L aside."""
        sizes = _sizes(config)
        return tuple(sizes[letter] for letter in self.axes)

    def from_hf(self, tensor: np.ndarray, config: decoder.Config) -> np.ndarray:
        """One checkpoint tensor as a view in our layout."""
        letters, sizes = "".join(self.stored), _sizes(config)
        apart = tensor.reshape([sizes[letter] for letter in letters])
        return apart.transpose([letters.index(letter) for letter in self.axes])

    def to_hf(self, array: np.ndarray, config: decoder.Config) -> np.ndarray:
        """The inverse of `from_hf`, for one layer's array."""
        order = [self.axes.index(letter) for letter in "".join(self.stored)]
        return array.transpose(order).reshape(self.stored_shape(config))


def _sizes(c: decoder.Config) -> dict[str, int]:
    heads = {"N": c.num_heads, "K": c.num_kv_heads, "H": c.head_dim}
    return heads | {"V": c.vocab_size, "D": c.d_model, "F": c.d_ff}


_LAYER = "model.layers.{layer}."
WEIGHTS: tuple[Weight, ...] = (
    Weight("model.embed_tokens.weight", "embed/embedding", ("V", "D"), "VD"),
    Weight(_LAYER + "input_layernorm.weight", "layers/attention_norm/scale", ("D",), "D"),
    Weight(_LAYER + "self_attn.q_proj.weight", "layers/attention/query/kernel", ("NH", "D"), "DNH"),
    Weight(_LAYER + "self_attn.k_proj.weight", "layers/attention/key/kernel", ("KH", "D"), "DKH"),
    Weight(_LAYER + "self_attn.v_proj.weight", "layers/attention/value/kernel", ("KH", "D"), "DKH"),
    Weight(_LAYER + "self_attn.o_proj.weight", "layers/attention/out/kernel", ("D", "NH"), "NHD"),
    Weight(_LAYER + "post_attention_layernorm.weight", "layers/mlp_norm/scale", ("D",), "D"),
    Weight(_LAYER + "mlp.gate_proj.weight", "layers/mlp/gate/kernel", ("F", "D"), "DF"),
    Weight(_LAYER + "mlp.up_proj.weight", "layers/mlp/up/kernel", ("F", "D"), "DF"),
    Weight(_LAYER + "mlp.down_proj.weight", "layers/mlp/down/kernel", ("D", "F"), "FD"),
    Weight("model.norm.weight", "final_norm/scale", ("D",), "D"),
    Weight("lm_head.weight", "head/kernel", ("V", "D"), "DV"),
)


def weights(config: decoder.Config) -> tuple[Weight, ...]:
    """The rows that a model with this configuration has: a tied one has no head of its own."""
    return tuple(w for w in WEIGHTS if not (config.tie_embeddings and w.path == "head/kernel"))


def tensors(config: decoder.Config) -> dict[str, tuple[Weight, int | None]]:
    """Every tensor of a checkpoint by its name: its row and its layer (None outside the stack)."""
    found: dict[str, tuple[Weight, int | None]] = {}
    for weight in weights(config):
        for layer in range(config.num_layers) if weight.per_layer else (None,):
            found[weight.name.format(layer=layer)] = (weight, layer)
    return found


def modules(config: decoder.Config) -> dict[str, tuple[Weight, int | None]]:
    """Every torch module that an adapter can name: its row and its layer.

    The names are as PEFT's, `model.layers.3.self_attn.q_proj`. Norms are left out: they have a
    scale, not a kernel. The head is there also when it is tied, so that an adapter on it can be
    refused by name.
    """
    untied = dataclasses.replace(config, tie_embeddings=False)
    rows = tensors(untied).items()
    return {name.removesuffix(".weight"): row for name, row in rows if len(row[0].stored) == 2}


# Keys that change the numbers and that the decoder has one answer to: another value is refused.
_ONLY: dict[str, tuple[Any, ...]] = {
    "model_type": ("llama",),
    "hidden_act": ("silu", "swish"),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "pretraining_tp": (1,),
    "quantization_config": (),
    "sliding_window": (),
    "use_sliding_window": (False,),
    "partial_rotary_factor": (1,),
    "rope_interleaved": (False,),
}


def from_hf(config: Mapping[str, Any], where: str = "config.json") -> decoder.Config:
    """Reads a Llama's config.json, of transformers 4 or 5.

    Args:
      config: the parsed file.
      where: the file's name, for messages.

    Returns:
      The decoder's configuration.

    Raises:
      errors.UserError: a key is missing, malformed or asks for what the decoder lacks.
    """
    _refuse_unsupported(config, where)
    D, N = _count(config, "hidden_size", where), _count(config, "num_attention_heads", where)
    K = _count(config, "num_key_value_heads", where, default=N)
    if N % K:
        raise errors.UserError(
            f"{where}: num_attention_heads {N} is not a multiple of num_key_value_heads {K}"
        )
    if config.get("head_dim") is None and D % N:
        raise errors.UserError(
            f"{where}: hidden_size {D} is not a multiple of num_attention_heads {N}"
        )
    H = _count(config, "head_dim", where, default=D // N)
    if H % 2:
        raise errors.UserError(f"{where}: head_dim {H} is odd, and rotary positions need pairs")
    max_length = _count(config, "max_position_embeddings", where, default=2048)
    theta, scaling = _rope(config, max_length, where)
    return decoder.Config(
        vocab_size=_count(config, "vocab_size", where),
        d_model=D,
        num_layers=_count(config, "num_hidden_layers", where),
        num_heads=N,
        num_kv_heads=K,
        head_dim=H,
        d_ff=_count(config, "intermediate_size", where),
        max_length=max_length,
        rope_theta=theta,
        rope_scaling=scaling,
        norm_eps=_number(config, "rms_norm_eps", where, default=1e-6),
        tie_embeddings=_flag(config, "tie_word_embeddings", where),
    )


def to_hf(config: decoder.Config) -> dict[str, Any]:
    """The inverse of `from_hf`, in transformers 4's spelling, which version 5 reads as well."""
    return {
        "architectures": [ARCHITECTURE],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "intermediate_size": config.d_ff,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_length,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": _rope_scaling_to_hf(config.rope_scaling),
        "tie_word_embeddings": config.tie_embeddings,
        "attention_bias": False,
        "mlp_bias": False,
    }


def _refuse_unsupported(config: Mapping[str, Any], where: str) -> None:
    named = config.get("architectures")
    if named is not None and named != [ARCHITECTURE]:
        raise errors.UserError(
            f"{where}: architectures is {named!r}; implemented is [{ARCHITECTURE!r}]"
        )
    if named is None and "model_type" not in config:
        raise errors.UserError(
            f"{where}: neither architectures nor model_type says what the model is"
        )
    for key, allowed in _ONLY.items():
        value = config.get(key)
        if value is not None and value not in allowed:
            wanted = " or ".join(repr(x) for x in allowed) or "null"
            raise errors.UserError(
                f"{where}: {key} is {value!r}, which is not implemented (only {wanted} is)"
            )
    odd = sorted(set(config.get("layer_types") or ()) - {"full_attention"})
    if odd:
        raise errors.UserError(
            f"{where}: layer_types holds {odd[0]!r}; only 'full_attention' is implemented"
        )


def _rope(
    config: Mapping[str, Any], max_length: int, where: str
) -> tuple[float, decoder.RopeScaling | None]:
    """transformers 4 has rope_theta and rope_scaling, version 5 one rope_parameters for both."""
    old, new = config.get("rope_scaling"), config.get("rope_parameters")
    if old and new and old != new:
        raise errors.UserError(
            f"{where}: rope_scaling {old!r} and rope_parameters {new!r} disagree; remove one"
        )
    key, rope = ("rope_scaling", old) if old else ("rope_parameters", new or {})
    if not isinstance(rope, Mapping):
        raise errors.UserError(f"{where}: {key} is {rope!r}, not an object")
    theta = _number(rope if "rope_theta" in rope else config, "rope_theta", where, default=10000.0)
    where = f"{where}: {key}"
    if rope.get("partial_rotary_factor") not in (None, 1):
        value = rope["partial_rotary_factor"]
        raise errors.UserError(
            f"{where}: partial_rotary_factor is {value!r}, which is not implemented (only 1 is)"
        )
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default":
        return theta, None
    if kind == "linear":
        return theta, decoder.RopeScaling("linear", _number(rope, "factor", where))
    if kind != "llama3":
        raise errors.UserError(
            f"{where}: rope_type is {kind!r}; implemented are default, linear and llama3"
        )
    scaling = decoder.RopeScaling(
        "llama3",
        factor=_number(rope, "factor", where),
        low_freq_factor=_number(rope, "low_freq_factor", where),
        high_freq_factor=_number(rope, "high_freq_factor", where),
        original_max_length=_count(rope, "original_max_position_embeddings", where, max_length),
    )
    return theta, scaling


def _rope_scaling_to_hf(scaling: decoder.RopeScaling | None) -> dict[str, Any] | None:
    if scaling is None:
        return None
    if scaling.kind == "linear":
        return {"rope_type": "linear", "factor": scaling.factor}
    return {
        "rope_type": "llama3",
        "factor": scaling.factor,
        "low_freq_factor": scaling.low_freq_factor,
        "high_freq_factor": scaling.high_freq_factor,
        "original_max_position_embeddings": scaling.original_max_length,
    }


def _count(config: Mapping[str, Any], key: str, where: str, default: int | None = None) -> int:
    value = default if config.get(key) is None else config[key]
    if value is None:
        raise errors.UserError(f"{where}: {key} is missing")
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise errors.UserError(f"{where}: {key} is {value!r}, not a positive integer")
    return value


def _number(config: Mapping[str, Any], key: str, where: str, default: float | None = None) -> float:
    value = default if config.get(key) is None else config[key]
    if value is None:
        raise errors.UserError(f"{where}: {key} is missing")
    if isinstance(value, bool) or not (isinstance(value, int | float) and 0 < value < math.inf):
        raise errors.UserError(f"{where}: {key} is {value!r}, not a positive number")
    return float(value)


def _flag(config: Mapping[str, Any], key: str, where: str) -> bool:
    value = config.get(key)
    if value is not None and not isinstance(value, bool):
        raise errors.UserError(f"{where}: {key} is {value!r}, not true or false")
    return bool(value)


_SMOLLM2 = decoder.Config(
    vocab_size=49152,
    d_model=576,
    num_layers=30,
    num_heads=9,
    num_kv_heads=3,
    head_dim=64,
    d_ff=1536,
    max_length=8192,
    rope_theta=100000.0,
    tie_embeddings=True,
)
_LLAMA31 = decoder.Config(
    vocab_size=128256,
    d_model=4096,
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    d_ff=14336,
    max_length=131072,
    rope_theta=500000.0,
    rope_scaling=decoder.RopeScaling("llama3", factor=8.0),
)
_LLAMA32 = dataclasses.replace(
    _LLAMA31,
    rope_scaling=decoder.RopeScaling("llama3", factor=32.0),
    d_ff=8192,
    tie_embeddings=True,
)

PRESETS: dict[str, decoder.Config] = {
    "smollm2-135m": _SMOLLM2,
    "smollm2-360m": dataclasses.replace(
        _SMOLLM2, d_model=960, num_layers=32, num_heads=15, num_kv_heads=5, d_ff=2560
    ),
    "smollm2-1.7b": dataclasses.replace(
        _SMOLLM2,
        d_model=2048,
        num_layers=24,
        num_heads=32,
        num_kv_heads=32,
        d_ff=8192,
        rope_theta=130000.0,
    ),
    "llama3.2-1b": dataclasses.replace(_LLAMA32, d_model=2048, num_layers=16, head_dim=64),
    "llama3.2-3b": dataclasses.replace(_LLAMA32, d_model=3072, num_layers=28, num_heads=24),
    "llama3.1-8b": _LLAMA31,
    "llama3.1-70b": dataclasses.replace(
        _LLAMA31, d_model=8192, num_layers=80, num_heads=64, d_ff=28672
    ),
}
