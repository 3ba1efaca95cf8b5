# SPDX-License-Identifier: Apache-2.0
"""A GGUF file's blocks as quantised parameters: to the bit the values that the gguf package dequantises."""

import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest
import small_models
import test_gguf

from jft import errors, quant, tree
from jft.models import families, gguf, gguf_export, gguf_file, gguf_packed, hf, quantizing

package = pytest.importorskip("gguf")

Kind = package.GGMLQuantizationType
SETTINGS = {kind: quantizing.Settings(kind, "int8") for kind in quant.KINDS}
KEPT = {"Q8_0": ("int8", "int8"), "Q4_0": ("int4", "int4"), "Q4_1": ("int4", "uint4")}


def write(path: pathlib.Path, kind_of: Callable[[str], Any]) -> pathlib.Path:
    """The model of test_gguf with each tensor in a type of its own."""
    with pytest.MonkeyPatch.context() as patched:
        add = test_gguf.add

        def chosen(writer: Any, name: str, tensor: np.ndarray, kind: Any) -> None:
            add(writer, name, tensor, kind_of(name) if tensor.ndim > 1 else kind)

        patched.setattr(test_gguf, "add", chosen)
        return test_gguf.write(path)


def both(path: pathlib.Path, to: str) -> tuple[dict[str, Any], dict[str, Any]]:
    dense, packed = (
        tree.flatten(gguf.load(path, "float32", None, settings)[1])
        for settings in (quantizing.DENSE, SETTINGS[to])
    )
    return dense, packed


@pytest.mark.parametrize("kind", KEPT)
def test_blocks_are_kept(tmp_path: pathlib.Path, kind: str) -> None:
    to, own = KEPT[kind]
    path = write(tmp_path / "m.gguf", lambda name: Kind.Q8_0 if "embed" in name else Kind[kind])
    dense, packed = both(path, to)
    for name, leaf in packed.items():
        np.testing.assert_array_equal(tree.dense(leaf), dense[name], name)
    kernels = {name: leaf for name, leaf in packed.items() if name.endswith("kernel")}
    assert {(leaf.kind, leaf.block) for leaf in kernels.values()} == {(own, 32)}
    sizes = {"Q8_0": 8.5, "Q4_0": 4.5, "Q4_1": 5.0}  # bits per weight, as in the file
    assert {leaf.bits_per_weight for leaf in kernels.values()} == {sizes[kind]}
    assert packed["embed/embedding"].bits_per_weight == 8.5
    for name, like in gguf.shapes(path, "float32", SETTINGS[to]).items():
        pairs = zip(*map(jax.tree.leaves, (packed[name], like)), strict=True)
        assert all((x.shape, x.dtype) == (y.shape, y.dtype) for x, y in pairs)
    (note,) = gguf.notes(path, SETTINGS[to])
    counts = "15 Q8_0" if kind == "Q8_0" else f"14 {kind} and 1 Q8_0"
    assert note == f"m.gguf: {counts} tensors keep their blocks"


@pytest.mark.parametrize("kind", KEPT)
def test_any_block_is_exact(kind: str) -> None:
    """Steps much smaller or larger than the offset, negative and subnormal ones, every code."""
    rng = np.random.default_rng(0)
    floats = 2 if kind == "Q4_1" else 1
    numbers = rng.standard_normal((64, 8, floats)) * 10.0 ** rng.uniform(-9, 4, (64, 8, floats))
    heads = numbers.astype(np.float16).view(np.uint8)
    codes = rng.integers(0, 256, (64, 8, 32 if kind == "Q8_0" else 16), np.uint8)
    raw = np.concatenate([heads, codes], -1).reshape(64, -1)
    want = package.quants.dequantize(raw, Kind[kind])
    like = gguf_packed._like(kind, want.shape, -1, np.dtype(np.float32))
    got = gguf_packed.Leaf(kind, like).join([gguf_packed._parts(raw, kind)])
    np.testing.assert_array_equal(got.dequantize(), want)


def test_types_side_by_side(tmp_path: pathlib.Path) -> None:
    """Q4_0 in Q4_1 is exact; what is neither is quantised again, with 16 steps from a block's least to its largest."""
    mixed = {"layers.0": Kind.Q4_1, "layers.1": Kind.Q4_0, "v_proj": Kind.F16, "embed": Kind.Q5_0}

    def kind_of(name: str) -> Any:
        if "1.mlp.down_proj" in name:
            return Kind.Q8_0
        return [kind for part, kind in mixed.items() if part in name][-1]

    path = write(tmp_path / "m.gguf", kind_of)
    dense, packed = both(path, "int4")
    for name, leaf in packed.items():
        got, want = np.asarray(tree.dense(leaf)), np.asarray(dense[name])
        if name == "layers/mlp/down/kernel":
            np.testing.assert_array_equal(got[0], want[0])
            got, want = (x[1].reshape(16, 32, -1) for x in (got, want))
            # Half a step, and 15 steps' and the offset's rounding to float16: 1.5 / 1024 of the largest.
            step = (want.max(1) - want.min(1)) / 15
            assert (np.abs(got - want).max(1) <= 0.5 * step + 2.0**-9 * np.abs(want).max(1)).all()
        elif "value" in name or "embed" in name:
            assert leaf.block == (64 if "value" in name or leaf.kind == "int8" else 32)
        else:
            np.testing.assert_array_equal(got, want, name)
    (note,) = gguf.notes(path, SETTINGS["int4"])
    kept, again = "6 Q4_1 and 5 Q4_0", "1 Q5_0 and 1 Q8_0"
    assert note == (
        f"m.gguf: {kept} tensors keep their blocks; {again} tensors are dequantised and quantised again"
    )


def test_nf4_is_quantised_again(tmp_path: pathlib.Path) -> None:
    path = write(tmp_path / "m.gguf", lambda name: Kind.Q4_1)
    dense, packed = both(path, "nf4")
    name = "layers/attention/query/kernel"
    how = quantizing.way(name, dense[name].shape, SETTINGS["nf4"])
    assert how
    np.testing.assert_array_equal(packed[name].codes, how(dense[name]).codes)
    (note,) = gguf.notes(path, SETTINGS["nf4"])
    assert note == "m.gguf: 15 Q4_1 tensors are dequantised and quantised again"
    assert gguf.notes(write(tmp_path / "f.gguf", lambda name: Kind.F16), SETTINGS["nf4"]) == ()


@pytest.mark.parametrize("preset", ["mixtral-8x7b", "gpt-oss-20b", "phi3-mini-4k"])
@pytest.mark.parametrize("head_dim", [16, 32])
def test_experts_and_fused_kernels(tmp_path: pathlib.Path, preset: str, head_dim: int) -> None:
    """Blocks that reach over heads of 16 can't stay: they are along no single one of our dimensions."""
    config = small_models.in_blocks(preset)
    heads = {"num_heads": 64 // head_dim, "num_kv_heads": min(config.num_kv_heads, 64 // head_dim)}
    config = dataclasses.replace(config, head_dim=head_dim, **heads)
    rng = np.random.default_rng(0)
    fetch = lambda name: rng.standard_normal(  # noqa: E731
        families.tensors(config)[name][0].stored_shape(config), np.float32
    )
    params = hf.assemble(config, "float32", fetch, str)
    gguf_export.save(tmp_path / "m.gguf", config, params, None, "q8_0")
    dense, packed = both(tmp_path / "m.gguf", "int8")
    for name, leaf in packed.items():
        if not tree.is_quantized(leaf):
            continue
        again = head_dim == 16 and name == "layers/attention/out/kernel"
        assert leaf.block == (64 if again else 32), name
        if not again:
            np.testing.assert_array_equal(leaf.dequantize(), dense[name], name)
    (note,) = gguf.notes(tmp_path / "m.gguf", SETTINGS["int8"])
    assert note.endswith("again") == (head_dim == 16)


def test_a_scale_that_is_not_finite(tmp_path: pathlib.Path) -> None:
    path = write(tmp_path / "m.gguf", lambda name: Kind.Q8_0)
    held = gguf_file.read(path).tensors["blk.1.attn_k.weight"].raw
    damaged = bytearray(path.read_bytes())
    start = bytes(damaged).find(held.tobytes())
    damaged[start + 34 : start + 36] = np.float16(np.inf).tobytes()
    path.write_bytes(damaged)
    with pytest.raises(errors.UserError) as caught:
        gguf.load(path, "float32", None, SETTINGS["int8"])
    said = "blk.1.attn_k.weight: has a block with a scale that is not finite"
    assert str(caught.value) == f"{path}: {said}"
