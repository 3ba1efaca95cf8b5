# SPDX-License-Identifier: Apache-2.0
"""The Llama family: config.json in both spellings, refusals by name, the name table."""

import dataclasses
from typing import Any

import numpy as np
import pytest

from jft import errors
from jft.models import decoder, llama

BASE: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 50,
    "hidden_size": 12,
    "intermediate_size": 20,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
}
SMALL = llama.from_hf(BASE)
ROPE = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}


def test_both_spellings_of_rope_read_alike() -> None:
    old = BASE | {"rope_scaling": ROPE | {"rope_type": "llama3"}}
    new = BASE | {"rope_parameters": ROPE | {"rope_type": "llama3", "rope_theta": 500000.0}}
    del new["rope_theta"]
    assert llama.from_hf(old) == llama.from_hf(new)
    expected = decoder.RopeScaling("llama3", 8.0, 1.0, 4.0, 16)
    assert llama.from_hf(old).rope_scaling == expected
    linear = llama.from_hf(BASE | {"rope_scaling": {"type": "linear", "factor": 2}})
    assert linear.rope_scaling == decoder.RopeScaling("linear", 2.0)
    default = BASE | {"rope_parameters": {"rope_type": "default", "rope_theta": 7.0}}
    assert llama.from_hf(default) == dataclasses.replace(SMALL, rope_theta=7.0)


def test_absent_keys_take_transformers_defaults() -> None:
    bare = {k: v for k, v in BASE.items() if k not in ("num_key_value_heads", "head_dim")}
    config = llama.from_hf(bare | {"rope_theta": None, "rms_norm_eps": None})
    assert (config.num_kv_heads, config.head_dim) == (6, 2)
    assert (config.rope_theta, config.norm_eps, config.tie_embeddings) == (10000.0, 1e-6, False)


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("attention_bias", True, "attention_bias is True"),
        ("mlp_bias", True, "mlp_bias is True"),
        ("hidden_act", "gelu", "hidden_act is 'gelu'"),
        ("rope_scaling", {"rope_type": "yarn", "factor": 4.0}, "rope_type is 'yarn'"),
        ("rope_scaling", {"type": "dynamic", "factor": 4.0}, "rope_type is 'dynamic'"),
        ("rope_scaling", {"rope_type": "llama3", "factor": 8.0}, "low_freq_factor is missing"),
        ("rope_parameters", {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ("rope_scaling", "llama3", "rope_scaling is 'llama3', not an object"),
        ("partial_rotary_factor", 0.5, "partial_rotary_factor is 0.5"),
        ("sliding_window", 4096, "sliding_window is 4096"),
        ("layer_types", ["full_attention", "sliding_attention"], "'sliding_attention'"),
        ("pretraining_tp", 2, "pretraining_tp is 2"),
        ("quantization_config", {"bits": 4}, "quantization_config is {'bits': 4}"),
        ("architectures", ["MistralForCausalLM"], "architectures is ['MistralForCausalLM']"),
        ("model_type", "mistral", "model_type is 'mistral'"),
        ("hidden_size", None, "hidden_size is missing"),
        ("hidden_size", "12", "hidden_size is '12'"),
        ("num_hidden_layers", True, "num_hidden_layers is True"),
        ("num_key_value_heads", 4, "6 is not a multiple of num_key_value_heads 4"),
        ("head_dim", 3, "head_dim 3 is odd"),
        ("rms_norm_eps", float("nan"), "rms_norm_eps is nan"),
        ("tie_word_embeddings", "yes", "tie_word_embeddings is 'yes'"),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(key: str, value: Any, said: str) -> None:
    with pytest.raises(errors.UserError) as caught:
        llama.from_hf(BASE | {key: value}, "some/config.json")
    message = str(caught.value)
    assert said in message and message.startswith("some/config.json: ") and "\n" not in message


def test_two_rope_entries_that_disagree_are_refused() -> None:
    both = {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": {"factor": 3.0}}
    with pytest.raises(errors.UserError, match="disagree"):
        llama.from_hf(BASE | both)


@pytest.mark.parametrize("name", sorted(llama.PRESETS))
def test_presets_survive_export(name: str) -> None:
    config = llama.PRESETS[name]
    assert llama.from_hf(llama.to_hf(config)) == config


def test_transformers_reads_an_exported_configuration_as_meant() -> None:
    transformers = pytest.importorskip("transformers")
    config = llama.PRESETS["llama3.2-3b"]
    theirs = transformers.LlamaConfig.from_dict(llama.to_hf(config))
    assert llama.from_hf(theirs.to_dict()) == config
    assert theirs.rope_parameters["factor"] == 32.0 and theirs.head_dim == 128


@pytest.mark.parametrize(
    ("name", "count"),  # as published with each model
    [
        ("smollm2-135m", 134_515_008),
        ("smollm2-360m", 361_821_120),
        ("smollm2-1.7b", 1_711_376_384),
        ("llama3.2-1b", 1_235_814_400),
        ("llama3.2-3b", 3_212_749_824),
        ("llama3.1-8b", 8_030_261_248),
        ("llama3.1-70b", 70_553_706_496),
    ],
)
def test_presets_have_the_published_number_of_parameters(name: str, count: int) -> None:
    config = llama.PRESETS[name]
    rows = llama.tensors(config).values()
    assert sum(int(np.prod(weight.shape(config))) for weight, _ in rows) == count


def test_name_table_is_a_bijection_bit_for_bit() -> None:
    rng = np.random.default_rng(0)
    for name, (weight, _) in llama.tensors(SMALL).items():
        tensor = rng.standard_normal(weight.stored_shape(SMALL), np.float32)
        ours = weight.from_hf(tensor, SMALL)
        assert ours.shape == weight.shape(SMALL), name
        np.testing.assert_array_equal(weight.to_hf(np.array(ours), SMALL), tensor, name)


def test_kernels_compute_what_the_torch_module_computes() -> None:
    rng = np.random.default_rng(1)
    rows = {weight.path: weight for weight in llama.WEIGHTS}
    for path, equation in (
        ("layers/attention/query/kernel", "td,dnh->tnh"),
        ("layers/attention/key/kernel", "td,dnh->tnh"),
        ("layers/mlp/down/kernel", "tf,fd->td"),
        ("head/kernel", "td,dv->tv"),
    ):
        tensor = rng.standard_normal(rows[path].stored_shape(SMALL))
        x = rng.standard_normal((3, tensor.shape[1]))
        got = np.einsum(equation, x, rows[path].from_hf(tensor, SMALL))
        np.testing.assert_allclose(got.reshape(3, -1), x @ tensor.T, err_msg=path)
    out = rows["layers/attention/out/kernel"]
    tensor = rng.standard_normal(out.stored_shape(SMALL))
    x_TNH = rng.standard_normal((3, SMALL.num_heads, SMALL.head_dim))
    got = np.einsum("tnh,nhd->td", x_TNH, out.from_hf(tensor, SMALL))
    np.testing.assert_allclose(got, x_TNH.reshape(3, -1) @ tensor.T)


def test_modules_are_named_as_in_torch() -> None:
    modules = llama.modules(SMALL)
    weight, layer = modules["model.layers.3.self_attn.q_proj"]
    assert (weight.path, layer) == ("layers/attention/query/kernel", 3)
    assert len(modules) == 7 * SMALL.num_layers + 2
    assert modules["lm_head"][1] is None
    assert not any("norm" in name for name in modules)
    tied = dataclasses.replace(SMALL, tie_embeddings=True)
    assert "lm_head" in llama.modules(tied) and "lm_head.weight" not in llama.tensors(tied)
