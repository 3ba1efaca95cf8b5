# SPDX-License-Identifier: Apache-2.0
"""A GGUF file's metadata as our configuration.

A key of the architecture that is not read here is refused, for it may change what the model computes.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np

from jft.models import architecture, gguf_architectures, gguf_file, gguf_keys, gguf_rope
from jft.models.families import settings

# Keys that are not read for every architecture, and the values at which they change nothing (None: any).
_NEUTRAL: dict[str, tuple[Any, ...] | None] = {
    "attention.causal": (True,),
    "expert_count": (0,),
    "expert_gating_func": (0, 1),  # softmax
    "expert_used_count": (0,),
    "feed_forward_length": None,  # that of no layer, where experts have their own
    "pooling_type": (0,),
    "rope.dimension_count": None,
    "rope.scaling.attn_factor": (1.0,),
    "rope.scaling.finetuned": None,
    "tensor_data_layout": None,
    "use_parallel_residual": (False,),
}
_NO_ROPE_EVERY = 4  # SmolLM3's layers without rotary positions: llama.cpp has the number built in
_WHOLE = architecture.Layer(None)


def read(file: gguf_file.File) -> architecture.Config:
    """The configuration of a file.

    Raises:
      errors.UserError: another architecture, or metadata that is missing, malformed or asks for what the decoder lacks.
    """
    own = gguf_architectures.of_file(file.metadata.get("general.architecture"), file.path)
    keys = gguf_keys.Keys(file, own.name)
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None:
        raise keys.refuse("token_embd.weight is missing")
    fields: dict[str, Any] = _sizes(keys, own) | dict(own.fields) | _biases(file, own)
    fields["vocab_size"] = keys.count("vocab_size", embedding.shape[0])
    fields["tie_embeddings"] = not _has_head(file, own)
    fields |= _experts(keys, own) | _scales(keys, own, fields)
    fields |= _layers(keys, own, fields)
    if own.name == "granite":  # llama.cpp's switch of rotary positions for this architecture
        keys.only("rope.scaling.finetuned", (True,))
    keys.done(_NEUTRAL)
    return architecture.Config(**fields)


def _sizes(keys: gguf_keys.Keys, own: gguf_architectures.Architecture) -> dict[str, Any]:
    D, N = keys.count("embedding_length"), keys.count("attention.head_count")
    K = keys.count("attention.head_count_kv", N)
    H = keys.count("attention.key_length", max(D // N, 1))
    if N % K:
        raise keys.refuse(f"{N} heads are not a multiple of {K} key/value heads")
    if keys.count("attention.value_length", H) != H:
        value = keys.get("attention.value_length")
        raise keys.refuse(
            f"{own.name}.attention.value_length is {value}, that of keys is {H}: not implemented"
        )
    if own.square and N * H != D:
        raise keys.refuse(f"{N} heads of {H} are not embedding_length {D}, as {own.name} needs")
    L = keys.count("block_count")
    if L > len(keys.file.tensors):  # before anything is made for each of them
        raise keys.refuse(
            f"{own.name}.block_count is {L}, and there are {len(keys.file.tensors)} tensors"
        )
    eps = "layer_norm_epsilon" if own.fields.get("norm") == "layer" else "layer_norm_rms_epsilon"
    return {
        "d_model": D,
        "num_layers": L,
        "num_heads": N,
        "num_kv_heads": K,
        "head_dim": H,
        "max_length": keys.count("context_length"),
        "norm_eps": keys.number(f"attention.{eps}"),
    }


def _biases(file: gguf_file.File, own: gguf_architectures.Architecture) -> dict[str, bool]:
    attention = own.attention_bias
    if attention is None:
        attention = "blk.0.attn_q.bias" in file.tensors
    mlp = "blk.0.ffn_up.bias" in file.tensors if own.mlp_bias is None else own.mlp_bias
    return {"qkv_bias": attention, "out_bias": attention and own.out_bias, "mlp_bias": mlp}


def _has_head(file: gguf_file.File, own: gguf_architectures.Architecture) -> bool:
    if own.head is not None:
        return own.head
    return "output.weight" in file.tensors and not repeats_embedding(file)


def repeats_embedding(file: gguf_file.File) -> bool:
    """Whether a GPT-2's head is its embedding once more: converters of the first years wrote it so."""
    head, embedding = (file.tensors.get(f"{name}.weight") for name in ("output", "token_embd"))
    if file.metadata["general.architecture"] != "gpt2" or head is None or embedding is None:
        return False
    same = (head.kind, head.shape) == (embedding.kind, embedding.shape)
    return same and np.array_equal(head.raw, embedding.raw)


def _experts(keys: gguf_keys.Keys, own: gguf_architectures.Architecture) -> dict[str, Any]:
    """The family and the inner size, with experts if there are any."""
    apart = own.name in ("qwen3moe", "gpt-oss")
    if not apart and not (own.name == "llama" and keys.get("expert_count")):
        return {"family": own.families[0], "d_ff": keys.count("feed_forward_length")}
    count, top_k = keys.count("expert_count"), keys.count("expert_used_count")
    if top_k > count:
        raise keys.refuse(f"{own.name}.expert_used_count {top_k} is more than expert_count {count}")
    oss = own.name == "gpt-oss"
    return {
        "family": own.families[0] if apart else "mixtral",
        "d_ff": keys.count("expert_feed_forward_length" if apart else "feed_forward_length"),
        # All three normalise the chosen experts' weights; gpt-oss by a softmax over those alone, which is the same.
        "experts": architecture.Experts(count, top_k, router_bias=oss, fused=oss),
    }


def _scales(
    keys: gguf_keys.Keys, own: gguf_architectures.Architecture, fields: dict[str, Any]
) -> dict[str, Any]:
    D, N, H = fields["d_model"], fields["num_heads"], fields["head_dim"]
    found: dict[str, Any] = {}
    if own.name.startswith("gemma"):
        found["embedding_scale"] = D**0.5
    if own.averaged_at:
        width = D // N if fields["num_layers"] == own.averaged_at else H
        found["attention_scale"] = width**-0.5
    if own.name in ("gemma2", "gemma3"):
        found["logits_softcap"] = keys.scale("final_logit_softcapping")
    if own.name == "gemma2":  # llama.cpp caps always, with these numbers unless the file has others
        found["attention_softcap"] = keys.number("attn_logit_softcapping", 50.0)
        found["logits_softcap"] = keys.number("final_logit_softcapping", 30.0)
    if own.name == "granite":
        found["attention_scale"] = keys.scale("attention.scale") or H**-0.5
        found["embedding_scale"] = keys.scale("embedding_scale") or 1.0
        found["residual_scale"] = keys.scale("residual_scale") or 1.0
        found["logits_divisor"] = keys.number("logit_scale")
    return found


def _layers(
    keys: gguf_keys.Keys, own: gguf_architectures.Architecture, fields: dict[str, Any]
) -> dict[str, Any]:
    """The pattern of layers, and how many dimensions turn."""
    if not own.rotary:
        return {"pattern": (_WHOLE,)}
    L, H = fields["num_layers"], fields["head_dim"]
    dim = keys.count("rope.dimension_count", H)
    if dim > H or dim % 2 or (dim != H and not own.partial_rotary):
        raise keys.refuse(
            f"{own.name}.rope.dimension_count is {dim}, heads are of {H}: not implemented"
        )
    rope = gguf_rope.read(keys, own, dim, fields["max_length"])
    if own.name == "smollm3":
        turning = [(i + 1) % _NO_ROPE_EVERY != 0 for i in range(L)]
        layers = [architecture.Layer(rope) if turns else _WHOLE for turns in turning]
    else:
        layers = list(_windows(keys, own, rope, L))
    return {"pattern": settings.pattern(layers), "rotary_dim": None if dim == H else dim}


def _windows(
    keys: gguf_keys.Keys,
    own: gguf_architectures.Architecture,
    rope: architecture.Rope,
    num_layers: int,
) -> Iterator[architecture.Layer]:
    every = own.whole_every
    window = 0 if every is None else keys.count("attention.sliding_window", own.window, least=0)
    if not window:
        if every is not None:
            keys.get("attention.sliding_window_pattern")
            keys.get("rope.freq_base_swa")
        yield from [architecture.Layer(rope)] * num_layers
        return
    pattern = keys.get("attention.sliding_window_pattern", every)
    if isinstance(pattern, int) and not isinstance(pattern, bool) and pattern >= 0:
        pattern = [pattern == 0 or (i + 1) % pattern != 0 for i in range(num_layers)]
    flags = isinstance(pattern, list) and all(slides in (0, 1) for slides in pattern)
    if not flags or len(pattern) != num_layers:
        raise keys.refuse(
            f"{own.name}.attention.sliding_window_pattern is {gguf_keys.shown(pattern)}, "
            f"neither a number nor {num_layers} flags"
        )
    theta = keys.number("rope.freq_base_swa", own.local_theta or rope.theta)
    local = architecture.Rope(theta, rope.scaling if own.local_scaled else None)
    for slides in pattern:
        yield architecture.Layer(local, window) if slides else architecture.Layer(rope)
