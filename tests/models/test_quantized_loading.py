# SPDX-License-Identifier: Apache-2.0
"""Quantising while loading: tensor by tensor it gives the bits of the whole, for every family; what can't be is refused."""

import dataclasses
import functools
import json
import pathlib
import tracemalloc
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import small_models
import test_hf

from jft import config, errors, lora, models, program, tree
from jft.models import architecture, decoder, families, hf, packing, quantizing

NF4 = quantizing.Settings("nf4", "int8")
LLAMA, GPT2, MIXTRAL, OSS = "llama3.1-8b", "gpt2", "mixtral-8x7b", "gpt-oss-20b"


def write(folder: pathlib.Path, preset: str, dtype: Any = np.float32) -> architecture.Config:
    config = small_models.in_blocks(preset)
    test_hf.write(folder, test_hf.make(config, dtype), config)
    return config


def same(got: Any, want: Any, where: str) -> None:
    """The same leaf to the bit, whatever it is made of."""
    assert jax.tree.structure(got) == jax.tree.structure(want), where
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y, where)


def as_a_whole(params: Any, to: quantizing.Settings, dtype: Any = np.float32) -> dict[str, Any]:
    """Dense float32 parameters, each quantised in one piece."""
    found = {}
    for path, x in tree.flatten(params).items():
        how = quantizing.way(path, x.shape, to)
        found[path] = jnp.asarray(x, dtype) if how is None else _whole(x, how)
    return found


_whole = jax.jit(lambda x, how: how(x), static_argnums=1)


QUICK = ("smollm2-135m", "gpt-oss-20b")  # each takes seconds to compile: the others are slow tests


@pytest.mark.usefixtures("quick_compiles")
@pytest.mark.parametrize(
    "preset",
    [
        name if name in QUICK else pytest.param(name, marks=pytest.mark.slow)
        for name in small_models.ONE_EACH
    ],
)
def test_every_family(tmp_path: pathlib.Path, preset: str) -> None:
    config = write(tmp_path, preset)
    _, dense, fingerprint = hf.load(tmp_path, "float32")
    _, params, own = hf.load(tmp_path, "float32", quantize=NF4)
    assert own == fingerprint
    found, want = tree.flatten(params), as_a_whole(dense, NF4)
    for path, leaf in found.items():
        same(leaf, want[path], path)
    kernels = [path for path, leaf in found.items() if tree.is_quantized(leaf)]
    assert {"embed/embedding", "layers/attention/out/kernel"} <= set(kernels)
    values = jax.tree.map(tree.dense, params, is_leaf=tree.is_quantized)
    tokens_BT = np.arange(10).reshape(2, 5)
    apply = jax.jit(lora.transform(functools.partial(decoder.apply, config)))
    logits = [apply(own, {}, tokens_BT) for own in (params, values)]
    # The same products; how XLA fuses them may differ.
    np.testing.assert_allclose(*logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "stored"),
    [("nf4", ml_dtypes.bfloat16), ("int4", np.float16), ("int8", np.float32)],
)
def test_from_what_is_stored_and_in_pieces(
    tmp_path: pathlib.Path, kind: str, stored: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not from values rounded to the parameters' dtype; blocks along a tensor's first axis (GPT-2's) stay whole."""
    settings = quantizing.Settings(kind, "int8")
    for preset in (LLAMA, GPT2, MIXTRAL, OSS):
        folder = tmp_path / preset
        write(folder, preset, stored)
        dense = hf.load(folder, "float32")[1]
        with monkeypatch.context() as patched:
            patched.setattr(packing, "_PIECE", 1000)
            found = tree.flatten(hf.load(folder, "bfloat16", quantize=settings)[1])
        for path, want in as_a_whole(dense, settings, jnp.bfloat16).items():
            leaf = found[path]
            assert leaf.dtype == jnp.bfloat16
            for x, y in zip(jax.tree.leaves(leaf), jax.tree.leaves(want), strict=True):
                np.testing.assert_array_equal(x, y, path)


def test_a_mean_of_scales_does_not_depend_on_the_program() -> None:
    """Sums in another order have other last bits, as XLA's own do for arrays of this size."""
    x = np.random.default_rng(0).standard_normal((3, 4096, 640), np.float32)
    how = quantizing.Way("nf4", -2, 64, True, 1)
    whole = jax.jit(how)(x)
    for i in range(3):
        one = jax.jit(lambda x: how(x, gone=1))(x[i])
        same(jax.tree.map(lambda x, i=i: x[i], whole), one, str(i))


def test_host_memory_is_for_one_packed_tensor_and_the_packed_leaves(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What numpy takes; XLA sees pieces. tools/bench_load.py measures the whole process."""
    config = dataclasses.replace(
        small_models.in_blocks(LLAMA), d_model=256, d_ff=1024, num_layers=8, vocab_size=512
    )
    test_hf.write(tmp_path, test_hf.make(config, ml_dtypes.bfloat16), config)
    largest, blocks = [0], packing._blocks

    def seen(x: np.ndarray, *rest: Any) -> Any:
        largest[0] = max(largest[0], x.size)
        return blocks(x, *rest)

    monkeypatch.setattr(packing, "_blocks", seen)
    monkeypatch.setattr(packing, "_PIECE", 1 << 16)
    hf.load(tmp_path, "bfloat16", quantize=NF4)  # what is compiled and cached stays out of it
    tracemalloc.start()
    params = hf.load(tmp_path, "bfloat16", quantize=NF4)[1]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    kept = tree.nbytes(params)
    dense = 2 * tree.size(params)
    assert 0 < largest[0] <= 1 << 16 and kept < 0.3 * dense
    # Codes of the largest tensor, [1024, 256] in 4 bits, and small objects of Python's.
    assert kept < peak < kept + 1024 * 256 // 2 + 1e6 < 0.4 * dense


def test_shapes_are_those_that_are_loaded(tmp_path: pathlib.Path) -> None:
    write(tmp_path, OSS)
    got = tree.flatten(hf.load(tmp_path, "bfloat16", quantize=NF4)[1])
    for path, like in hf.shapes(tmp_path, "bfloat16", NF4).items():
        assert jax.tree.structure(got[path]) == jax.tree.structure(like)
        pairs = zip(jax.tree.leaves(got[path]), jax.tree.leaves(like), strict=True)
        assert all((x.shape, x.dtype) == (y.shape, y.dtype) for x, y in pairs)


def refusal(folder: pathlib.Path, settings: quantizing.Settings) -> str:
    with pytest.raises(errors.UserError) as caught:
        hf.load(folder, "float32", quantize=settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("settings", [NF4, quantizing.Settings("int8")], ids=str)
def test_values_that_are_not_finite(
    tmp_path: pathlib.Path, value: float, settings: quantizing.Settings
) -> None:
    config = write(tmp_path, LLAMA)
    tensors = test_hf.make(config)
    tensors[test_hf.UP][77, 5] = value
    test_hf.write(tmp_path, tensors, config)
    said = refusal(tmp_path, settings)
    assert said.endswith(f"{test_hf.UP}: has a value that is not finite, in row 77")


def test_a_shape_that_allows_no_block(tmp_path: pathlib.Path) -> None:
    config = small_models.small(LLAMA)
    test_hf.write(tmp_path, test_hf.make(config), config)
    said = refusal(tmp_path, NF4)
    assert said.startswith("model.quantize") and "multiple of a block of 64" in said


@pytest.mark.parametrize("tied", [True, False])
def test_a_quantised_model_computes_what_the_dequantised_one_does(tied: bool) -> None:
    """Also the embedding's rows and the head, for whole rows and for a few, without the transform."""
    config = dataclasses.replace(small_models.in_blocks(LLAMA), tie_embeddings=tied)
    dense = tree.flatten(decoder.init(config, key=jax.random.key(0)))
    to = quantizing.Settings("nf4", "int8")
    ways = {path: quantizing.way(path, x.shape, to) for path, x in dense.items()}
    assert ways["embed/embedding"]
    packed = tree.unflatten(
        {path: how(dense[path]) if (how := ways[path]) else dense[path] for path in dense}
    )
    values = jax.tree.map(tree.dense, packed, is_leaf=tree.is_quantized)
    tokens = jnp.arange(12).reshape(2, 6)
    few = lambda params: decoder.head(config, params, jnp.ones((2, config.d_model)), few=True)  # noqa: E731
    apply = lambda params: decoder.apply(config, params, tokens)  # noqa: E731
    for f in (apply, few):
        # Float32 sums of 64 to 128 terms in another order.
        np.testing.assert_allclose(f(packed), f(values), rtol=1e-5, atol=1e-5)


def test_kinds_that_there_are_not(tmp_path: pathlib.Path) -> None:
    for settings, said in (
        (quantizing.Settings("nf3"), "model.quantize='nf3': one of none, nf4, int4, int8"),
        (quantizing.Settings("nf4", "nf4"), "model.quantize_embeddings='nf4': one of none, int8"),
    ):
        with pytest.raises(errors.UserError, match=said):
            models.load(str(tmp_path), quantize=settings)


def test_mxfp4_is_told(tmp_path: pathlib.Path) -> None:
    config = small_models.in_blocks(OSS)
    tensors = test_hf.make(config)
    for name in [name for name in tensors if "experts." in name and not name.endswith("bias")]:
        E, inputs, outputs = tensors.pop(name).shape
        tensors[f"{name}_blocks"] = np.zeros((E, outputs, inputs // 32, 16), np.uint8)
        tensors[f"{name}_scales"] = np.full((E, outputs, inputs // 32), 127, np.uint8)
    (tmp_path / "config.json").write_text(json.dumps(families.to_hf(config)))
    with pytest.MonkeyPatch.context() as patched:
        patched.setitem(test_hf.DTYPES, "uint8", "U8")
        test_hf.write_file(tmp_path / "model.safetensors", tensors)
    (note,) = hf.notes(tmp_path, NF4)
    count = 2 * config.num_layers
    assert note == f"{tmp_path.name}: {count} MXFP4 tensors are dequantised and quantised again"
    assert hf.notes(tmp_path, quantizing.Settings("none", "int8")) == ()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"quantize": "nf4"}, r"model.quantize=nf4 keeps the base frozen: .*lora.rank above 0"),
        ({"quantize": "q4"}, "model.quantize='q4': one of none, nf4, int4, int8"),
    ],
)
def test_a_plan_refuses_what_training_refuses(changes: Any, said: str) -> None:
    c = config.base()
    c.lora.rank = 0
    c.model.update(changes)
    small = small_models.in_blocks(LLAMA)
    with pytest.raises(errors.UserError, match=said):
        program.build(c, small, layout=None, backend="cpu", length=8, steps=1)
