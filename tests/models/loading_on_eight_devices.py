# SPDX-License-Identifier: Apache-2.0
"""Loading onto eight devices equals loading onto one: every shard of every parameter, however it is split."""

import collections
import dataclasses
import json
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, Sharding
from jax.sharding import PartitionSpec as P
from safetensors import numpy as safetensors_numpy

from jft import errors, models, sharding, tree
from jft.models import architecture, decoder, families, hf, placing, quantizing

assert jax.device_count() == 8
MESH = jax.make_mesh((2, 4), ("a", "b"))
Rule = Callable[[str, Any], Sharding]


def small(preset: str) -> architecture.Config:
    """A preset whose every size can be split by eight, its switches kept."""
    config = families.PRESETS[preset]
    return dataclasses.replace(
        config,
        vocab_size=24,
        d_model=64,
        num_layers=8,
        num_heads=8,
        num_kv_heads=8,
        head_dim=8,
        d_ff=40,
        max_length=32,
        experts=config.experts and dataclasses.replace(config.experts, count=8, top_k=2),
    )


# Separate and fused projections, kernels [in, out], experts one by one and all in one.
CONFIGS = {name: small(name) for name in ("llama3.1-8b", "gpt2", "mixtral-8x7b", "gpt-oss-20b")}


SETTINGS = quantizing.Settings("nf4", "int8")
# With whole blocks along the kernels' inputs.
QUANTIZED = {
    name: dataclasses.replace(config, d_ff=128, vocab_size=64) for name, config in CONFIGS.items()
}


def tensors_of(config: architecture.Config) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    rows = families.tensors(config).items()
    return {n: rng.standard_normal(w.stored_shape(config), np.float32) for n, (w, _) in rows}


def write(folder: pathlib.Path, config: architecture.Config) -> dict[str, np.ndarray]:
    tensors = tensors_of(config)
    safetensors_numpy.save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(families.to_hf(config)))
    return tensors


def along(*axes: Any) -> Rule:
    """Splits one dimension over these axes of the mesh: another one for each parameter."""
    count = int(np.prod([MESH.shape[axis] for axis in axes]))
    turn = iter(range(10**6))

    def rule(path: str, leaf: Any) -> Sharding:
        shape = leaf.shape
        fit = [axis for axis, size in enumerate(shape) if size % count == 0]
        assert fit, path
        spec: list[Any] = [None] * len(shape)
        spec[fit[next(turn) % len(fit)]] = axes
        return NamedSharding(MESH, P(*spec))

    return rule


def last(shape: tuple[int, ...], count: int) -> int:
    return max(axis for axis, size in enumerate(shape) if size % count == 0)


def first_and_last(path: str, leaf: Any) -> Sharding:
    shape = leaf.shape
    spec: list[Any] = [None] * len(shape)
    spec[last(shape, 4)] = "b"
    spec[0] = spec[0] or "a"
    return NamedSharding(MESH, P(*spec))


def mixed(path: str, leaf: Any) -> Sharding:
    """Norms on one device that is not the default one, the rest by columns."""
    if "norm" in path:
        return jax.sharding.SingleDeviceSharding(jax.devices()[3])
    return NamedSharding(MESH, P(*[None] * last(leaf.shape, 4), "b"))


def replicated(path: str, leaf: Any) -> Sharding:
    return NamedSharding(MESH, P())


RULES = {
    "over eight": lambda: along("a", "b"),
    "over two, four times the same": lambda: along("a"),
    "over four, twice the same": lambda: along("b"),
    "in two dimensions": lambda: first_and_last,
    "replicated": lambda: replicated,
    "mixed": lambda: mixed,
}


@pytest.fixture(scope="module", params=CONFIGS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp(request.param)
    write(folder, CONFIGS[request.param])
    return folder


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("rule", RULES)
def test_every_shard_equals_a_plain_load(folder: pathlib.Path, rule: str, dtype: str) -> None:
    _, plain, fingerprint = hf.load(folder, dtype)
    asked: dict[str, Sharding] = {}
    chosen = RULES[rule]()

    def shardings(path: str, leaf: Any) -> Sharding:
        assert isinstance(leaf, jax.ShapeDtypeStruct) and leaf.dtype == dtype
        asked[path] = chosen(path, leaf)
        return asked[path]

    _, params, same = hf.load(folder, dtype, shardings)
    assert same == fingerprint
    leaves, wanted = tree.flatten(params), tree.flatten(plain)
    assert list(leaves) == list(wanted) == list(asked)
    for path, leaf in leaves.items():
        assert leaf.sharding == asked[path] and leaf.dtype == dtype, path
        whole = np.asarray(wanted[path])
        assert whole.shape == leaf.shape
        for shard in leaf.addressable_shards:
            np.testing.assert_array_equal(shard.data, whole[shard.index], path)


@pytest.mark.parametrize("preset", CONFIGS)
def test_a_tensor_is_fetched_once_however_many_shards_it_feeds(preset: str) -> None:
    config = CONFIGS[preset]
    tensors, fetched = tensors_of(config), collections.Counter()

    def fetch(name: str) -> np.ndarray:
        fetched[name] += 1
        return tensors[name]

    hf.assemble(config, "float32", fetch, str, along("a", "b"))
    assert fetched == dict.fromkeys(tensors, 1)


@pytest.mark.parametrize("preset", QUANTIZED)
def test_every_shard_of_every_array_of_a_quantised_leaf(
    tmp_path: pathlib.Path, preset: str
) -> None:
    write(tmp_path, QUANTIZED[preset])
    layout = sharding.layout(sharding.Sizes(fsdp=2, expert=2, tensor=2), jax.devices())
    assert layout
    _, plain, _ = hf.load(tmp_path, "bfloat16", quantize=SETTINGS)
    _, params, _ = hf.load(tmp_path, "bfloat16", layout.weight, SETTINGS)
    likes = hf.shapes(tmp_path, "bfloat16", SETTINGS)
    split = 0
    for path, leaf in tree.flatten(params).items():
        placed = layout.weight(path, likes[path])
        arrays = (leaf, tree.flatten(plain)[path], placed)
        for x, want, where in zip(*map(jax.tree.leaves, arrays), strict=True):
            assert x.sharding == where and x.dtype == want.dtype
            whole = np.asarray(want)
            split += x.addressable_shards[0].data.size < whole.size and whole.dtype == np.uint8
            for shard in x.addressable_shards:
                np.testing.assert_array_equal(shard.data, whole[shard.index], path)
    assert split >= 5


@dataclasses.dataclass(frozen=True)
class OneHost:
    """What one of several hosts sees of a sharding: some of its devices."""

    whole: Sharding
    count: int

    def addressable_devices_indices_map(self, shape: tuple[int, ...]) -> dict[Any, Any]:
        found = self.whole.addressable_devices_indices_map(shape)
        return dict(list(found.items())[: self.count])


def test_a_host_fetches_and_holds_what_its_devices_need(monkeypatch: pytest.MonkeyPatch) -> None:
    config, path = CONFIGS["mixtral-8x7b"], "layers/experts/up/kernel"
    tensors, fetched = tensors_of(config), set()

    def fetch(name: str) -> np.ndarray:
        fetched.add(name)
        return tensors[name]

    def rule(path: str, leaf: Any) -> Any:
        shape = leaf.shape
        split = len(shape) == 4 and shape[:2] == (8, 8)  # [L, E, in, out]
        spec = P("a", "b") if split else P()
        return OneHost(NamedSharding(MESH, spec), 3)

    # No array can be made of one host's part alone.
    monkeypatch.setattr(placing, "place", lambda shape, dtype, sharding, parts: parts)
    leaves = tree.flatten(hf.assemble(config, "float32", fetch, str, rule))
    experts = {
        name: index
        for name, (weight, index) in families.tensors(config).items()
        if weight.path == path
    }
    # Three of the 2 x 4 pieces: layers 0 to 3, experts 0 to 5.
    assert {experts[name] for name in fetched & experts.keys()} == {
        (layer, expert) for layer in range(4) for expert in range(6)
    }
    parts = [leaf for key, leaf in leaves.items() if key.startswith(path)]
    assert [part.bounds[:2] for part in parts] == [((0, 4), (e, e + 2)) for e in (0, 2, 4)]
    name = next(name for name, index in experts.items() if index == (3, 5))
    np.testing.assert_array_equal(parts[2].buffer[3, 1], tensors[name].T)
    assert [k for k in leaves if k.startswith("final_norm")] == ["final_norm/scale/0"]


def test_a_host_holds_its_part_of_a_quantised_leaf(monkeypatch: pytest.MonkeyPatch) -> None:
    """Codes, scales, and the mean of the scales, which has a length of 1 where the leaf is split."""
    config, path = QUANTIZED["mixtral-8x7b"], "layers/experts/up/kernel"
    tensors, fetched = tensors_of(config), set()

    def fetch(name: str) -> np.ndarray:
        fetched.add(name)
        return tensors[name]

    def rule(path: str, leaf: Any) -> Any:
        """Layers over `a`, outputs over `b` as far as an array has them; two devices are of this host."""
        experts = len(leaf.shape) == 4 and leaf.shape[1] == 8  # [L, E, in, out]

        def one(x: Any) -> Any:
            spec = P("a", None, None, "b" if x.shape[3] > 1 else None) if experts else P()
            return OneHost(NamedSharding(MESH, spec), 2)

        return jax.tree.map(one, leaf)

    monkeypatch.setattr(placing, "place", lambda shape, dtype, sharding, parts: parts)
    settings = quantizing.Settings("nf4")
    leaves = tree.flatten(hf.assemble(config, "float32", fetch, str, rule, settings))
    how = quantizing.way(path, (8, 8, 64, 128), settings)
    rows = families.tensors(config).items()
    whole = np.stack([tensors[name].T for name, (weight, _) in rows if weight.path == path])
    want = how(jnp.asarray(whole).reshape(8, 8, 64, 128))
    indices = {index for name, (w, index) in rows if w.path == path and name in fetched}
    assert indices == {(layer, expert) for layer in range(4) for expert in range(8)}
    held = jax.tree.leaves(leaves[path], is_leaf=lambda x: isinstance(x, list))
    for x, parts in zip(jax.tree.leaves(want), held, strict=True):
        assert len(parts) == (2 if x.shape[3] > 1 else 1)
        for part in parts:
            own = tuple(slice(*pair) for pair in part.bounds)
            np.testing.assert_array_equal(part.buffer, np.asarray(x)[own])


def test_a_fault_is_told_by_the_row_of_the_file(tmp_path: pathlib.Path) -> None:
    config = CONFIGS["llama3.1-8b"]
    tensors = write(tmp_path, config)
    name = "model.layers.5.self_attn.q_proj.weight"
    tensors[name][43, 2] = np.nan
    safetensors_numpy.save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(errors.UserError, match=f"{name}: has a value .* not finite, in row 43$"):
        hf.load(tmp_path, "bfloat16", along("a", "b"))


def test_models_load_takes_shardings(tiny_model: pathlib.Path) -> None:
    plain = models.load(str(tiny_model))
    found = models.load(str(tiny_model), shardings=replicated)
    assert found.fingerprint == plain.fingerprint
    assert all(len(leaf.devices()) == 8 for leaf in tree.flatten(found.params).values())
    tokens_BT = np.arange(12).reshape(2, 6)
    # The same program on each device: bit for bit.
    np.testing.assert_array_equal(
        found.apply(found.params, tokens_BT), plain.apply(plain.params, tokens_BT)
    )


@pytest.mark.parametrize("shape", [(), (5,), (70000,), (300, 1000), (3, 7, 100000), (2, 90000, 9)])
def test_blocks_cover_an_array_once_and_are_small(shape: tuple[int, ...]) -> None:
    seen = np.zeros(shape, np.uint8)
    for block in placing._blocks(shape):
        seen[block] += 1
        assert seen[block].size <= 1 << 20
    assert (seen == 1).all()


def test_a_bare_array_has_the_shapes_of_the_decoder() -> None:
    for config in CONFIGS.values():
        tensors = tensors_of(config)
        params = hf.assemble(config, "float32", tensors.__getitem__, str)
        shapes = jax.tree.map(lambda leaf: leaf.shape, params)
        assert shapes == jax.tree.map(lambda leaf: leaf.shape, decoder.shapes(config))
