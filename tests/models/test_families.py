# SPDX-License-Identifier: Apache-2.0
"""Families: config.json in both spellings, refusals by name, the tables of names, published sizes."""

import dataclasses
from typing import Any

import numpy as np
import pytest
import small_models

from jft import errors
from jft.models import architecture, decoder, families, names
from jft.models.families import settings

LLAMA: dict[str, Any] = {
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
SMALL = families.from_hf(LLAMA)
ROPE = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}


def of(model_type: str, **keys: Any) -> dict[str, Any]:
    """A small config.json of another family."""
    own = families.FAMILIES[model_type]
    return LLAMA | {"architectures": [own.architecture], "model_type": model_type} | keys


def refusal(config: dict[str, Any]) -> str:
    with pytest.raises(errors.UserError) as caught:
        families.from_hf(config, "some/config.json")
    message = str(caught.value)
    assert message.startswith("some/config.json: ") and "\n" not in message
    return message


def rope_of(config: dict[str, Any]) -> architecture.Rope | None:
    return families.from_hf(config).rope


def test_both_spellings_of_rope_read_alike() -> None:
    old = LLAMA | {"rope_scaling": ROPE | {"rope_type": "llama3"}}
    new = LLAMA | {"rope_parameters": ROPE | {"rope_type": "llama3", "rope_theta": 500000.0}}
    del new["rope_theta"]
    assert families.from_hf(old) == families.from_hf(new)
    assert rope_of(old) == architecture.Rope(500000.0, architecture.Llama3(8.0, 1.0, 4.0, 16))
    linear = rope_of(LLAMA | {"rope_scaling": {"type": "linear", "factor": 2}})
    assert linear == architecture.Rope(500000.0, architecture.Linear(2.0))
    default = {"rope_parameters": {"rope_type": "default", "rope_theta": 7.0}}
    assert rope_of(LLAMA | default) == architecture.Rope(7.0)


def test_gemma3_ropes_read_alike_in_both_spellings() -> None:
    old = of(
        "gemma3_text",
        rope_theta=1e6,
        rope_local_base_freq=1e4,
        rope_scaling={"rope_type": "linear", "factor": 8.0},
        sliding_window=16,
    )
    whole = {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}
    local = {"rope_type": "default", "rope_theta": 1e4}
    new = of(
        "gemma3_text",
        rope_parameters={"full_attention": whole, "sliding_attention": local},
        sliding_window=16,
        layer_types=["sliding_attention"] * 4,
    )
    del new["rope_theta"]
    got = families.from_hf(old)
    assert got.layer(0) == architecture.Layer(architecture.Rope(1e4), 16)
    assert families.from_hf(new).layer(3) == got.layer(0)
    six = families.from_hf(old | {"num_hidden_layers": 6})
    assert six.layer(5) == architecture.Layer(architecture.Rope(1e6, architecture.Linear(8.0)))


def test_absent_keys_take_transformers_defaults() -> None:
    bare = {k: v for k, v in LLAMA.items() if k not in ("num_key_value_heads", "head_dim")}
    config = families.from_hf(bare | {"rope_theta": None, "rms_norm_eps": None})
    assert (config.num_kv_heads, config.head_dim) == (6, 2)
    assert config.rope == architecture.Rope(10000.0)
    assert (config.norm_eps, config.tie_embeddings) == (1e-6, False)
    gemma = families.from_hf(of("gemma"))
    assert gemma.tie_embeddings and gemma.activation == "gelu_tanh"


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("hidden_act", "quick_gelu", "hidden_act is 'quick_gelu'"),
        ("rope_scaling", {"type": "dynamic", "factor": 4.0}, "rope_type is 'dynamic'"),
        ("rope_scaling", {"rope_type": "llama3", "factor": 8.0}, "low_freq_factor is missing"),
        ("rope_scaling", {"type": "linear", "factor": 2, "beta": 1}, "beta is nothing that"),
        ("rope_scaling", "llama3", "rope_scaling is 'llama3', not an object"),
        ("rope_scaling", {"type": "longrope", "short_factor": [1.0]}, "short_factor has 1 numbers"),
        ("partial_rotary_factor", 2, "partial_rotary_factor is 2"),
        ("partial_rotary_factor", 0.3, "1 dimensions can't turn in pairs"),
        ("sliding_window", 4096, "sliding_window is 4096"),
        ("layer_types", ["full_attention", "sliding_attention"], "'sliding_attention'"),
        ("pretraining_tp", 2, "pretraining_tp is 2"),
        ("quantization_config", {"bits": 4}, "quantization_config is {'bits': 4}"),
        ("final_logit_softcapping", 30.0, "final_logit_softcapping is 30.0"),
        ("residual_multiplier", 0.2, "residual_multiplier is 0.2"),
        ("num_local_experts", 8, "num_local_experts is 8"),
        ("no_rope_layers", [1, 0, 1, 1], "no_rope_layers is [1, 0, 1, 1]"),
        ("architectures", ["MambaForCausalLM"], "architectures is ['MambaForCausalLM']"),
        ("architectures", ["MistralForCausalLM"], "model_type is 'llama'"),
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
    assert said in refusal(LLAMA | {key: value})


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (of("qwen3_moe", decoder_sparse_step=2), "decoder_sparse_step is 2"),
        (of("qwen3_moe", mlp_only_layers=[1]), "mlp_only_layers is [1]"),
        (
            of("qwen3_moe", num_experts=2, num_experts_per_tok=3, moe_intermediate_size=8),
            "num_experts_per_tok 3 is more than num_experts 2",
        ),
        (of("mixtral", num_local_experts=1), "num_experts_per_tok 2 is more than"),
        (of("qwen2", layer_types=["sliding_attention"] * 4), "use_sliding_window is not set"),
        (of("qwen2", layer_types=["full_attention"] * 3), "layer_types has 3 entries for 4"),
        (of("gemma2", layer_types=["chunked_attention"] * 4), "layer_types holds 'chunked"),
        (of("gemma", use_bidirectional_attention=True), "use_bidirectional_attention is True"),
        (of("smollm3", no_rope_layers=[1, 1]), "no_rope_layers is not a list of 4"),
        (of("phi3", rope_scaling={"type": "linear", "factor": 2.0}), "longrope or none"),
        (of("gpt_oss", num_local_experts=4), "rope_scaling is missing"),
        (of("gpt2", n_embd=12, n_head=5), "n_embd 12 is not a multiple of n_head 5"),
        (
            of("gpt2", n_embd=12, n_head=3, n_layer=1, scale_attn_by_inverse_layer_idx=True),
            "scale_attn_by_inverse_layer_idx is True",
        ),
        (
            {"architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3"},
            "architectures is ['Gemma3ForConditionalGeneration']",
        ),
        ({"hidden_size": 4}, "neither architectures nor model_type"),
    ],
)
def test_families_refuse_what_they_do_not_implement(config: dict[str, Any], said: str) -> None:
    assert said in refusal(config)


def test_switches_at_their_neutral_values_pass() -> None:
    neutral = {"pretraining_tp": 1, "sliding_window": None, "use_sliding_window": False}
    kinds = {"layer_types": ["full_attention"] * 4, "num_experts": 0, "residual_multiplier": 1.0}
    assert families.from_hf(LLAMA | neutral | kinds) == SMALL


def test_two_rope_entries_that_disagree_are_refused() -> None:
    both = {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": {"factor": 3.0}}
    assert "disagree" in refusal(LLAMA | both)


def test_layers_that_differ_read_as_meant() -> None:
    smol = families.from_hf(of("smollm3", rope_theta=5.0, num_hidden_layers=8))
    assert [smol.layer(i).rope is None for i in range(8)] == [False, False, False, True] * 2
    assert len(smol.pattern) == 4 and len(smol.kinds) == 2
    qwen = families.from_hf(
        of("qwen2", use_sliding_window=True, sliding_window=8, max_window_layers=3)
    )
    assert [qwen.layer(i).window for i in range(4)] == [None, None, None, 8]
    assert settings.layer_types(qwen)[2:] == ["full_attention", "sliding_attention"]


@pytest.mark.parametrize("name", sorted(families.PRESETS))
def test_presets_survive_export(name: str) -> None:
    config = families.PRESETS[name]
    assert families.from_hf(families.to_hf(config)) == config


@pytest.mark.parametrize("name", sorted(families.FAMILIES))
def test_transformers_reads_an_exported_configuration_as_meant(name: str) -> None:
    transformers = pytest.importorskip("transformers")
    for config in families.FAMILIES[name].presets.values():
        written = families.to_hf(config)
        theirs = transformers.AutoConfig.for_model(**written).to_dict()
        # Two spellings of one thing side by side would be refused.
        theirs.pop("rope_scaling", None)
        assert families.from_hf(theirs | {"architectures": written["architectures"]}) == config


def test_an_unknown_preset_is_refused_with_near_names() -> None:
    with pytest.raises(errors.UserError, match="near it: llama3.1-8b"):
        families.preset("llama-3.1-8b")


@pytest.mark.parametrize("preset", small_models.ONE_EACH)
def test_name_table_is_a_bijection_bit_for_bit(preset: str) -> None:
    config = small_models.small(preset)
    leaves = {
        path: np.full(leaf.shape, np.nan)
        for path, leaf in names.tree.flatten(decoder.shapes(config)).items()
    }
    rng = np.random.default_rng(0)
    stored = {}
    for name, (weight, index) in families.tensors(config).items():
        stored[name] = rng.standard_normal(weight.stored_shape(config))
        target = leaves[weight.path][index]
        assert np.isnan(target).all(), f"{name} goes where another tensor has gone"
        target[...] = weight.from_file(stored[name], config)
    for path, leaf in leaves.items():
        assert np.isfinite(leaf).all(), f"{path} is not filled"
    for name, (weight, index) in families.tensors(config).items():
        got = weight.to_file(leaves[weight.path][index], config)
        np.testing.assert_array_equal(got, stored[name], name)


def test_kernels_compute_what_the_torch_module_computes() -> None:
    rng = np.random.default_rng(1)
    rows = {weight.path: weight for weight in families.weights(SMALL)}
    for path, equation in (
        ("layers/attention/query/kernel", "td,dnh->tnh"),
        ("layers/attention/key/kernel", "td,dnh->tnh"),
        ("layers/mlp/down/kernel", "tf,fd->td"),
        ("head/kernel", "td,dv->tv"),
    ):
        tensor = rng.standard_normal(rows[path].stored_shape(SMALL))
        x = rng.standard_normal((3, tensor.shape[1]))
        got = np.einsum(equation, x, rows[path].from_file(tensor, SMALL))
        np.testing.assert_allclose(got.reshape(3, -1), x @ tensor.T, err_msg=path)
    out = rows["layers/attention/out/kernel"]
    tensor = rng.standard_normal(out.stored_shape(SMALL))
    x_TNH = rng.standard_normal((3, SMALL.num_heads, SMALL.head_dim))
    got = np.einsum("tnh,nhd->td", x_TNH, out.from_file(tensor, SMALL))
    np.testing.assert_allclose(got, x_TNH.reshape(3, -1) @ tensor.T)


def test_modules_are_named_as_in_torch() -> None:
    modules = families.modules(SMALL)
    assert modules["model.layers.3.self_attn.q_proj"] == ("layers/attention/query/kernel", 3)
    assert len(modules) == 7 * SMALL.num_layers + 2
    assert modules["lm_head"] == ("head/kernel", None)
    assert not any("norm" in name for name in modules)
    tied = dataclasses.replace(SMALL, tie_embeddings=True)
    assert "lm_head" in families.modules(tied) and "lm_head.weight" not in families.tensors(tied)


def test_experts_modules_count_through_layers_and_experts() -> None:
    modules = families.modules(small_models.small("mixtral-8x7b"))
    name = "model.layers.2.block_sparse_moe.experts.1.w3"
    assert modules[name] == ("layers/experts/up/kernel", 2 * 4 + 1)
    assert not any(
        ".experts." in name for name in families.modules(small_models.small("gpt-oss-20b"))
    )
    qkv = families.modules(small_models.small("gpt2"))["transformer.h.1.attn.c_attn"]
    assert qkv == ("layers/attention/qkv/kernel", 1)
