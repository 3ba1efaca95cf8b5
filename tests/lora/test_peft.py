# SPDX-License-Identifier: Apache-2.0
"""Adapters on disk: what PEFT wrote gives PEFT's logits, and what we write comes back, byte for byte.

Refusals are in `test_peft_refusals.py`.
"""

import dataclasses
import functools
import json
import pathlib
import random
import shutil
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import numpy as safetensors_numpy

from jft import errors, lora, quant, tree
from jft.lora import dora, peft, peft_config
from jft.models import architecture, decoder, families, hf

# PEFT's logits and ours are float32 sums of up to 96 terms of order 1 in another order: 2e-7 was seen.
ATOL = 1e-5
READ = (
    "default all_linear dora exclude layers_to_transform qv_alpha16 rank_alpha_pattern regex rslora"
).split()
REFUSED = {
    "modules_to_save": "modules_to_save",
    "lm_head_target": "lm_head.base_layer.weight",
}
TARGETS = r"layers/.*/kernel"
CONFIG = architecture.Config(
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


def names_of(c: architecture.Config) -> dict[str, tuple[str, int | None]]:
    return families.modules(c)


def adapted_logits(
    c: architecture.Config, params: Any, adapters: lora.Adapters, tokens: Any
) -> Any:
    apply = lora.transform(functools.partial(decoder.apply, c))
    return jax.jit(apply)(params, adapters, tokens)


def load(folder: pathlib.Path, params: Any, c: architecture.Config = CONFIG) -> lora.Adapters:
    return peft.load(folder, names_of(c), params, architecture.LAYOUTS)


@pytest.fixture(scope="module")
def params() -> Any:
    return jax.jit(lambda: decoder.init(CONFIG, key=jax.random.key(0)))()


def random_adapters(params: Any, targets: str = TARGETS, **spec: Any) -> lora.Adapters:
    """All factors random, so that each tensor of the file matters."""
    wanted = lora.Spec(targets=targets, layouts=architecture.LAYOUTS, **spec)
    init = functools.partial(lora.init, wanted, key=jax.random.key(1))
    rng = np.random.default_rng(2)
    draw = lambda x: jnp.asarray(rng.standard_normal(x.shape, np.float32))  # noqa: E731
    return jax.tree.map(draw, jax.eval_shape(init, params))


def assert_equal(one: lora.Adapters, other: lora.Adapters) -> None:
    assert one.keys() == other.keys()
    for path, factors in one.items():
        for name in ("scale", "layout", "dropout"):
            assert getattr(factors, name) == getattr(other[path], name), (path, name)
    leaves = tree.flatten(other)
    for path, leaf in tree.flatten(one).items():
        np.testing.assert_array_equal(leaf, leaves[path], err_msg=path)


def contents(folder: pathlib.Path) -> list[bytes]:
    return [(folder / file).read_bytes() for file in (peft.CONFIG_FILE, peft.WEIGHTS_FILE)]


@pytest.fixture(scope="module")
def good(params: Any, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("good")
    peft.save(folder, random_adapters(params, rank=3), names_of(CONFIG), base_name="tiny")
    return folder


@pytest.fixture
def folder(good: pathlib.Path, tmp_path: pathlib.Path) -> pathlib.Path:
    """A good adapter, for tests to change."""
    return pathlib.Path(shutil.copytree(good, tmp_path / "adapter"))


def edit_config(folder: pathlib.Path, **changes: Any) -> None:
    path = folder / peft.CONFIG_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(folder: pathlib.Path, change: Callable[[dict[str, np.ndarray]], Any]) -> None:
    path = folder / peft.WEIGHTS_FILE
    tensors = dict(safetensors_numpy.load_file(path))
    change(tensors)
    safetensors_numpy.save_file(tensors, path)


def golden_base(shared: pathlib.Path) -> tuple[pathlib.Path, architecture.Config, Any]:
    folder = shared / "golden" / "peft"
    c, params, _ = hf.load(folder / "base_llama", "float32")
    return folder, c, jax.tree.map(jnp.asarray, params)


@pytest.mark.parametrize("base", ["base_llama", "base_llama_tied"])
def test_bases_give_the_reference_logits(shared: pathlib.Path, base: str) -> None:
    folder = shared / "golden" / "peft" / base
    c, params, _ = hf.load(folder, "float32")
    want = safetensors_numpy.load_file(folder / "expected.safetensors")
    got = jax.jit(functools.partial(decoder.apply, c))(params, want["input_ids"])
    np.testing.assert_allclose(got, want["logits"], rtol=0, atol=ATOL)


@pytest.mark.parametrize("name", READ)
def test_adapters_give_the_logits_of_peft(shared: pathlib.Path, name: str) -> None:
    folder, c, params = golden_base(shared)
    want = safetensors_numpy.load_file(folder / name / "expected.safetensors")
    base = jax.jit(functools.partial(decoder.apply, c))(params, want["input_ids"])
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


@pytest.mark.parametrize("name", READ)
def test_what_peft_wrote_comes_back_from_our_file(
    shared: pathlib.Path, tmp_path: pathlib.Path, name: str
) -> None:
    folder, c, params = golden_base(shared)
    adapters = load(folder / name, params, c)
    peft.save(tmp_path, adapters, names_of(c), base_name="tiny")
    assert_equal(load(tmp_path, params, c), adapters)


@pytest.mark.parametrize("folder", ["init", "final"])
@pytest.mark.parametrize("variant", ["dora_B0", "dora_AB"])
def test_golden_dora_adapters(shared: pathlib.Path, variant: str, folder: str) -> None:
    """Magnitudes start as |W|, whatever B is, and move; `test_goldens.py` trains these."""
    root = shared / "golden" / "tiny"
    c, params, _ = hf.load(root / "model", "float32")
    adapters = load(root / variant / folder, params, c)
    leaves = tree.flatten(params)
    for path, f in adapters.items():
        norms = dora.norms(jnp.asarray(leaves[path]), np.zeros_like(f.a), f.b, f.scale, f.layout)
        off = np.abs(np.asarray(f.magnitude) / np.asarray(norms) - 1).max()
        assert off < 1e-6 if folder == "init" else off > 1e-3, path


# Kinds of adapters: a list, because leaves may differ.
KINDS: dict[str, list[dict[str, Any]]] = {
    "plain": [{"rank": 3, "alpha": 7.0}],
    "two kernels": [
        {"targets": r"layers/attention/(query|out)/kernel", "rank": 2, "alpha": 5.5},
    ],
    # sqrt(3) and sqrt(5) divide nothing exactly: the alphas of the file are what comes nearest.
    "rslora": [
        {"targets": r"layers/mlp/down/kernel", "rank": 3, "alpha": 8.0, "use_rslora": True},
        {"targets": r"layers/mlp/up/kernel", "rank": 5, "alpha": 8.0, "use_rslora": True},
    ],
    "dora, dropout": [{"rank": 2, "use_dora": True, "dropout": 0.05}],
    "ranks and alphas": [
        {"targets": r"layers/attention/.*/kernel", "rank": 2, "alpha": 4.0},
        {"targets": r"layers/mlp/up/kernel", "rank": 5, "alpha": 1.1},
        {"targets": r"layers/mlp/down/kernel", "rank": 5, "alpha": 4.0},
        {"targets": r"layers/mlp/gate/kernel", "rank": 2, "alpha": 0.3},
    ],
    "all at once": [
        {"targets": r"layers/mlp/.*/kernel", "rank": 2, "use_dora": True, "dropout": 0.1},
        {
            "targets": r"layers/attention/.*/kernel",
            "rank": 3,
            "alpha": 0.7,
            "use_dora": True,
            "dropout": 0.1,
        },
    ],
}


def adapters_of(params: Any, kind: str) -> lora.Adapters:
    adapters: lora.Adapters = {}
    for options in KINDS[kind]:
        adapters |= random_adapters(params, **options)
    return adapters


@pytest.mark.parametrize("kind", KINDS)
def test_round_trip(params: Any, tmp_path: pathlib.Path, kind: str) -> None:
    """Arrays come back bit-equal, a file that is read and saved byte-equal, and saving twice gives the same."""
    adapters = adapters_of(params, kind)
    for name in ("one", "two"):
        peft.save(tmp_path / name, adapters, names_of(CONFIG), base_name="tiny", revision="main")
    again = load(tmp_path / "one", params)
    # alpha = scale * r goes through the file; with rsLoRA it may have no exact double.
    exact = {k: dataclasses.replace(f, scale=again[k].scale) for k, f in adapters.items()}
    assert_equal(again, exact)
    for path, factors in adapters.items():
        assert again[path].scale == pytest.approx(
            factors.scale, rel=0 if kind != "rslora" else 1e-15
        )
    peft.save(tmp_path / "three", again, names_of(CONFIG), base_name="tiny", revision="main")
    assert contents(tmp_path / "one") == contents(tmp_path / "two") == contents(tmp_path / "three")


def test_the_file_has_exact_names_for_patterns(params: Any, tmp_path: pathlib.Path) -> None:
    adapters = adapters_of(params, "ranks and alphas")
    peft.save(tmp_path, adapters, names_of(CONFIG), base_name="tiny")
    text = (tmp_path / peft.CONFIG_FILE).read_text()
    config = json.loads(text)
    mlp = "model.layers.{}.mlp.{}_proj"
    assert (config["r"], config["lora_alpha"]) == (2, 4)
    assert config["rank_pattern"] == {
        mlp.format(i, name): 5 for i in range(2) for name in ("up", "down")
    }
    assert config["alpha_pattern"] == {
        mlp.format(i, name): alpha for i in range(2) for name, alpha in (("up", 1.1), ("gate", 0.3))
    }
    assert text == json.dumps(config, indent=2, sort_keys=True) + "\n"


def test_alpha_leads_back_to_the_scale_and_to_itself() -> None:
    numbers = random.Random(0)
    for _ in range(5000):
        rank, x = (
            numbers.randint(1, 300),
            numbers.choice((numbers.random(), numbers.expovariate(0.1))),
        )
        assert peft_config._alpha(x / rank, rank) / rank == x / rank, "some alpha gives it: x"
        alpha = peft_config._alpha(x, rank)
        assert peft_config._alpha(alpha / rank, rank) == alpha, "a second file is like the first"
        assert alpha / rank == pytest.approx(x, rel=1e-15)
    assert [peft_config._alpha(2.0, 16), peft_config._alpha(-0.5, 3)] == [32, -1.5]


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


def test_dora_in_some_layers_leaves_the_others_alone(folder: pathlib.Path, params: Any) -> None:
    """A stacked leaf has magnitudes for all layers: those without an adapter get |W|, which changes nothing."""
    module = "base_model.model.model.layers.1.mlp.up_proj"
    magnitude = np.linspace(0.5, 2, 10, dtype=np.float32)

    def change(tensors: dict[str, np.ndarray]) -> None:
        kept = {k: x for k, x in tensors.items() if k.startswith(module)}
        tensors.clear()
        tensors.update(kept | {f"{module}.lora_magnitude_vector": magnitude})

    edit_tensors(folder, change)
    edit_config(folder, use_dora=True, target_modules=["up_proj"], layers_to_transform=[1])
    adapters = load(folder, params)
    (factors,) = adapters.values()
    w = np.asarray(params["layers"]["mlp"]["up"]["kernel"])
    np.testing.assert_allclose(factors.magnitude[0], np.linalg.norm(w[0], axis=0), rtol=1e-6)
    np.testing.assert_array_equal(factors.magnitude[1], magnitude)
    merged = lora.merge(params, adapters, min_cosine=0).params["layers"]["mlp"]["up"]["kernel"]
    np.testing.assert_allclose(merged[0], w[0], rtol=1e-6)  # a quotient of two equal norms
    direction = w[1] + np.asarray(lora.delta(factors))[1]
    want = magnitude * direction / np.linalg.norm(direction, axis=0)
    np.testing.assert_allclose(merged[1], want, rtol=1e-5)
    packed = tree.replace(
        params, {"layers/mlp/up/kernel": quant.quantize(jnp.asarray(w), "int8", block=2)}
    )
    (factors,) = load(folder, packed).values()
    w = np.asarray(packed["layers"]["mlp"]["up"]["kernel"].dequantize())
    np.testing.assert_allclose(factors.magnitude[0], np.linalg.norm(w[0], axis=0), rtol=1e-6)
    for base in (params, packed):
        with pytest.raises(errors.UserError, match="layers/mlp/up/kernel: layer 0 .*values"):
            load(folder, jax.eval_shape(lambda base=base: base))


def test_shapes_are_enough_for_dora_in_all_layers(params: Any, tmp_path: pathlib.Path) -> None:
    adapters = adapters_of(params, "dora, dropout")
    peft.save(tmp_path, adapters, names_of(CONFIG), base_name="tiny")
    assert_equal(load(tmp_path, jax.eval_shape(lambda: params)), adapters)


def keep(folder: pathlib.Path, modules: list[str]) -> None:
    """Leaves the tensors of these modules in the file."""
    prefixes = tuple(f"base_model.model.model.layers.{m}." for m in modules)

    def change(tensors: dict[str, np.ndarray]) -> None:
        for name in [name for name in tensors if not name.startswith(prefixes)]:
            del tensors[name]

    edit_tensors(folder, change)


@pytest.mark.parametrize(
    ("config", "modules"),
    [
        ({"target_modules": ["up_proj"], "layers_to_transform": 1}, ["1.mlp.up_proj"]),
        (
            {"target_modules": ["up_proj"], "layers_to_transform": [1], "layers_pattern": "layers"},
            ["1.mlp.up_proj"],
        ),
        (
            {
                "target_modules": ["up_proj"],
                "layers_to_transform": [0],
                "layers_pattern": ["h", "layers"],
            },
            ["0.mlp.up_proj"],
        ),
        # A whole name wins over the choice of layers.
        (
            {
                "target_modules": ["model.layers.0.mlp.up_proj", "q_proj"],
                "layers_to_transform": [1],
            },
            ["0.mlp.up_proj", "1.self_attn.q_proj"],
        ),
        ({"target_modules": r".*\.1\..*(up|down)_proj"}, ["1.mlp.up_proj", "1.mlp.down_proj"]),
        (
            {"target_modules": "All-Linear", "exclude_modules": r".*\.1\..*"},
            ["0.mlp", "0.self_attn"],
        ),
        (
            {"target_modules": ["mlp.up_proj", "q_proj"], "exclude_modules": ["1.mlp.up_proj"]},
            ["0.mlp.up_proj", "0.self_attn.q_proj", "1.self_attn.q_proj"],
        ),
    ],
)
def test_targets_are_those_of_peft(
    folder: pathlib.Path, params: Any, config: dict[str, Any], modules: list[str]
) -> None:
    """The expected modules are what PEFT 0.21.2 adapts on a Llama of two layers with these settings."""
    everything = load(folder, params)
    edit_config(folder, **config)
    keep(folder, modules)
    adapters = load(folder, params)
    kept = 0
    for module, (path, layer) in names_of(CONFIG).items():
        if path not in everything:
            continue
        inside = module.removeprefix("model.layers.").startswith(tuple(modules))
        kept += inside
        assert path in adapters or not inside
        if path in adapters:
            want = np.asarray(everything[path].b[layer]) * inside
            np.testing.assert_array_equal(adapters[path].b[layer], want, err_msg=module)
    assert kept


def test_dropout_is_read(folder: pathlib.Path, params: Any) -> None:
    edit_config(folder, lora_dropout=0.25)
    assert {f.dropout for f in load(folder, params).values()} == {0.25}


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"dropout": 0.5}, "lora.dropout is .* for layers/.* but .* PEFT's format has one"),
        ({"magnitude": jnp.ones((2, 10))}, "lora.use_dora is .* but"),
        ({"scale": float("nan")}, "layers/mlp/up/kernel: scale nan"),
        ({"layout": "ibo"}, "layers/mlp/up/kernel: layout 'ibo'"),
        ({"layout": "bbo"}, "layers/mlp/up/kernel: layout 'bbo'"),
        ({"a": jnp.ones((3, 12, 2))}, r"layers/mlp/up/kernel: .*\(3, 12, 2\).* 2 modules"),
    ],
)
def test_what_the_format_cannot_hold_is_refused(
    params: Any, tmp_path: pathlib.Path, changes: dict[str, Any], told: str
) -> None:
    adapters = random_adapters(params, r"layers/mlp/.*/kernel", rank=2)
    path = "layers/mlp/up/kernel"
    adapters[path] = dataclasses.replace(adapters[path], **changes)
    with pytest.raises(errors.UserError, match=told):
        peft.save(tmp_path, adapters, names_of(CONFIG), base_name="tiny")
    assert not list(tmp_path.iterdir())


def test_no_adapter_at_all_cannot_be_written(tmp_path: pathlib.Path) -> None:
    with pytest.raises(errors.UserError, match="no adapter to write"):
        peft.save(tmp_path, {}, names_of(CONFIG), base_name="tiny")


def test_an_embedding_cannot_be_written(params: Any, tmp_path: pathlib.Path) -> None:
    adapters = random_adapters(params, r"embed/embedding", rank=2)
    with pytest.raises(errors.UserError, match="embed/embedding"):
        peft.save(tmp_path, adapters, names_of(CONFIG), base_name="tiny")
