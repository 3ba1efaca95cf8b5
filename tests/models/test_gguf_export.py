# SPDX-License-Identifier: Apache-2.0
"""Writing GGUF: types of numbers, metadata both ways, and what is refused."""

import dataclasses
import math
import pathlib
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from jft import errors, tree
from jft.models import (
    architecture,
    decoder,
    gguf,
    gguf_export,
    gguf_file,
    gguf_rope,
    gguf_tokenizer,
    rope,
)

package = pytest.importorskip("gguf")

Kind = package.GGMLQuantizationType
Layer, Rope = architecture.Layer, architecture.Rope
Edit = dict[str, Any]


def save(path: pathlib.Path, config: architecture.Config, params: Any, kind: str = "f32") -> Any:
    return gguf_export.save(path, config, params, None, kind)


def stored(path: pathlib.Path) -> dict[str, np.ndarray]:
    """A float32 file's tensors as the package's reader gives them, in numpy's order of axes."""
    return {
        tensor.name: tensor.data.reshape(tensor.shape[::-1].tolist())
        for tensor in package.GGUFReader(path).tensors
    }


def even(**changes: Any) -> architecture.Config:
    """Rows of whole blocks."""
    fields = {
        "vocab_size": 48,
        "d_model": 64,
        "num_layers": 2,
        "num_heads": 2,
        "num_kv_heads": 1,
        "head_dim": 32,
        "d_ff": 96,
        "max_length": 64,
    }
    return architecture.Config(**(fields | changes))


def draw(config: architecture.Config) -> decoder.Params:
    rng = np.random.default_rng(0)
    leaves = tree.flatten(decoder.shapes(config)).items()
    return tree.unflatten({p: rng.standard_normal(x.shape, np.float32) for p, x in leaves})


MIXTURE = {
    "family": "gpt_oss",
    "qkv_bias": True,
    "out_bias": True,
    "mlp_bias": True,
    "sinks": True,
    "activation": architecture.ClampedSwiglu(),
    "experts": architecture.Experts(3, 2, router_bias=True, fused=True),
    "pattern": (Layer(Rope(), 8), Layer(Rope())),
}


@pytest.mark.parametrize("config", [even(), even(**MIXTURE), even(d_ff=80)])
def test_q8_0_is_within_half_a_step(tmp_path: pathlib.Path, config: architecture.Config) -> None:
    params = draw(config)
    report = save(tmp_path / "m.gguf", config, params, "q8_0")
    reader = package.GGUFReader(tmp_path / "m.gguf")
    kinds = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    halved = [n for n, kind in kinds.items() if kind == "F16"]
    assert report.halved == tuple(halved)
    assert halved == ([f"blk.{i}.ffn_down.weight" for i in range(2)] if config.d_ff == 80 else [])
    for name, kind in kinds.items():
        small = any(word in name for word in ("norm", "bias", "gate_inp", "sinks"))
        assert small == (kind == "F32"), name
    save(tmp_path / "exact.gguf", config, params)
    exact = stored(tmp_path / "exact.gguf")
    for tensor in reader.tensors:
        if tensor.tensor_type == Kind.Q8_0:
            blocks = exact[tensor.name].reshape(-1, 32)
            got = package.quants.dequantize(tensor.data, Kind.Q8_0).reshape(-1, 32)
            step = np.abs(blocks).max(1, keepdims=True) / 127
            # Half a step, and 127 times the rounding of the scale to float16, of 2 ** -11.
            assert (np.abs(got - blocks) <= step * (0.5 + 127 * 2**-11) + 1e-7).all(), tensor.name


def test_every_dtype_of_parameters_is_written(tmp_path: pathlib.Path) -> None:
    config = even(tie_embeddings=True)
    params = draw(config)
    for dtype in (ml_dtypes.bfloat16, np.float16, np.float64):
        cast = tree.unflatten({p: x.astype(dtype) for p, x in tree.flatten(params).items()})
        save(tmp_path / "m.gguf", config, cast)
        _, loaded, _ = gguf.load(tmp_path / "m.gguf", "float32")
        for path, leaf in tree.flatten(loaded).items():
            np.testing.assert_array_equal(leaf, tree.flatten(cast)[path].astype(np.float32), path)


@pytest.mark.parametrize(
    ("kind", "value", "said"),
    [
        ("f16", 7e4, "blk.1.ffn_up.weight: holds 70000, too large for f16; write f32"),
        ("q8_0", -9e6, "blk.1.ffn_up.weight: holds 9e+06, too large for q8_0"),
        ("bf16", 3.4e38, "too large for bf16"),
        ("f32", np.nan, "blk.1.ffn_up.weight: has a value that is not finite"),
    ],
)
def test_values_that_do_not_fit_are_refused_by_name(
    tmp_path: pathlib.Path, kind: str, value: float, said: str
) -> None:
    config = even()
    params = draw(config)
    save(tmp_path / "m.gguf", config, params, "q8_0")
    before = (tmp_path / "m.gguf").read_bytes()
    params["layers"]["mlp"]["up"]["kernel"][1, 5, 7] = value
    with pytest.raises(errors.UserError, match="m.gguf: ") as caught:
        save(tmp_path / "m.gguf", config, params, kind)
    assert said in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == ["m.gguf"]
    assert (tmp_path / "m.gguf").read_bytes() == before


def test_other_parameters_and_kinds_are_refused(tmp_path: pathlib.Path) -> None:
    config = even()
    params = draw(config)
    cases = [
        (dataclasses.replace(config, d_ff=32), params, "f16", "mlp/down/kernel is (2, 96, 64)"),
        (
            dataclasses.replace(config, tie_embeddings=True),
            params,
            "f16",
            "head/kernel is (64, 48)",
        ),
        (config, params, "q4_0", "'q4_0' is not one of f32, f16, bf16, q8_0"),
    ]
    for changed, given, kind, said in cases:
        with pytest.raises(errors.UserError) as caught:
            save(tmp_path / "m.gguf", changed, given, kind)
        assert said in str(caught.value)


def test_experts_in_mxfp4_are_read(tmp_path: pathlib.Path) -> None:
    config = even(**MIXTURE)
    save(tmp_path / "m.gguf", config, draw(config))
    exact = stored(tmp_path / "m.gguf")
    quantised = {
        name: package.quants.quantize(tensor, Kind.MXFP4)
        for name, tensor in exact.items()
        if name.endswith("_exps.weight")
    }
    rewrite(tmp_path, quantised=quantised)
    _, loaded, _ = gguf.load(tmp_path / "n.gguf", "float32")
    blocks = {name: package.quants.dequantize(raw, Kind.MXFP4) for name, raw in quantised.items()}
    gate_up = loaded["layers"]["experts"]["gate_up"]["kernel"]
    assert not np.array_equal(
        blocks["blk.0.ffn_gate_exps.weight"], exact["blk.0.ffn_gate_exps.weight"]
    )
    for place, part in enumerate(("gate", "up")):
        expected = blocks[f"blk.1.ffn_{part}_exps.weight"].transpose(0, 2, 1)
        np.testing.assert_array_equal(gate_up[1, ..., place], expected)


# ---- metadata as others write it


def rewrite(
    folder: pathlib.Path,
    edit: Edit | None = None,
    drop: tuple[str, ...] = (),
    quantised: dict[str, np.ndarray] | None = None,
    more: dict[str, np.ndarray] | None = None,
) -> pathlib.Path:
    """m.gguf as n.gguf, with other metadata: lists, numbers and flags; None takes a key away."""
    old = gguf_file.read(folder / "m.gguf")
    arch = old.metadata["general.architecture"]
    writer = package.GGUFWriter(str(folder / "n.gguf"), arch)
    changes = {f"{arch}.{key}": value for key, value in (edit or {}).items()}
    for key, value in (old.metadata | changes).items():
        if key != "general.architecture" and value is not None:
            gguf_export._add(
                writer, key, value.tolist() if isinstance(value, np.ndarray) else value
            )
    for name, tensor in (stored(folder / "m.gguf") | (more or {})).items():
        raw = (quantised or {}).get(name)
        if name not in drop:
            kind = None if raw is None else Kind.MXFP4
            writer.add_tensor(name, tensor if raw is None else raw, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return folder / "n.gguf"


GEMMA: dict[str, Any] = {
    "norm": "rms_plus_one",
    "activation": "gelu_tanh",
    "embedding_scale": 8.0,
    "tie_embeddings": True,
}
GEMMA2 = GEMMA | {
    "family": "gemma2",
    "norms": "both",
    "attention_scale": 32**-0.5,
    "attention_softcap": 50.0,
    "logits_softcap": 30.0,
}
GEMMA3 = GEMMA | {
    "family": "gemma3_text",
    "norms": "both",
    "qk_norm": "head",
    "attention_scale": 32**-0.5,
    "num_layers": 7,
}
GRANITE = {"family": "granite", "attention_scale": 0.1, "logits_divisor": 2.0}
GPT2 = {
    "family": "gpt2",
    "num_kv_heads": 2,
    "norm": "layer",
    "fused": True,
    "qkv_bias": True,
    "out_bias": True,
    "mlp_bias": True,
    "activation": "gelu_tanh",
    "gated": False,
    "learned_positions": True,
    "tie_embeddings": True,
    "pattern": (Layer(None),),
}
FIVE_OF_SIX = (*[Layer(Rope(10000.0), 16)] * 5, Layer(Rope(1e6)))


@pytest.mark.parametrize(
    ("config", "edit", "expected"),
    [
        # What files leave out, llama.cpp has built in.
        (
            even(**GEMMA2, pattern=(Layer(Rope(), 16), Layer())),
            {"attention.sliding_window": None, "attn_logit_softcapping": None},
            {"pattern": (Layer(Rope(), 4096), Layer())},
        ),
        (even(**GEMMA3, pattern=FIVE_OF_SIX), {"rope.freq_base_swa": None}, {}),
        (
            even(**GEMMA3, pattern=FIVE_OF_SIX),
            {"attention.sliding_window": None},
            {"pattern": (Layer(Rope(1e6)),)},
        ),
        (
            even(**GEMMA3, pattern=FIVE_OF_SIX),
            {"attention.sliding_window_pattern": 2, "rope.scaling.factor": 8.0},
            {"pattern": (Layer(Rope(), 16), Layer(Rope(1e6, architecture.Linear(8.0))))},
        ),
        (
            even(**GRANITE),
            {"attention.scale": None, "residual_scale": 0.0},
            {"attention_scale": 32**-0.5, "residual_scale": 1.0},
        ),
        (even(), {"attention.key_length": None, "attention.head_count_kv": [1, 1]}, {}),
        (even(), {"rope.scaling.type": "none", "rope.scaling.factor": 4.0}, {}),
        (even(family="qwen2", qkv_bias=True), {"pooling_type": 0, "vocab_size": None}, {}),
    ],
)
def test_metadata_of_other_writers(
    tmp_path: pathlib.Path, config: architecture.Config, edit: Edit, expected: Edit
) -> None:
    save(tmp_path / "m.gguf", config, draw(config))
    found = gguf.read_config(rewrite(tmp_path, edit))
    assert found == dataclasses.replace(config, **expected)


@pytest.mark.parametrize(
    ("config", "edit", "said"),
    [
        (even(), {"attention.head_count_kv": [1, 2]}, "head_count_kv is [1, 2], not a positive"),
        (even(), {"attention.sliding_window": 8}, "llama.attention.sliding_window is 8: not impl"),
        (even(), {"block_count": 1_000_000}, "block_count is 1000000, and there are 21 tensors"),
        (even(), {"rope.dimension_count": 16}, "rope.dimension_count is 16, heads are of 32"),
        (even(family="qwen3", qk_norm="head"), {"expert_count": 8}, "qwen3.expert_count is 8"),
        (even(**GRANITE), {"rope.scaling.finetuned": False}, "finetuned is False"),
        (even(**GRANITE), {"logit_scale": None}, "granite.logit_scale is missing"),
        (even(**MIXTURE), {"attention.sliding_window": None}, "sliding_window is missing"),
        (even(**MIXTURE), {"expert_used_count": 4}, "4 is more than expert_count 3"),
        (even(**GPT2), {"attention.key_length": 16}, "2 heads of 16 are not embedding_length 64"),
        (
            even(),
            {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0}
            | {"rope.scaling.yarn_attn_factor": 2.0},
            "yarn_attn_factor is 2.0, and a factor of 4.0 gives 1.13863",
        ),
        (even(), {"rope.scaling.type": "longrope"}, "rope.scaling.type is 'longrope'"),
    ],
)
def test_metadata_that_would_change_the_numbers_is_refused(
    tmp_path: pathlib.Path, config: architecture.Config, edit: Edit, said: str
) -> None:
    if edit.get("attention.value_length") is None and "attention.key_length" in edit:
        edit = edit | {"attention.value_length": edit["attention.key_length"]}
    save(tmp_path / "m.gguf", config, draw(config))
    with pytest.raises(errors.UserError) as caught:
        gguf.load(rewrite(tmp_path, edit), "float32")
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_an_embedding_written_twice_is_a_tied_head(tmp_path: pathlib.Path) -> None:
    config = even(**GPT2)
    params = draw(config)
    save(tmp_path / "m.gguf", config, params)
    embedding = params["embed"]["embedding"]
    path = rewrite(tmp_path, more={"output.weight": embedding})
    assert gguf.load(path, "float32")[0] == config
    path = rewrite(tmp_path, more={"output.weight": 2 * embedding})
    found, loaded, _ = gguf.load(path, "float32")
    assert found == dataclasses.replace(config, tie_embeddings=False)
    np.testing.assert_array_equal(loaded["head"]["kernel"], 2 * embedding.T)


# ---- rope


def turned(scaling: architecture.Scaling, **changes: Any) -> architecture.Config:
    return even(**changes, pattern=(Layer(Rope(10000.0, scaling)),))


HEAT = 0.1 * math.log(4.0) + 1.0


@pytest.mark.parametrize(
    "config",
    [
        turned(architecture.Linear(2.5), family="qwen3", qk_norm="head"),
        turned(architecture.Llama3(32.0)),
        turned(architecture.Llama3(8.0, original_max_length=64), head_dim=8),
        turned(architecture.Llama3(4.0, original_max_length=2048), **GRANITE),
        turned(architecture.Yarn(4.0, 16, HEAT), family="qwen2", qkv_bias=True),
        turned(architecture.Yarn(4.0, 16, HEAT, beta_fast=16.0)),
        turned(architecture.Yarn(4.0, 16, 2 * HEAT)),
    ],
)
def test_scalings_come_back(tmp_path: pathlib.Path, config: architecture.Config) -> None:
    report = save(tmp_path / "m.gguf", config, draw(config))
    assert gguf.read_config(tmp_path / "m.gguf") == config
    assert any("beta_fast" in note for note in report.notes) == ("beta_fast=16" in str(config))


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (turned(architecture.Llama3(8.0, high_freq_factor=6.0)), "follows another rule"),
        (
            turned(architecture.Llama3(8.0), family="qwen2", qkv_bias=True),
            "pattern[0].rope.scaling",
        ),
        (turned(architecture.Yarn(4.0, 16, HEAT, truncate=False)), "scaling.truncate False"),
        (turned(architecture.Linear(2.0), rotary_dim=16), "dimension_count is 16"),
        (even(family="olmo2", norms="post", qk_norm="all", tie_embeddings=True), "tie_embeddings"),
        (even(family="smollm3", qkv_bias=True, out_bias=True), "qkv_bias True"),
        (even(family="qwen2", qkv_bias=True, head_dim=16), "are not embedding_length 64"),
        (even(activation="gelu"), "activation 'gelu': llama.cpp takes it for 'silu'"),
        (
            even(**GEMMA2 | {"attention_softcap": None}, pattern=(Layer(Rope(), 8), Layer())),
            "softcap",
        ),
        (even(**GEMMA2), "pattern[0].window None"),
    ],
)
def test_models_that_llama_cpp_would_run_otherwise_are_refused(
    tmp_path: pathlib.Path, config: architecture.Config, said: str
) -> None:
    with pytest.raises(errors.UserError) as caught:
        save(tmp_path / "m.gguf", config, draw(config))
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_divisors_are_what_the_decoder_divides_by() -> None:
    scaling = architecture.Llama3(8.0, original_max_length=512)
    plain = rope.frequencies(Rope(1e4), 64, np.float32)
    scaled = rope.frequencies(Rope(1e4, scaling), 64, np.float32)
    divisors = gguf_rope.llama3_divisors(scaling, 1e4, 64)
    # A quotient of float32 numbers, each rounded a few times.
    np.testing.assert_allclose(plain / scaled, divisors, rtol=1e-5)


@pytest.mark.parametrize("window", [32, 200])
def test_a_window_where_there_is_no_word_for_it_ends_the_context(
    tmp_path: pathlib.Path, window: int
) -> None:
    config = even(family="mistral", pattern=(Layer(Rope(), window),))
    report = save(tmp_path / "m.gguf", config, draw(config))
    found = gguf.read_config(tmp_path / "m.gguf")
    assert (found.family, found.max_length, found.pattern) == ("llama", min(window, 64), (Layer(),))
    assert len(report.notes) == (window < 64)


def test_layers_that_llama_cpp_would_not_guess_are_listed(tmp_path: pathlib.Path) -> None:
    for pattern, listed in (
        ((Layer(Rope(), 8), Layer()), False),
        ((Layer(), Layer(Rope(), 8)), True),
    ):
        config = even(**GEMMA2, pattern=pattern)
        report = save(tmp_path / "m.gguf", config, draw(config))
        assert gguf.read_config(tmp_path / "m.gguf") == config
        metadata = gguf_file.read(tmp_path / "m.gguf").metadata
        assert ("gemma2.attention.sliding_window_pattern" in metadata) == listed
        assert len(report.notes) == listed


def test_a_file_without_a_tokenizer_says_so(tmp_path: pathlib.Path) -> None:
    config = even()
    save(tmp_path / "model-a.gguf", config, draw(config), "q8_0")
    metadata = gguf_file.read(tmp_path / "model-a.gguf").metadata
    general = {key: value for key, value in metadata.items() if not key.startswith("llama.")}
    assert general == {
        "general.architecture": "llama",
        "general.name": "model-a",
        "general.file_type": 7,
        "general.quantization_version": 2,
        "tokenizer.ggml.model": "none",
    }
    with pytest.raises(errors.UserError, match="has no tokenizer"):
        gguf.tokenizer(tmp_path / "model-a.gguf")


def test_a_tokenizer_goes_along(tmp_path: pathlib.Path) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("jft.models.gguf_vocabulary")
    alphabet = sorted(set("abcdefghijklmnopqrstuvwxyzĠĊ0123456789.,!?'"))
    tokens = ["<s>", "</s>", *alphabet, "th", "the", "Ġthe"]
    written = {
        "model": "gpt2",
        "pre": "smollm",
        "tokens": tokens,
        "token_type": np.array([3, 3, *[1] * (len(tokens) - 2)]),
        "merges": ["t h", "th e", "Ġ the"],
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    metadata = {f"tokenizer.ggml.{key}": value for key, value in written.items()}
    tokenizer = gguf_tokenizer.build(metadata, "made here")
    config = even(vocab_size=64)  # more rows than tokens
    gguf_export.save(tmp_path / "m.gguf", config, draw(config), tokenizer, "q8_0")
    found = gguf.tokenizer(tmp_path / "m.gguf")
    text = "the cat, the 12 hats!\nthere</s>"
    assert found(text).input_ids == tokenizer(text).input_ids
    assert found.tokenize("the the") == ["the", "Ġthe"]
    assert gguf.load(tmp_path / "m.gguf", "float32")[0] == config
