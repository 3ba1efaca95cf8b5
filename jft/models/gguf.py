# SPDX-License-Identifier: Apache-2.0
"""Loads a Llama from a .gguf file: configuration, weights (dequantised) and tokenizer in one.

What llama.cpp's converter changed is undone: the rows of query and key projections lie in pairs for
its interleaved rotary positions, and Llama 3.1's scaling is a tensor of factors. A metadata key of
the architecture that is not known here is refused, for it may change what the model computes.
"""

import pathlib
from typing import Any

import numpy as np

from jft import errors
from jft.models import (
    architecture,
    decoder,
    families,
    fingerprint,
    gguf_file,
    gguf_tokenizer,
    hf,
)

_LAYER = "model.layers.{layer}."
_NAMES: dict[str, str] = {
    "model.embed_tokens.weight": "token_embd.weight",
    _LAYER + "input_layernorm.weight": "blk.{layer}.attn_norm.weight",
    _LAYER + "self_attn.q_proj.weight": "blk.{layer}.attn_q.weight",
    _LAYER + "self_attn.k_proj.weight": "blk.{layer}.attn_k.weight",
    _LAYER + "self_attn.v_proj.weight": "blk.{layer}.attn_v.weight",
    _LAYER + "self_attn.o_proj.weight": "blk.{layer}.attn_output.weight",
    _LAYER + "post_attention_layernorm.weight": "blk.{layer}.ffn_norm.weight",
    _LAYER + "mlp.gate_proj.weight": "blk.{layer}.ffn_gate.weight",
    _LAYER + "mlp.up_proj.weight": "blk.{layer}.ffn_up.weight",
    _LAYER + "mlp.down_proj.weight": "blk.{layer}.ffn_down.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_ROPE_FACTORS = "rope_freqs.weight"
_ROTATED = ("layers/attention/query/kernel", "layers/attention/key/kernel")

# Keys below `llama.` that are read here, or that change nothing (None: any value).
_KNOWN: dict[str, tuple[Any, ...] | None] = {
    "context_length": None,
    "embedding_length": None,
    "block_count": None,
    "feed_forward_length": None,
    "vocab_size": None,
    "attention.head_count": None,
    "attention.head_count_kv": None,
    "attention.key_length": None,
    "attention.value_length": None,
    "attention.layer_norm_rms_epsilon": None,
    "attention.causal": (True,),
    "rope.dimension_count": None,
    "rope.freq_base": None,
    "rope.scale_linear": None,
    "rope.scaling.type": None,
    "rope.scaling.factor": None,
    "rope.scaling.original_context_length": None,
    "rope.scaling.finetuned": None,
    "tensor_data_layout": None,
    "use_parallel_residual": (False,),
    "expert_count": (0,),
    "expert_used_count": (0,),
}


def load(path: str | pathlib.Path, dtype: Any) -> tuple[architecture.Config, decoder.Params, str]:
    """A model from its file; as `hf.load`.

    Args:
      path: the .gguf file; any block type that the `gguf` package can dequantise.
      dtype: of the parameters, such as "float32".

    Returns:
      The configuration, the parameters as a nested dict of numpy arrays, and the fingerprint of
      the tensors as stored.

    Raises:
      errors.UserError: damaged, another architecture, or tensors that are not the expected ones.
    """
    file = gguf_file.read(path)
    config = _config(file)
    stored = _match(config, file)
    rows = families.tensors(config)

    def fetch(name: str) -> np.ndarray:
        values = _dequantise(stored[name], file.path)
        rotated = rows[name][0].path in _ROTATED
        return _halves(values, config.head_dim) if rotated else values

    params = hf.assemble(
        config, dtype, fetch, where=lambda name: f"{file.path}: {stored[name].name}"
    )
    raw = {name: (str(tensor.kind), tensor.shape, tensor.raw) for name, tensor in stored.items()}
    return config, params, fingerprint.compute(raw)


def read_config(path: str | pathlib.Path) -> architecture.Config:
    """The configuration alone."""
    return _config(gguf_file.read(path))


def tokenizer(path: str | pathlib.Path) -> Any:
    """The file's tokenizer, as transformers' PreTrainedTokenizerFast."""
    file = gguf_file.read(path)
    return gguf_tokenizer.build(file.metadata, str(path))


def _config(file: gguf_file.File) -> architecture.Config:
    found = file.metadata.get("general.architecture")
    if found != "llama":
        raise errors.UserError(
            f"{file.path}: general.architecture is {found!r}; implemented is 'llama'"
        )
    meta = {
        key.removeprefix("llama."): value
        for key, value in file.metadata.items()
        if key.startswith("llama.")
    }
    for key, value in meta.items():
        allowed = _KNOWN.get(key, ())
        if allowed is not None and value not in allowed:
            raise errors.UserError(f"{file.path}: llama.{key} is {_shown(value)}: not implemented")
    D, N = _count(meta, "embedding_length", file), _count(meta, "attention.head_count", file)
    K = _count(meta, "attention.head_count_kv", file, default=N)
    H = _count(meta, "attention.key_length", file, default=D // N)
    theta = _shortest(meta.get("rope.freq_base", 10000.0))
    for key in ("attention.value_length", "rope.dimension_count"):
        if meta.get(key, H) != H:
            raise errors.UserError(
                f"{file.path}: llama.{key} is {meta[key]}, heads are of {H}: not implemented"
            )
    if N % K:
        raise errors.UserError(f"{file.path}: {N} heads are not a multiple of {K} key/value heads")
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None:
        raise errors.UserError(f"{file.path}: token_embd.weight is missing")
    return architecture.Config(
        vocab_size=_count(meta, "vocab_size", file, default=embedding.shape[0]),
        d_model=D,
        num_layers=_count(meta, "block_count", file),
        num_heads=N,
        num_kv_heads=K,
        head_dim=H,
        d_ff=_count(meta, "feed_forward_length", file),
        max_length=_count(meta, "context_length", file),
        pattern=(
            architecture.Layer(architecture.Rope(theta, _rope_scaling(meta, file, theta, H))),
        ),
        norm_eps=_shortest(_required(meta, "attention.layer_norm_rms_epsilon", file)),
        tie_embeddings="output.weight" not in file.tensors,
    )


def _required(meta: dict[str, Any], key: str, file: gguf_file.File) -> Any:
    if key not in meta:
        raise errors.UserError(f"{file.path}: llama.{key} is missing")
    return meta[key]


def _count(meta: dict[str, Any], key: str, file: gguf_file.File, default: int | None = None) -> int:
    value = _required(meta, key, file) if default is None else meta.get(key, default)
    # A list gives one number per layer: layers that differ can't be stacked.
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise errors.UserError(
            f"{file.path}: llama.{key} is {_shown(value)}, not a positive integer"
        )
    return value


def _shown(value: Any) -> str:
    """A value on one line, a long list cut."""
    return " ".join(repr(value).split())[:80]


def _shortest(value: float) -> float:
    """A float32 of the file as the decimal it was written from: 1e-05, not 9.99999974e-06."""
    return float(str(np.float32(value)))


def _rope_scaling(
    meta: dict[str, Any], file: gguf_file.File, theta: float, head_dim: int
) -> architecture.Scaling | None:
    factor = meta.get("rope.scaling.factor", meta.get("rope.scale_linear", 0.0)) or 1.0
    kind = meta.get("rope.scaling.type", "linear")  # llama.cpp's default where a factor stands
    if kind not in ("none", "linear"):
        raise errors.UserError(f"{file.path}: llama.rope.scaling.type is {kind!r}: not implemented")
    linear = kind == "linear" and factor != 1.0
    if _ROPE_FACTORS not in file.tensors:
        return architecture.Linear(_shortest(factor)) if linear else None
    if linear:
        raise errors.UserError(f"{file.path}: has {_ROPE_FACTORS} and linear scaling as well")
    return _llama3_scaling(
        _dequantise(file.tensors[_ROPE_FACTORS], file.path), theta, head_dim, file
    )


def _llama3_scaling(
    factors: np.ndarray, theta: float, head_dim: int, file: gguf_file.File
) -> architecture.Scaling | None:
    """The rule behind a file's divisors of the frequencies: llama.cpp stores only those."""
    if np.all(factors == 1.0):
        return None
    scaling = architecture.Llama3(float(factors.max()))
    frequencies = theta ** -(np.arange(0, head_dim, 2) / head_dim)
    turns = scaling.original_max_length * frequencies / (2 * np.pi)  # within the first context
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    smooth = np.clip((turns - low) / (high - low), 0.0, 1.0)
    expected = 1.0 / ((1.0 - smooth) / scaling.factor + smooth)
    # The converter computes in float32; another rule would differ by far more.
    if factors.shape != expected.shape or not np.allclose(factors, expected, rtol=1e-4):
        raise errors.UserError(
            f"{file.path}: {_ROPE_FACTORS} follows another rule than Llama 3.1's (factors 1 and 4 "
            f"of {scaling.original_max_length}): not implemented"
        )
    return scaling


def _match(config: architecture.Config, file: gguf_file.File) -> dict[str, gguf_file.Tensor]:
    """Each expected tensor, by its Hugging Face name; nothing missing, misshapen or left over."""
    found: dict[str, gguf_file.Tensor] = {}
    for name, (weight, index) in families.tensors(config).items():
        own = _NAMES[weight.name].format(layer=index[0] if index else None)
        if own not in file.tensors:
            raise errors.UserError(f"{file.path}: {own} is missing")
        tensor, shape = file.tensors[own], weight.stored_shape(config)
        if tensor.shape != shape:
            raise errors.UserError(
                f"{file.path}: {own} has shape {tensor.shape}, the metadata says {shape}"
            )
        found[name] = tensor
    used = {tensor.name for tensor in found.values()} | {_ROPE_FACTORS}
    extra = sorted(set(file.tensors) - used)
    if extra:
        raise errors.UserError(
            f"{file.path}: {extra[0]} is no tensor of this architecture ({len(extra)} such)"
        )
    return found


def _dequantise(tensor: gguf_file.Tensor, path: pathlib.Path) -> np.ndarray:
    import gguf

    kind = gguf.GGMLQuantizationType(tensor.kind)
    rows = tensor.raw.reshape(*tensor.shape[:-1], -1)
    try:
        return gguf.quants.dequantize(rows, kind)
    except NotImplementedError as error:
        raise errors.UserError(
            f"{path}: {tensor.name} is stored as {kind.name}, which `gguf` can't dequantise"
        ) from error


def _halves(rows: np.ndarray, head_dim: int) -> np.ndarray:
    """Rows of each head from pairs (0, H/2, 1, H/2 + 1, ...) back to halves (0, 1, ..., H - 1)."""
    heads = rows.reshape(-1, head_dim // 2, 2, rows.shape[-1])
    return heads.swapaxes(1, 2).reshape(rows.shape)
