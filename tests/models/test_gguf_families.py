# SPDX-License-Identifier: Apache-2.0
"""GGUF for every family: written and read back bit for bit, named and laid out as llama.cpp's converter does it."""

import dataclasses
import math
import pathlib
import re
from typing import Any

import numpy as np
import pytest

from jft import errors, tree
from jft.models import (
    architecture,
    decoder,
    families,
    gguf,
    gguf_export,
    hf,
)

package = pytest.importorskip("gguf")

GOLDENS = pathlib.Path(__file__).parents[1] / "goldens" / "families"

# The families' models and the architecture that each is written as.
CASES = {
    "llama": "llama",
    "llama_bias": "llama",
    "smollm3": "smollm3",
    "mistral": "llama",
    "mixtral": "llama",
    "qwen2": "qwen2",
    "qwen2_window": "qwen2",
    "qwen3": "qwen3",
    "qwen3_moe": "qwen3moe",
    "gemma": "gemma",
    "gemma2": "gemma2",
    "gemma3": "gemma3",
    "phi3": "phi3",
    "phi3_longrope": "phi3",
    "olmo2": "olmo2",
    "granite": "granite",
    "gpt2": "gpt2",
    "gpt_oss": "gpt-oss",
}
# Architectures of llama.cpp's LLAMA_ROPE_TYPE_NORM, whose converter classes inherit the permutation.
FUSED = ("phi3", "phi3_longrope", "gpt2")
PAIRED = ("llama", "smollm3", "granite")
# What no file can say: the field as these models have it, and how it is told.
INEXPRESSIBLE = {
    "gemma2": "attention_scale 0.447",
    "gemma3": "attention_scale 0.447",
    "gpt_oss": "activation.limit 1.5: llama.cpp takes it for 7.0",
    "qwen3_moe_raw": "experts.normalise False: llama.cpp takes it for True",
    "smollm3": "pattern[1].rope None",
}


def golden(case: str) -> tuple[architecture.Config, decoder.Params]:
    folder = GOLDENS / case
    config, params, _ = hf.load(folder, "float32")
    return config, params


def expressible(case: str) -> tuple[architecture.Config, decoder.Params]:
    """A golden model, with what llama.cpp has built in where the golden's differs."""
    config, params = golden(case)
    if case in ("gemma2", "gemma3"):
        config = dataclasses.replace(config, attention_scale=config.head_dim**-0.5)
    if case == "gpt_oss":
        config = dataclasses.replace(config, activation=architecture.ClampedSwiglu())
    if (
        case == "smollm3"
    ):  # three layers, of which the fourth would be the first without rotary positions
        config = dataclasses.replace(config, pattern=(config.pattern[0],))
    return config, params


def as_read(case: str, config: architecture.Config) -> architecture.Config:
    """What a file can't carry: Mistral's name, and windows where llama.cpp's architecture has none."""
    if case not in ("mistral", "qwen2_window"):
        return config
    layer = dataclasses.replace(config.pattern[0], window=None)
    family = {"mistral": "llama", "qwen2_window": "qwen2"}[case]
    return dataclasses.replace(config, family=family, pattern=(layer,), max_length=6)


def save(path: pathlib.Path, config: architecture.Config, params: Any, kind: str = "f32") -> Any:
    return gguf_export.save(path, config, params, None, kind)


def stored(path: pathlib.Path) -> dict[str, np.ndarray]:
    """A float32 file's tensors as the package's reader gives them, in numpy's order of axes."""
    return {
        tensor.name: tensor.data.reshape(tensor.shape[::-1].tolist())
        for tensor in package.GGUFReader(path).tensors
    }


def same(got: Any, expected: Any, config: architecture.Config) -> None:
    got, expected = tree.flatten(got), tree.flatten(expected)
    assert got.keys() == expected.keys()
    for path, leaf in got.items():
        # Gemma's scales are stored plus one, in float32: half a unit in the last place of numbers below 2 is 2 ** -24.
        shifted = config.norm == "rms_plus_one" and path.endswith("scale")
        tolerance = 2.0**-24 if shifted else 0.0
        np.testing.assert_allclose(leaf, expected[path], rtol=0, atol=tolerance, err_msg=path)


@pytest.mark.parametrize("case", CASES)
def test_written_and_read_back_it_is_the_same_model(tmp_path: pathlib.Path, case: str) -> None:
    config, params = expressible(case)
    save(tmp_path / "m.gguf", config, params)
    found, loaded, _ = gguf.load(tmp_path / "m.gguf", "float32")
    expected = as_read(case, config)
    if case == "phi3_longrope":  # its attention factor, no short decimal, is rounded to float32
        scaling, wanted = found.pattern[0].rope.scaling, config.pattern[0].rope.scaling
        assert math.isclose(scaling.attention_factor, wanted.attention_factor, rel_tol=2**-24)
        rope = dataclasses.replace(found.pattern[0].rope, scaling=wanted)
        found = dataclasses.replace(found, pattern=(architecture.Layer(rope),))
    assert found == expected
    same(loaded, params, config)


@pytest.mark.parametrize("case", CASES)
def test_bfloat16_is_exact_for_bfloat16_values(tmp_path: pathlib.Path, case: str) -> None:
    config, params = expressible(case)
    report = save(tmp_path / "m.gguf", config, params, "bf16")
    assert report.kinds["bf16"] > 0
    _, loaded, _ = gguf.load(tmp_path / "m.gguf", "float32")
    same(loaded, params, config)


@pytest.mark.parametrize("case", ["mixtral", "gemma3", "phi3", "gpt2", "gpt_oss"])
def test_float16_holds_what_float16_can(tmp_path: pathlib.Path, case: str) -> None:
    config, params = expressible(case)
    save(tmp_path / "m.gguf", config, params, "f16")
    _, loaded, _ = gguf.load(tmp_path / "m.gguf", "float32")
    exact = r"norm|bias|router|positions|sinks"
    for path, leaf in tree.flatten(params).items():
        kept = any(word in path for word in exact.split("|"))
        expected = leaf if kept else leaf.astype(np.float16).astype(np.float32)
        np.testing.assert_allclose(tree.flatten(loaded)[path], expected, rtol=0, atol=2.0**-24)


@pytest.mark.parametrize("case", INEXPRESSIBLE)
def test_what_a_file_cant_say_is_refused_by_name(tmp_path: pathlib.Path, case: str) -> None:
    config, params = golden(case)
    with pytest.raises(errors.UserError) as caught:
        save(tmp_path / "m.gguf", config, params)
    assert INEXPRESSIBLE[case] in str(caught.value) and "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("case", CASES)
def test_names_are_those_of_the_packages_tables(tmp_path: pathlib.Path, case: str) -> None:
    config, params = expressible(case)
    save(tmp_path / "m.gguf", config, params)
    reader = package.GGUFReader(tmp_path / "m.gguf")
    held = {tensor.name: tensor.shape[::-1].tolist() for tensor in reader.tensors}
    assert reader.fields["general.architecture"].contents() == CASES[case]
    arch = {name: key for key, name in package.MODEL_ARCH_NAMES.items()}[CASES[case]]
    table = package.get_tensor_name_map(arch, config.num_layers)
    expected = {name for name in held if name.startswith("rope_f")}
    for name, (weight, _) in families.tensors(config).items():
        for renamed in merged(name):
            own = table.get_name(renamed, try_suffixes=(".weight", ".bias"))
            assert own in held, name
            expected.add(own)
            if "experts" not in weight.path:
                shape = list(weight.stored_shape(config))
                conv = config.family == "gpt2" and len(shape) == 2 and "embed" not in weight.path
                flipped = conv and weight.path != "positions/embedding"
                assert held[own] == (shape[::-1] if flipped else shape), name
    assert expected == held.keys()


def merged(name: str) -> list[str]:
    """The converter's names before its table: experts of a layer are one tensor, gpt-oss's gate and up are two."""
    name = re.sub(r"experts\.\d+\.", "experts.", name)
    name = re.sub(r"model\.(layers\.\d+\.)block_sparse_moe\.exp", r"\1feed_forward.exp", name)
    name = re.sub(r"sinks$", "sinks.weight", name)
    name = re.sub(
        r"(experts\.\w+_proj)(_bias)?$", lambda m: m[1] + (".bias" if m[2] else ".weight"), name
    )
    parts = ("gate_proj", "up_proj") if "experts.gate_up" in name else ("",)
    return [name.replace("gate_up_proj", part) if part else name for part in parts]


@pytest.mark.parametrize("case", [case for case in CASES if case not in FUSED])
def test_rows_of_queries_and_keys_lie_as_llama_cpp_turns_them(
    tmp_path: pathlib.Path, case: str
) -> None:
    config, params = expressible(case)
    save(tmp_path / "m.gguf", config, params)
    tensors = stored(tmp_path / "m.gguf")
    attention = params["layers"]["attention"]
    for name, part, heads in (
        ("attn_q", "query", config.num_heads),
        ("attn_k", "key", config.num_kv_heads),
    ):
        for suffix, leaf in (("weight", "kernel"), ("bias", "bias")):
            if leaf not in attention[part]:
                continue
            ours = attention[part][leaf][1]
            rows = ours.reshape(-1, heads * config.head_dim).T if leaf == "kernel" else ours.ravel()
            if CASES[case] in PAIRED:
                order = np.arange(heads * config.head_dim).reshape(heads, 2, -1)
                rows = rows[order.swapaxes(1, 2).ravel()]
            np.testing.assert_array_equal(tensors[f"blk.1.{name}.{suffix}"], rows)


def test_norms_of_gemma_are_stored_plus_one_and_no_others(tmp_path: pathlib.Path) -> None:
    for case, shift in (("gemma3", 1.0), ("olmo2", 0.0)):
        config, params = expressible(case)
        save(tmp_path / "m.gguf", config, params)
        scale = params["layers"]["attention"]["query_norm"]["scale"][2].ravel()
        held = stored(tmp_path / "m.gguf")["blk.2.attn_q_norm.weight"]
        np.testing.assert_array_equal(held, scale + np.float32(shift))


def test_gate_and_up_of_gpt_oss_are_apart(tmp_path: pathlib.Path) -> None:
    config, params = expressible("gpt_oss")
    save(tmp_path / "m.gguf", config, params)
    tensors, experts = stored(tmp_path / "m.gguf"), params["layers"]["experts"]
    for name, place in (("gate", 0), ("up", 1)):
        kernel = experts["gate_up"]["kernel"][1][..., place]
        held = tensors[f"blk.1.ffn_{name}_exps.weight"]
        np.testing.assert_array_equal(held, kernel.transpose(0, 2, 1))
        bias = experts["gate_up"]["bias"][1][..., place]
        np.testing.assert_array_equal(tensors[f"blk.1.ffn_{name}_exps.bias"], bias)
