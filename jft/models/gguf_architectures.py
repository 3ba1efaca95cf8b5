# SPDX-License-Identifier: Apache-2.0
"""llama.cpp's architectures: what each means that its files do not say, and which of our families it stands for.

A GGUF file names its architecture and gives sizes. The rest is code in llama.cpp: which norms there are, which layers
have a window, whether rotary positions turn neighbours or halves. Those facts are here, as data.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jft import errors
from jft.models import architecture


@dataclasses.dataclass(frozen=True)
class Architecture:
    """One value of `general.architecture`.

    Attributes:
      name: in files; also the prefix of its metadata keys.
      families: ours that are written under this name.
      fields: of `Config`, as llama.cpp has them built in.
      paired: rows of queries and keys lie in pairs, for llama.cpp turns neighbours where we turn halves.
      attention_bias: whether the four projections have biases; None where the tensors tell.
      out_bias: False where the output projection has none though the other three do.
      mlp_bias: as `attention_bias`.
      head: True for one of its own, False for the embedding; None where the tensors tell.
      square: llama.cpp takes for granted that the heads together are as wide as the model.
      partial_rotary: less than a whole head may turn.
      rope_tensors: "freqs" or "factors": what divides frequencies one by one, if anything can.
      rotary: False for learned positions.
      window: of the layers that have one, where the file does not say; 0 for none; None where it must say.
      whole_every: every n-th layer sees everything, the others have the window; 0 if none does; None if all do.
      averaged_at: the number of layers at which scores are scaled by (d_model / num_heads) ** -0.5, as in the 27B models;
        elsewhere by head_dim ** -0.5.
      local_theta: rotary base of layers with a window where the file does not say; None for the same as the others'.
      local_scaled: whether their positions are stretched too.
    """

    name: str
    families: tuple[str, ...]
    fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    paired: bool = False
    attention_bias: bool | None = False
    out_bias: bool = True
    mlp_bias: bool | None = False
    head: bool | None = None
    square: bool = False
    partial_rotary: bool = False
    rope_tensors: str | None = None
    rotary: bool = True
    window: int | None = None
    whole_every: int | None = None
    averaged_at: int | None = None
    local_theta: float | None = None
    local_scaled: bool = True


_GEMMA: dict[str, Any] = {"norm": "rms_plus_one", "activation": "gelu_tanh"}
_GEMMA2: dict[str, Any] = _GEMMA | {"norms": "both"}

_ALL = (
    Architecture(
        "llama",
        ("llama", "mistral", "mixtral"),
        paired=True,
        attention_bias=None,
        mlp_bias=None,
        rope_tensors="freqs",
    ),
    # Every fourth layer without rotary positions, whatever config.json said: see gguf_config.
    Architecture("smollm3", ("smollm3",), paired=True),
    Architecture("qwen2", ("qwen2",), attention_bias=True, out_bias=False, square=True),
    Architecture("qwen3", ("qwen3",), {"qk_norm": "head"}),
    Architecture("qwen3moe", ("qwen3_moe",), {"qk_norm": "head"}),
    Architecture("gemma", ("gemma",), _GEMMA, head=False),
    Architecture(
        "gemma2", ("gemma2",), _GEMMA2, head=False, window=4096, whole_every=2, averaged_at=46
    ),
    Architecture(
        "gemma3",
        ("gemma3_text",),
        _GEMMA2 | {"qk_norm": "head"},
        window=0,
        whole_every=6,
        averaged_at=62,
        local_theta=10000.0,
        local_scaled=False,
    ),
    Architecture(
        "phi3",
        ("phi3",),
        {"fused": True},
        square=True,
        partial_rotary=True,
        rope_tensors="factors",
        window=0,
        whole_every=0,
    ),
    Architecture("olmo2", ("olmo2",), {"norms": "post", "qk_norm": "all"}, head=True, square=True),
    Architecture(
        "granite",
        ("granite",),
        paired=True,
        attention_bias=None,
        mlp_bias=None,
        rope_tensors="freqs",
    ),
    Architecture(
        "gpt2",
        ("gpt2",),
        {
            "norm": "layer",
            "fused": True,
            "activation": "gelu_tanh",
            "gated": False,
            "learned_positions": True,
        },
        attention_bias=True,
        mlp_bias=True,
        square=True,
        rotary=False,
    ),
    Architecture(
        "gpt-oss",
        ("gpt_oss",),
        {"sinks": True, "activation": architecture.ClampedSwiglu()},
        attention_bias=True,
        mlp_bias=True,
        head=True,
        whole_every=2,
    ),
)
ARCHITECTURES = {own.name: own for own in _ALL}
_BY_FAMILY = {family: own for own in _ALL for family in own.families}


def of_family(family: str) -> Architecture:
    """That under which a family's models are written."""
    return _BY_FAMILY[family]


def of_file(name: Any, path: Any) -> Architecture:
    """That of a file; raises UserError for one that is not implemented."""
    if not isinstance(name, str) or name not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise errors.UserError(f"{path}: general.architecture is {name!r}; implemented are {known}")
    return ARCHITECTURES[name]
