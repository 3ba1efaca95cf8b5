# SPDX-License-Identifier: Apache-2.0
"""Bad adapters: each is a good one that our own `save` wrote, damaged in one way, and the message names the culprit."""

import dataclasses
import json
import os
import pathlib
import pickle
import shutil
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import numpy as safetensors_numpy

from jft import errors, lora, tree
from jft.lora import peft, peft_config
from jft.models import architecture, decoder, families, hf

Damage = Callable[[pathlib.Path], Any]
Tensors = dict[str, np.ndarray]

RANK = 3
QUERY = "base_model.model.model.layers.1.self_attn.q_proj"
A, B, MAGNITUDE = f"{QUERY}.lora_A.weight", f"{QUERY}.lora_B.weight", ".lora_magnitude_vector"
DOWN = "model.layers.0.mlp.down_proj"
# Written by PEFT 0.21.2.
FIELDS = """
alora_invocation_tokens alpha_pattern arrow_config auto_mapping base_model_name_or_path bias corda_config
ensure_weight_tying eva_config exclude_modules fan_in_fan_out inference_mode init_lora_weights kasa_config
layer_replication layers_pattern layers_to_transform loftq_config lora_alpha lora_bias lora_dropout lora_ga_config
megatron_config megatron_core modules_to_save monteclora_config peft_type peft_version qalora_group_size r rank_pattern
revision target_modules target_parameters task_type trainable_token_indices use_bdlora use_dora use_qalora use_rslora
velora_config
""".split()


@dataclasses.dataclass(frozen=True)
class Base:
    config: architecture.Config
    params: Any
    names: peft.Names

    def load(self, folder: pathlib.Path) -> lora.Adapters:
        return peft.load(folder, self.names, self.params, architecture.LAYOUTS)


def base_of(c: architecture.Config, params: Any) -> Base:
    names = families.modules(c)
    return Base(c, params, names)


def changed(base: Base, **changes: Any) -> Base:
    """The shapes of another base."""
    c = dataclasses.replace(base.config, **changes)
    return base_of(c, jax.eval_shape(lambda: decoder.init(c, key=jax.random.key(0))))


@pytest.fixture(scope="module")
def base(tiny_model: pathlib.Path) -> Base:
    c, params, _ = hf.load(tiny_model, "float32")
    return base_of(c, jax.tree.map(jnp.asarray, params))


@pytest.fixture(scope="module")
def good(base: Base, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Two folders, `plain` and `dora`, with all factors random."""
    root = tmp_path_factory.mktemp("good")
    for name in ("plain", "dora"):
        spec = lora.Spec(
            rank=RANK,
            targets=r"layers/.*/kernel",
            layouts=architecture.LAYOUTS,
            use_dora=name == "dora",
        )
        adapters = jax.jit(lambda p, spec=spec: lora.init(spec, p, key=jax.random.key(1)))(
            base.params
        )
        moved = jax.tree.map(
            lambda x: (
                np.asarray(x)
                + 0.1 * np.abs(np.sin(np.arange(x.size, dtype=x.dtype))).reshape(x.shape)
            ),
            adapters,
        )
        peft.save(root / name, moved, base.names, base_name="tiny")
    return root


@pytest.fixture
def folder(good: pathlib.Path, tmp_path: pathlib.Path) -> pathlib.Path:
    """A good plain adapter, for tests to damage."""
    return pathlib.Path(shutil.copytree(good / "plain", tmp_path / "adapter"))


def config(**changes: Any) -> Damage:
    def damage(folder: pathlib.Path) -> None:
        path = folder / peft.CONFIG_FILE
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return damage


def no_key(key: str) -> Damage:
    def damage(folder: pathlib.Path) -> None:
        path = folder / peft.CONFIG_FILE
        values = json.loads(path.read_text())
        del values[key]
        path.write_text(json.dumps(values))

    return damage


def tensors(change: Callable[[Tensors], Any]) -> Damage:
    def damage(folder: pathlib.Path) -> None:
        path = folder / peft.WEIGHTS_FILE
        held = dict(safetensors_numpy.load_file(path))
        change(held)
        held = {name: np.ascontiguousarray(x) for name, x in held.items()}
        safetensors_numpy.save_file(held, path)

    return damage


def replaced(name: str, change: Callable[[np.ndarray], np.ndarray]) -> Damage:
    return tensors(lambda t: t.update({name: change(t[name])}))


def with_value(name: str, value: float) -> Damage:
    return replaced(
        name, lambda x: np.concatenate([x.ravel()[:-1], [np.float32(value)]]).reshape(x.shape)
    )


def config_bytes(change: Callable[[bytes], bytes]) -> Damage:
    return lambda folder: rewritten(folder / peft.CONFIG_FILE, change)


def weights_bytes(change: Callable[[bytes], bytes]) -> Damage:
    return lambda folder: rewritten(folder / peft.WEIGHTS_FILE, change)


def rewritten(path: pathlib.Path, change: Callable[[bytes], bytes]) -> None:
    path.write_bytes(change(path.read_bytes()))


def swapped(t: Tensors) -> None:
    t[A], t[B] = t[B], t[A]


def renamed(old: str, new: str) -> Damage:
    def change(t: Tensors) -> None:
        held = {name.replace(old, new): x for name, x in t.items()}
        t.clear()
        t.update(held)

    return tensors(change)


def pickled(folder: pathlib.Path) -> None:
    (folder / peft.WEIGHTS_FILE).unlink()
    (folder / "adapter_model.bin").write_bytes(pickle.dumps({}))


def linked_outside(name: str) -> Damage:
    def damage(folder: pathlib.Path) -> None:
        elsewhere = folder.parent / "elsewhere"
        (folder / name).rename(elsewhere)
        (folder / name).symlink_to(elsewhere)

    return damage


def head_pair(t: Tensors) -> None:
    t.clear()
    for x, shape in {"A": (RANK, 32), "B": (300, RANK)}.items():
        t[f"base_model.model.lm_head.lora_{x}.weight"] = np.ones(shape, np.float32)


def both(*damages: Damage) -> Damage:
    return lambda folder: [damage(folder) for damage in damages]


# name: the damage, a regular expression for the message
TENSOR_CASES: dict[str, tuple[Damage, str]] = {
    "missing tensor": (tensors(lambda t: t.pop(A)), f"missing {A} "),
    "extra tensor": (tensors(lambda t: t.update({"odd.weight": t[A]})), "holds odd.weight "),
    "a name of two lines": (
        tensors(lambda t: t.update({"odd\nname": t[A]})),
        r"holds 'odd\\nname' ",
    ),
    "extra layer": (
        tensors(lambda t: t.update({A.replace("layers.1", "layers.2"): t[A]})),
        "holds .*layers.2.self_attn.q_proj.lora_A",
    ),
    "a bias of B": (
        tensors(lambda t: t.update({f"{QUERY}.lora_B.bias": t[B][:, 0]})),
        "q_proj.lora_B.bias",
    ),
    "another adapter's name in the keys": (
        renamed(".weight", ".helper.weight"),
        r"missing .*lora_A.weight.*holds .*lora_A.helper.weight",
    ),
    "no prefix": (renamed("base_model.model.", ""), "missing base_model.*holds model.layers.0"),
    "NaN": (with_value(A, np.nan), f"{A} holds values that are not finite"),
    "infinite": (with_value(B, -np.inf), f"{B} holds values that are not finite"),
    "finite only in float64": (
        replaced(A, lambda x: np.full(x.shape, 1e300)),
        f"{A} holds values that are not finite",
    ),
    "A and B swapped": (tensors(swapped), rf"{A} has shape \(32, 3\).*\(3, 32\)"),
    "A transposed": (replaced(A, np.transpose), rf"{A} has shape \(32, 3\)"),
    "rank 2 in one tensor": (replaced(A, lambda x: x[:2]), rf"{A} has shape \(2, 32\), but r=3"),
    "fewer inputs": (replaced(A, lambda x: x[:, :5]), rf"{A} has shape \(3, 5\).*\(3, 32\)"),
    "fewer outputs": (replaced(B, lambda x: x[:5]), rf"{B} has shape \(5, 3\).*\(32, 3\)"),
    "a vector": (replaced(A, np.ravel), rf"{A} has shape \(96,\)"),
    "three dimensions": (replaced(A, lambda x: x[None]), rf"{A} has shape \(1, 3, 32\)"),
    "no elements": (replaced(A, lambda x: x[:0]), rf"{A} has shape \(0, 32\)"),
    "integers": (replaced(A, lambda x: x.astype(np.int32)), f"{A} is stored as I32"),
    "booleans": (replaced(A, lambda x: x > 0), f"{A} is stored as BOOL"),
    "magnitudes without use_dora": (
        tensors(lambda t: t.update({QUERY + MAGNITUDE: np.ones(32, np.float32)})),
        "holds .*q_proj.lora_magnitude_vector.*use_dora is false",
    ),
    "an embedding": (
        tensors(lambda t: t.update({"base_model.model.model.embed_tokens.lora_embedding_A": t[A]})),
        "lora_embedding_A",
    ),
}
FILE_CASES: dict[str, tuple[Damage, str]] = {
    "no configuration": (lambda f: (f / peft.CONFIG_FILE).unlink(), "no adapter_config.json"),
    "no weights": (lambda f: (f / peft.WEIGHTS_FILE).unlink(), "no adapter_model.safetensors"),
    "no folder": (shutil.rmtree, "no adapter_config.json"),
    "a file for a folder": (
        lambda f: (shutil.rmtree(f), f.write_text("")),
        "it is a file, and an adapter is a folder",
    ),
    "a folder for a file": (
        lambda f: ((f / peft.WEIGHTS_FILE).unlink(), (f / peft.WEIGHTS_FILE).mkdir()),
        "no adapter_model.safetensors",
    ),
    "pickle": (pickled, "adapter_model.bin is pickle"),
    "pickle by another name": (
        weights_bytes(lambda _: pickle.dumps({"a": 1})),
        "adapter_model.safetensors is not a readable safetensors file",
    ),
    "weights cut off": (weights_bytes(lambda x: x[:-8]), "not a readable safetensors file"),
    "weights cut off in the header": (weights_bytes(lambda x: x[:100]), "not a readable safetens"),
    "bytes after the weights": (weights_bytes(lambda x: x + b"0000"), "not a readable safetensors"),
    "empty weights": (weights_bytes(lambda _: b""), "not a readable safetensors file"),
    "garbage for a header": (
        weights_bytes(lambda x: x[:8] + b"\xff" * 16 + x[24:]),
        "not a readable safetensors file",
    ),
    "a header of 2^60 bytes": (
        weights_bytes(lambda x: (1 << 60).to_bytes(8, "little") + x[8:]),
        "not a readable safetensors file",
    ),
    "weights linked from elsewhere": (
        linked_outside(peft.WEIGHTS_FILE),
        "adapter_model.safetensors is a link to .*elsewhere, outside its folder",
    ),
    "configuration linked from elsewhere": (
        linked_outside(peft.CONFIG_FILE),
        "adapter_config.json is a link to .*elsewhere, outside its folder",
    ),
    "empty configuration": (config_bytes(lambda _: b""), "adapter_config.json: not JSON"),
    "half a configuration": (config_bytes(lambda x: x[:90]), "adapter_config.json: not JSON"),
    "nested too deep": (config_bytes(lambda _: b"[" * 10**5), "adapter_config.json: not JSON"),
    "a list": (config_bytes(lambda _: b"[]"), "adapter_config.json is no JSON object"),
    "null": (config_bytes(lambda _: b"null"), "adapter_config.json is no JSON object"),
    "UTF-16": (
        config_bytes(lambda x: x.decode().encode("utf-16")),
        "adapter_config.json: not JSON: .utf-8. codec",
    ),
    "a key twice": (config_bytes(lambda x: b'{"r": 3,' + x[1:]), "'r' is there twice"),
    "an inner key twice": (
        config_bytes(lambda x: b'{"x": {"y": 1, "y": 2},' + x[1:]),
        "'y' is there twice",
    ),
}
CONFIG_CASES: dict[str, tuple[Damage, str]] = {
    "another method": (config(peft_type="IA3"), "peft_type='IA3'"),
    "no method": (no_key("peft_type"), "peft_type=None"),
    "no r": (no_key("r"), "r is missing"),
    "no lora_alpha": (no_key("lora_alpha"), "lora_alpha is missing"),
    "r null": (config(r=None), "r is missing"),
    "r 2": (config(r=2), "has shape .*r=2"),
    "r 4": (config(r=4), "has shape .*r=4"),
    "r 0": (config(r=0), "r=0: a rank is a whole number"),
    "r negative": (config(r=-3), "r=-3"),
    "r a float": (config(r=3.0), r"r=3\.0"),
    "r a string": (config(r="3"), "r='3'"),
    "r true": (config(r=True), "r=True"),
    "lora_alpha NaN": (config(lora_alpha=float("nan")), "lora_alpha=nan: an alpha is a finite"),
    "lora_alpha infinite": (config(lora_alpha=float("inf")), "lora_alpha=inf"),
    "lora_alpha beyond floats": (config(lora_alpha=10**400), "lora_alpha=1000"),
    "lora_alpha a string": (config(lora_alpha="16"), "lora_alpha='16'"),
    "use_rslora a string": (config(use_rslora="false"), "use_rslora='false'"),
    "dropout 1": (config(lora_dropout=1), "lora_dropout=1"),
    "dropout negative": (config(lora_dropout=-0.1), r"lora_dropout=-0\.1"),
    "dropout NaN": (config(lora_dropout=float("nan")), "lora_dropout=nan"),
    "rank_pattern against a tensor": (
        config(rank_pattern={DOWN: 2}),
        rf"{DOWN}.lora_A.weight has shape \(3, 48\), but r=2",
    ),
    "rank_pattern zero": (
        config(rank_pattern={DOWN: 0}),
        f"rank_pattern=.* unlike that of .{DOWN}",
    ),
    "rank_pattern a list": (config(rank_pattern=[DOWN]), "rank_pattern=.*maps names to values"),
    "alpha_pattern a string": (config(alpha_pattern={DOWN: "8"}), f"alpha_pattern=.*{DOWN}"),
    "alpha_patterns that overlap": (
        config(alpha_pattern={"q_proj": 64, "0.self_attn.q_proj": 8}),
        "several entries of alpha_pattern match model.layers.0.self_attn.q_proj",
    ),
    "rank_patterns that overlap": (
        config(rank_pattern={"q_proj": 3, "self_attn.q_proj": 2}),
        "several entries of rank_pattern match model.layers.0.self_attn.q_proj",
    ),
    "alpha_pattern that matches nothing": (
        config(alpha_pattern={"^q_proj": 64}),
        r"alpha_pattern: '\^q_proj' matches no module",
    ),
    "pattern that is none": (config(rank_pattern={"(": 3}), r"'\(' is not a regular expression"),
    "targets that are no expression": (config(target_modules="("), r"target_modules=.*'\('"),
    "no targets": (no_key("target_modules"), "target_modules is missing"),
    "empty targets": (config(target_modules=[]), "target_modules is missing"),
    "targets a number": (config(target_modules=7), "target_modules=7"),
    "targets with a number": (config(target_modules=["q_proj", 7]), "target_modules=.*7"),
    "all targets misspelt": (config(target_modules=["c_attn"]), "'c_attn'.* names no module"),
    "a target misspelt": (
        config(target_modules="q_prj k_proj v_proj o_proj gate_proj up_proj down_proj".split()),
        r"holds .*0.self_attn.q_proj.lora_A.*target_modules has q_prj",
    ),
    "fewer targets": (config(target_modules=["q_proj"]), "holds .*down_proj.* does not ask for"),
    "an embedding as target": (
        config(target_modules=["q_proj", "embed_tokens"]),
        "target_modules names model.embed_tokens",
    ),
    "a tied head as target": (
        both(config(target_modules=["lm_head"]), tensors(head_pair)),
        "target_modules names lm_head.*tied",
    ),
    "some excluded": (config(exclude_modules=["q_proj"]), "holds .*q_proj.* does not ask for"),
    "all excluded": (config(exclude_modules=".*"), "exclude_modules='.*': it excludes every"),
    "exclude a number": (config(exclude_modules=7), "exclude_modules=7"),
    "one layer of two": (config(layers_to_transform=[0]), "holds .*layers.1.* does not ask for"),
    "a layer that is not there": (
        config(layers_to_transform=[0, 1, 5]),
        r"layers_to_transform=\[0, 1, 5\]: this base has no layer 5",
    ),
    "a negative layer": (config(layers_to_transform=-1), "layers_to_transform=-1"),
    "a layer as a string": (config(layers_to_transform=["0"]), r"layers_to_transform=\['0'\]"),
    "layers of another name": (
        config(layers_to_transform=[0, 1], layers_pattern="blocks"),
        "layers_to_transform=.*no layer 0",
    ),
    "layers beside an expression": (
        config(target_modules=".*_proj", layers_to_transform=[0]),
        "layers_to_transform=.*only beside a list",
    ),
    "use_dora without magnitudes": (
        config(use_dora=True),
        r"missing .*lora_magnitude_vector.* \(14\).*use_dora is true",
    ),
    "use_dora a string": (config(use_dora="no"), "use_dora='no'"),
    "a key of the future": (config(use_magic={"k": 1}), r"use_magic=\{'k': 1\}: this key is not"),
    "a key of two lines": (config(**{"a\nkey": 1}), r"'a\\nkey'=1"),
    "bias": (config(bias="lora_only"), "bias='lora_only'"),
    "another task": (config(task_type="SEQ_CLS"), "task_type='SEQ_CLS'"),
    "PiSSA": (config(init_lora_weights="pissa"), "init_lora_weights='pissa'"),
    "fast PiSSA": (config(init_lora_weights="pissa_niter_4"), "init_lora_weights='pissa_niter_4'"),
    "OLoRA": (config(init_lora_weights="olora"), "init_lora_weights='olora'"),
    "CorDA": (config(init_lora_weights="corda"), "init_lora_weights='corda'"),
    "LoftQ": (config(init_lora_weights="loftq"), "init_lora_weights='loftq'"),
    "LoRA-GA": (config(init_lora_weights="lora_ga"), "init_lora_weights='lora_ga'"),
}
# Keys that are refused unless empty, with what PEFT would write.
REFUSED = {
    "alora_invocation_tokens": [1, 2],
    "arrow_config": {"top_k": 3},
    "ensure_weight_tying": True,
    "kasa_config": {"beta": 1e-4},
    "layer_replication": [[0, 2], [1, 2]],
    "loftq_config": {"loftq_bits": 4},
    "lora_bias": True,
    "megatron_config": {"hidden_size": 32},
    "modules_to_save": ["lm_head"],
    "monteclora_config": {"num_samples": 8},
    "target_parameters": ["experts.down_proj"],
    "trainable_token_indices": {"embed_tokens": [3]},
    "use_bdlora": {"nblocks": 2},
    "use_qalora": True,
    "velora_config": {"num_groups": 4},
}
CASES = {
    **TENSOR_CASES,
    **FILE_CASES,
    **CONFIG_CASES,
    **{key: (config(**{key: value}), rf"{key}=") for key, value in REFUSED.items()},
}
DORA_CASES: dict[str, tuple[Damage, str]] = {
    "magnitudes of one module missing": (
        tensors(lambda t: t.pop(QUERY + MAGNITUDE)),
        f"missing {QUERY}{MAGNITUDE} .*use_dora is true",
    ),
    "use_dora taken away": (
        no_key("use_dora"),
        r"holds .*lora_magnitude_vector.*use_dora is false",
    ),
    "magnitudes named as in memory": (
        renamed("vector", "vector.weight"),
        "missing .*vector.*holds .*lora_magnitude_vector.weight",
    ),
    "magnitude NaN": (with_value(QUERY + MAGNITUDE, np.nan), "magnitude_vector holds values that"),
    "magnitude too short": (replaced(QUERY + MAGNITUDE, lambda x: x[:5]), r"shape \(5,\).*\(32,\)"),
    "magnitude a column": (replaced(QUERY + MAGNITUDE, lambda x: x[:, None]), r"shape \(32, 1\)"),
}


# name: what differs in the base, a regular expression for the message
OTHER_BASES: dict[str, tuple[dict[str, Any], str]] = {
    "more layers": ({"num_layers": 3}, "missing .*layers.2.*asks for"),
    "fewer layers": ({"num_layers": 1}, "holds .*layers.1.*does not ask for"),
    "wider": ({"d_model": 64}, r"q_proj.lora_A.weight has shape \(3, 32\).*\(3, 64\)"),
    "more heads": ({"num_heads": 8}, r"q_proj.lora_B.weight has shape \(32, 3\).*\(64, 3\)"),
    "other feed-forward": ({"d_ff": 40}, r"gate_proj.lora_B.weight has shape .*\(40, 3\)"),
}
ALL = [
    *(("plain", *case) for case in CASES.items()),
    *(("dora", *case) for case in DORA_CASES.items()),
    *(("plain", f"base: {name}", case) for name, case in OTHER_BASES.items()),
]


@pytest.mark.parametrize(("kind", "case"), [pytest.param(k, c, id=f"{k}-{n}") for k, n, c in ALL])
def test_a_bad_adapter_is_refused_by_name(
    good: pathlib.Path,
    base: Base,
    tmp_path: pathlib.Path,
    kind: str,
    case: tuple[Damage | dict[str, Any], str],
) -> None:
    folder = pathlib.Path(shutil.copytree(good / kind, tmp_path / "adapter"))
    base.load(folder)
    damage, told = case
    if isinstance(damage, dict):
        base = changed(base, **damage)
    else:
        damage(folder)
    with pytest.raises(errors.UserError, match=told) as caught:
        base.load(folder)
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


def test_a_base_with_other_names_is_refused(base: Base, folder: pathlib.Path) -> None:
    names = {m.replace("_proj", "_linear"): leaf for m, leaf in base.names.items()}
    with pytest.raises(errors.UserError, match="target_modules=.*q_proj.*names no module"):
        dataclasses.replace(base, names=names).load(folder)


def test_a_table_of_names_for_another_depth_is_refused(base: Base, folder: pathlib.Path) -> None:
    """Two layers of names on a base of three, which would leave the third without its share."""
    mixed = dataclasses.replace(base, params=changed(base, num_layers=3).params)
    with pytest.raises(errors.UserError, match="layers/attention/query/kernel.*2 modules"):
        mixed.load(folder)


def equal(one: lora.Adapters, other: lora.Adapters) -> None:
    leaves, others = tree.flatten(one), tree.flatten(other)
    assert leaves.keys() == others.keys()
    for path, leaf in leaves.items():
        np.testing.assert_array_equal(leaf, others[path], err_msg=path)
    assert [f.scale for f in one.values()] == [f.scale for f in other.values()]


def test_each_field_of_peft_is_dealt_with() -> None:
    assert len(FIELDS) == 41
    kinds = [peft_config.HONOURED, peft_config.HARMLESS, set(peft_config.ONLY)]
    for field in FIELDS:
        assert sum(field in kind for kind in kinds) == 1, field
    assert set(REFUSED) == {key for key, allowed in peft_config.ONLY.items() if not allowed}


HARMLESS = {
    "base_model_name_or_path": "somewhere/else",
    "revision": "main",
    "peft_version": "9.9.9",
    "auto_mapping": {"base_model_class": "LlamaForCausalLM", "parent_library": "transformers"},
    "inference_mode": False,
    "eva_config": {"rho": 2.0},
    "corda_config": {"corda_method": "ipm"},
    "lora_ga_config": {"direction": "ArB2r"},
    "megatron_core": "megatron.core",
    "qalora_group_size": 32,
    "runtime_config": {"ephemeral_gpu_offload": False},
    "fan_in_fan_out": True,
}


@pytest.mark.parametrize("key", sorted(peft_config.HARMLESS))
def test_a_harmless_key_changes_nothing(base: Base, folder: pathlib.Path, key: str) -> None:
    before = base.load(folder)
    config(**{key: HARMLESS[key]})(folder)
    equal(base.load(folder), before)


@pytest.mark.parametrize(
    "changes",
    [
        {key: value}
        for key in (*peft_config.ONLY, "a_key_of_the_future")
        for value in (None, False, [], {}, "")
    ]
    + [{"init_lora_weights": x} for x in (True, "gaussian", "eva", "orthogonal", "mica")]
    + [{"layers_to_transform": x} for x in ([], [0, 1])]
    + [{"exclude_modules": x} for x in ([], ["vision_tower"])],
)
def test_neutral_values_change_nothing(
    base: Base, folder: pathlib.Path, changes: dict[str, Any]
) -> None:
    before = base.load(folder)
    config(**changes)(folder)
    equal(base.load(folder), before)


def test_the_fewest_keys_are_enough(base: Base, folder: pathlib.Path) -> None:
    """Files of older versions lack what came later."""
    before = base.load(folder)
    path = folder / peft.CONFIG_FILE
    values = json.loads(path.read_text())
    path.write_text(
        json.dumps({k: values[k] for k in ("peft_type", "r", "lora_alpha", "target_modules")})
    )
    equal(base.load(folder), before)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_every_float_dtype_is_read_exactly(base: Base, folder: pathlib.Path, dtype: str) -> None:
    """As its values are in float32, in which adapters are."""

    def cast(to: str) -> Damage:
        return tensors(lambda t: t.update({k: x.astype(jnp.dtype(to)) for k, x in t.items()}))

    before = base.load(folder)
    cast(dtype)(folder)
    got = base.load(folder)
    cast("float32")(folder)
    equal(got, base.load(folder))
    assert {x.dtype for x in jax.tree.leaves(got)} == {jnp.dtype("float32")}
    for path, leaf in tree.flatten(got).items():  # bfloat16 keeps 8 bits
        np.testing.assert_allclose(leaf, tree.flatten(before)[path], rtol=2**-8, err_msg=path)


@pytest.mark.parametrize("inner", ["", "adapter"])
def test_the_links_of_a_hub_cache_are_followed(
    base: Base, folder: pathlib.Path, tmp_path: pathlib.Path, inner: str
) -> None:
    """huggingface_hub keeps snapshots of links into its folder of blobs."""
    root = tmp_path / "models--owner--name"
    snapshot = root / "snapshots" / "0123abc" / inner
    snapshot.mkdir(parents=True)
    (root / "blobs").mkdir()
    for i, file in enumerate((peft.CONFIG_FILE, peft.WEIGHTS_FILE)):
        blob = root / "blobs" / str(i)
        shutil.copy(folder / file, blob)
        (snapshot / file).symlink_to(os.path.relpath(blob, snapshot))
    equal(base.load(snapshot), base.load(folder))
    other = tmp_path / "models--owner--other" / "blobs"
    shutil.copytree(root / "blobs", other)
    (snapshot / peft.WEIGHTS_FILE).unlink()
    (snapshot / peft.WEIGHTS_FILE).symlink_to(other / "1")
    with pytest.raises(errors.UserError, match="outside its folder"):
        base.load(snapshot)


def test_links_inside_the_folder_and_to_the_folder_are_followed(
    base: Base, folder: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    before = base.load(folder)
    (folder / peft.WEIGHTS_FILE).rename(folder / "weights")
    (folder / peft.WEIGHTS_FILE).symlink_to("weights")
    (tmp_path / "link").symlink_to(folder)
    equal(base.load(tmp_path / "link"), before)
