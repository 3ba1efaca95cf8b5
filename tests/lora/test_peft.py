# SPDX-License-Identifier: Apache-2.0
"""Adapters on disk: what PEFT wrote gives PEFT's logits, what we write comes back, damage is refused by name."""

import json
import pathlib
import shutil
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import numpy as safetensors_numpy

from jft import errors, lora
from jft.lora import peft
from jft.models import decoder, hf, llama

# PEFT's logits and ours are float32 sums of up to 96 terms of order 1 in another order: 2e-7 was seen.
ATOL = 1e-5
READ = (
    "default all_linear exclude layers_to_transform qv_alpha16 rank_alpha_pattern regex rslora"
).split()
REFUSED = {
    "dora": "use_dora",
    "modules_to_save": "modules_to_save",
    "lm_head_target": "lm_head.base_layer.weight",
}
TARGETS = r"layers/.*/kernel"
QUERY = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"
CONFIG = decoder.Config(
    vocab_size=23,
    d_model=12,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=6,
    d_ff=10,
    max_length=32,
    tie_embeddings=True,
)


def names_of(c: decoder.Config) -> dict[str, tuple[str, int | None]]:
    return {m: (w.path, layer) for m, (w, layer) in llama.modules(c).items()}


def adapted_logits(c: decoder.Config, params: Any, adapters: lora.Adapters, tokens: Any) -> Any:
    return lora.transform(lambda p, t: decoder.apply(c, p, t))(params, adapters, tokens)


def load(folder: pathlib.Path, params: Any, c: decoder.Config = CONFIG) -> lora.Adapters:
    return peft.load(folder, names_of(c), params, decoder.LAYOUTS)


@pytest.fixture(scope="module")
def params() -> Any:
    return decoder.init(CONFIG, key=jax.random.key(0))


def random_adapters(params: Any, targets: str = TARGETS, **spec: Any) -> lora.Adapters:
    """Both factors random, so that each tensor of the file matters."""
    fresh = lora.init(
        lora.Spec(targets=targets, layouts=decoder.LAYOUTS, **spec), params, key=jax.random.key(1)
    )
    leaves, structure = jax.tree.flatten(fresh)
    keys = jax.random.split(jax.random.key(2), len(leaves))
    filled = [jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(structure, filled)


@pytest.fixture(scope="module")
def good(params: Any, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("good")
    peft.save(folder, random_adapters(params, rank=3), names_of(CONFIG), base_name="tiny")
    return folder


@pytest.fixture
def folder(good: pathlib.Path, tmp_path: pathlib.Path) -> pathlib.Path:
    """A good adapter, for tests to damage."""
    return pathlib.Path(shutil.copytree(good, tmp_path / "adapter"))


def edit_config(folder: pathlib.Path, **changes: Any) -> None:
    path = folder / peft.CONFIG_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(folder: pathlib.Path, change: Callable[[dict[str, np.ndarray]], Any]) -> None:
    path = folder / peft.WEIGHTS_FILE
    tensors = dict(safetensors_numpy.load_file(path))
    change(tensors)
    safetensors_numpy.save_file(tensors, path)


def golden_base(shared: pathlib.Path) -> tuple[pathlib.Path, decoder.Config, Any]:
    folder = shared / "golden" / "peft"
    c, params, _ = hf.load(folder / "base_llama", "float32")
    return folder, c, jax.tree.map(jnp.asarray, params)


@pytest.mark.parametrize("base", ["base_llama", "base_llama_tied"])
def test_bases_give_the_reference_logits(shared: pathlib.Path, base: str) -> None:
    folder = shared / "golden" / "peft" / base
    c, params, _ = hf.load(folder, "float32")
    want = safetensors_numpy.load_file(folder / "expected.safetensors")
    got = decoder.apply(c, jax.tree.map(jnp.asarray, params), want["input_ids"])
    np.testing.assert_allclose(got, want["logits"], rtol=0, atol=ATOL)


@pytest.mark.parametrize("name", READ)
def test_adapters_give_the_logits_of_peft(shared: pathlib.Path, name: str) -> None:
    folder, c, params = golden_base(shared)
    want = safetensors_numpy.load_file(folder / name / "expected.safetensors")
    base = decoder.apply(c, params, want["input_ids"])
    assert np.abs(base - want["logits"]).max() > 100 * ATOL, "the adapter's effect is seen"
    got = adapted_logits(c, params, load(folder / name, params, c), want["input_ids"])
    np.testing.assert_allclose(got, want["logits"], rtol=0, atol=ATOL)


@pytest.mark.parametrize("name", REFUSED)
def test_unimplemented_adapters_are_refused_by_name(shared: pathlib.Path, name: str) -> None:
    folder, c, params = golden_base(shared)
    with pytest.raises(errors.UserError, match=REFUSED[name]) as caught:
        load(folder / name, params, c)
    assert name in str(caught.value) and "\n" not in str(caught.value)


def test_every_golden_adapter_is_in_one_of_the_lists(shared: pathlib.Path) -> None:
    folders = {f.parent.name for f in (shared / "golden" / "peft").glob("*/adapter_config.json")}
    assert folders == {*READ, *REFUSED}


@pytest.mark.parametrize(
    ("targets", "spec"),
    [
        (TARGETS, {"rank": 3, "alpha": 7.0}),
        (r"layers/attention/(query|out)/kernel", {"rank": 2, "alpha": 5.5}),
        (r"layers/mlp/down/kernel", {"rank": 4, "alpha": 8.0, "use_rslora": True}),
    ],
)
def test_round_trip_is_bit_equal(
    params: Any, tmp_path: pathlib.Path, targets: str, spec: dict[str, Any]
) -> None:
    adapters = random_adapters(params, targets, **spec)
    peft.save(tmp_path, adapters, names_of(CONFIG), base_name="tiny")
    again = load(tmp_path, params)
    assert again.keys() == adapters.keys()
    for path, factors in adapters.items():
        np.testing.assert_array_equal(again[path].a, factors.a)
        np.testing.assert_array_equal(again[path].b, factors.b)
        assert again[path].layout == factors.layout
        # alpha = scale * r goes through the file: a product and a quotient of doubles.
        assert again[path].scale == pytest.approx(factors.scale, rel=1e-15)


def test_round_trip_with_ranks_and_scales_of_their_own(params: Any, tmp_path: pathlib.Path) -> None:
    adapters = random_adapters(params, r"layers/attention/.*/kernel", rank=2, alpha=4.0)
    adapters |= random_adapters(params, r"layers/mlp/up/kernel", rank=5, alpha=1.0)
    peft.save(tmp_path, adapters, names_of(CONFIG), base_name="tiny")
    tokens = jnp.arange(10)[None]
    want = adapted_logits(CONFIG, params, adapters, tokens)
    got = adapted_logits(CONFIG, params, load(tmp_path, params), tokens)
    np.testing.assert_array_equal(got, want)


def test_saving_twice_gives_the_same_bytes(params: Any, tmp_path: pathlib.Path) -> None:
    adapters = random_adapters(params, rank=2)
    for name in ("one", "two"):
        peft.save(tmp_path / name, adapters, names_of(CONFIG), base_name="tiny")
    for file in (peft.CONFIG_FILE, peft.WEIGHTS_FILE):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_layers_without_adapter_and_with_other_ranks(folder: pathlib.Path, params: Any) -> None:
    """One layer of the stack has another rank and scale, or none: the sum of updates is the file's."""
    module = "model.layers.0.mlp.up_proj"
    a = np.ones((1, 12), np.float32)
    b = np.arange(10, dtype=np.float32)[:, None]

    def change(tensors: dict[str, np.ndarray]) -> None:
        tensors.clear()
        tensors[f"base_model.model.{module}.lora_A.weight"] = a
        tensors[f"base_model.model.{module}.lora_B.weight"] = b
        other = module.replace("0", "1")
        tensors[f"base_model.model.{other}.lora_A.weight"] = np.repeat(a, 2, 0)
        tensors[f"base_model.model.{other}.lora_B.weight"] = np.repeat(b, 2, 1)

    edit_tensors(folder, change)
    edit_config(
        folder,
        target_modules=["up_proj"],
        r=2,
        lora_alpha=6,
        rank_pattern={module: 1},
        alpha_pattern={module: 0.5},
    )
    (factors,) = load(folder, params).values()
    delta = np.asarray(lora.delta(factors))
    np.testing.assert_allclose(delta[0], 0.5 * a.T @ b.T, rtol=1e-6)  # float32 products
    np.testing.assert_allclose(delta[1], 3.0 * 2 * a.T @ b.T, rtol=1e-6)


TENSOR_DAMAGE: dict[str, tuple[Callable[[dict[str, np.ndarray]], Any], str]] = {
    "missing": (lambda t: t.pop(QUERY), f"missing {QUERY}"),
    "extra": (lambda t: t.update({"odd.weight": np.zeros(2, np.float32)}), "odd.weight"),
    "nan": (lambda t: t[QUERY].__setitem__((0, 0), np.nan), f"{QUERY} .*not finite"),
    "infinite": (lambda t: t[QUERY].__setitem__((0, 0), np.inf), f"{QUERY} .*not finite"),
    "rank": (lambda t: t.update({QUERY: t[QUERY][:2]}), r"layers.1.self_attn.q_proj .*r=3"),
    "inputs": (
        lambda t: t.update({QUERY: np.ascontiguousarray(t[QUERY][:, :5])}),
        r"layers/attention/query/kernel layer 1 .*\(3, 5\)",
    ),
    "vector": (lambda t: t.update({QUERY: t[QUERY].reshape(-1)}), "q_proj|query"),
}


@pytest.mark.parametrize("damage", TENSOR_DAMAGE)
def test_damaged_tensors_are_refused(folder: pathlib.Path, params: Any, damage: str) -> None:
    change, told = TENSOR_DAMAGE[damage]
    load(folder, params)
    edit_tensors(folder, change)
    with pytest.raises(errors.UserError, match=told) as caught:
        load(folder, params)
    assert peft.WEIGHTS_FILE in str(caught.value)


CONFIG_DAMAGE: dict[str, tuple[dict[str, Any], str]] = {
    "no alpha": ({"lora_alpha": None}, "lora_alpha is missing"),
    "no rank": ({"r": None}, "r is missing"),
    "another rank": ({"r": 2}, "r=2"),
    "zero rank": ({"r": 0}, "r=0"),
    "kind": ({"peft_type": "IA3"}, "IA3"),
    "dora": ({"use_dora": True}, "use_dora"),
    "bias": ({"bias": "all"}, "bias"),
    "saved modules": ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
    "pissa": ({"init_lora_weights": "pissa"}, "init_lora_weights"),
    "no targets": ({"target_modules": None}, "target_modules is missing"),
    "foreign targets": ({"target_modules": ["c_attn"]}, "c_attn"),
    "fewer targets": ({"target_modules": ["q_proj"]}, "does not ask for"),
    "excluded": ({"exclude_modules": ["q_proj"]}, "does not ask for"),
    "some layers": ({"layers_to_transform": [0]}, "does not ask for"),
    "patterns in conflict": ({"alpha_pattern": {"q_proj": 4, "0.self_attn.q_proj": 8}}, "alpha_p"),
    "tied head": ({"target_modules": ["q_proj", "lm_head"]}, "lm_head"),
    "pattern that is none": ({"target_modules": "("}, "target_modules"),
}


@pytest.mark.parametrize("damage", CONFIG_DAMAGE)
def test_damaged_configurations_are_refused(folder: pathlib.Path, params: Any, damage: str) -> None:
    changes, told = CONFIG_DAMAGE[damage]
    edit_config(folder, **changes)
    with pytest.raises(errors.UserError, match=told) as caught:
        load(folder, params)
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


def test_an_adapter_of_a_tied_head_is_refused(folder: pathlib.Path, params: Any) -> None:
    """PEFT adapts the head alone; here head and embedding are one leaf."""
    edit_config(folder, target_modules=["lm_head"])
    edit_tensors(folder, lambda t: (t.clear(), t.update(_pair("lm_head", 12, 23))))
    with pytest.raises(errors.UserError, match="head"):
        load(folder, params)


def _pair(module: str, inputs: int, outputs: int) -> dict[str, np.ndarray]:
    shapes = {"A": (3, inputs), "B": (outputs, 3)}
    prefix = f"base_model.model.{module}.lora_"
    return {f"{prefix}{x}.weight": np.ones(shape, np.float32) for x, shape in shapes.items()}


@pytest.mark.parametrize("text", ["", "{", "[]", "null"])
def test_a_configuration_that_is_no_object_is_refused(
    folder: pathlib.Path, params: Any, text: str
) -> None:
    (folder / peft.CONFIG_FILE).write_text(text)
    with pytest.raises(errors.UserError, match=peft.CONFIG_FILE):
        load(folder, params)


@pytest.mark.parametrize("file", [peft.CONFIG_FILE, peft.WEIGHTS_FILE])
def test_a_missing_file_is_named(folder: pathlib.Path, params: Any, file: str) -> None:
    (folder / file).unlink()
    with pytest.raises(errors.UserError, match=file):
        load(folder, params)


def test_cut_off_weights_are_refused(folder: pathlib.Path, params: Any) -> None:
    path = folder / peft.WEIGHTS_FILE
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(errors.UserError, match=peft.WEIGHTS_FILE):
        load(folder, params)


def test_an_embedding_cannot_be_written(params: Any, tmp_path: pathlib.Path) -> None:
    adapters = random_adapters(params, r"embed/embedding", rank=2)
    with pytest.raises(errors.UserError, match="embed/embedding"):
        peft.save(tmp_path, adapters, names_of(CONFIG), base_name="tiny")
