# SPDX-License-Identifier: Apache-2.0
"""GPT-2: learned positions, LayerNorm, an MLP without a gate, and kernels that lie [in, out] in files (Conv1D)."""

import dataclasses
from typing import Any

from jft.models import architecture, names
from jft.models.families import family, settings


def read(s: settings.Settings) -> architecture.Config:
    D, N = s.count("n_embd"), s.count("n_head")
    if D % N:
        raise s.refuse(f"n_embd {D} is not a multiple of n_head {N}")
    s.only("scale_attn_weights", True)
    # Changes the precision of bfloat16 training, not the function.
    s.only("reorder_and_upcast_attn", False)
    return architecture.Config(
        vocab_size=s.count("vocab_size"),
        d_model=D,
        num_layers=s.count("n_layer", most=settings.LAYERS),
        num_heads=N,
        num_kv_heads=N,
        head_dim=D // N,
        d_ff=s.count("n_inner", 4 * D),
        max_length=s.count("n_positions", s.get("n_ctx", 1024)),
        family="gpt2",
        pattern=(architecture.Layer(None),),
        norm="layer",
        norm_eps=s.number("layer_norm_epsilon", 1e-5),
        fused=True,
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        activation=s.activation("activation_function", "gelu_new"),
        gated=False,
        learned_positions=True,
        tie_embeddings=s.flag("tie_word_embeddings", default=True),
    )


def write(c: architecture.Config) -> dict[str, Any]:
    name = str(c.activation)
    return {
        "vocab_size": c.vocab_size,
        "n_embd": c.d_model,
        "n_layer": c.num_layers,
        "n_head": c.num_heads,
        "n_inner": c.d_ff,
        "n_positions": c.max_length,
        "layer_norm_epsilon": c.norm_eps,
        "activation_function": "gelu_new" if name == "gelu_tanh" else name,
        "tie_word_embeddings": c.tie_embeddings,
    }


_LAYER = "transformer.h.{layer}."


def _conv(name: str, path: str, inputs: str, outputs: str) -> tuple[names.Weight, names.Weight]:
    return (
        names.Weight(f"{name}.weight", f"{path}/kernel", (inputs, outputs), inputs + outputs),
        names.Weight(f"{name}.bias", f"{path}/bias", (outputs,), outputs),
    )


def _norm(name: str, path: str) -> tuple[names.Weight, names.Weight]:
    return (
        names.norm(name, path),
        names.Weight(f"{name}.bias", f"{path}/bias", ("D",), "D"),
    )


WEIGHTS = (
    names.Weight("transformer.wte.weight", "embed/embedding", ("V", "D"), "VD"),
    names.Weight("transformer.wpe.weight", "positions/embedding", ("P", "D"), "PD"),
    *_norm(_LAYER + "ln_1", "layers/attention_norm"),
    *_conv(_LAYER + "attn.c_attn", "layers/attention/qkv", "D", "XH"),
    *_conv(_LAYER + "attn.c_proj", "layers/attention/out", "NH", "D"),
    *_norm(_LAYER + "ln_2", "layers/mlp_norm"),
    *_conv(_LAYER + "mlp.c_fc", "layers/mlp/up", "D", "F"),
    *_conv(_LAYER + "mlp.c_proj", "layers/mlp/down", "F", "D"),
    *_norm("transformer.ln_f", "final_norm"),
    names.Weight("lm_head.weight", "head/kernel", ("V", "D"), "DV"),
)

_SMALL = architecture.Config(
    vocab_size=50257,
    d_model=768,
    num_layers=12,
    num_heads=12,
    num_kv_heads=12,
    head_dim=64,
    d_ff=3072,
    max_length=1024,
    family="gpt2",
    pattern=(architecture.Layer(None),),
    norm="layer",
    fused=True,
    qkv_bias=True,
    out_bias=True,
    mlp_bias=True,
    activation="gelu_tanh",
    gated=False,
    learned_positions=True,
    tie_embeddings=True,
)


def _sized(D: int, L: int, N: int) -> architecture.Config:
    return dataclasses.replace(
        _SMALL, d_model=D, num_layers=L, num_heads=N, num_kv_heads=N, d_ff=4 * D
    )


GPT2 = family.Family(
    "gpt2",
    "GPT2LMHeadModel",
    read,
    write,
    WEIGHTS,
    {
        "gpt2": _SMALL,
        "gpt2-medium": _sized(1024, 24, 16),
        "gpt2-large": _sized(1280, 36, 20),
        "gpt2-xl": _sized(1600, 48, 25),
    },
)
