# SPDX-License-Identifier: Apache-2.0
"""MXFP4 against llama.cpp's own dequantiser, whose blocks lie otherwise; and folders that hold experts so."""

import dataclasses
import json
import pathlib

import jax
import numpy as np
import pytest
from safetensors import numpy as safetensors_numpy

from jft import errors
from jft.models import architecture, families, hf, mxfp4


def test_values_equal_those_of_gguf() -> None:
    import gguf

    rng = np.random.default_rng(0)
    blocks = rng.integers(0, 256, (3, 5, 16), np.uint8)
    scales = rng.integers(100, 140, (3, 5), np.uint8)
    got = mxfp4.dequantise(blocks, scales)
    codes = np.stack([blocks & 15, blocks >> 4], axis=-1).reshape(3, 5, 32)
    # A block of ggml's: the scale, then bytes of which byte i holds values i (low bits) and i + 16.
    theirs = np.concatenate([scales[..., None], codes[..., :16] | codes[..., 16:] << 4], axis=-1)
    want = gguf.quants.dequantize(theirs.reshape(3, -1), gguf.GGMLQuantizationType.MXFP4)
    np.testing.assert_array_equal(got, want)


def test_the_scale_that_is_no_number_gives_none() -> None:
    blocks = np.full((1, 16), 0x21, np.uint8)
    assert np.isnan(mxfp4.dequantise(blocks, np.array([255], np.uint8))).all()
    np.testing.assert_array_equal(
        mxfp4.dequantise(blocks, np.array([127], np.uint8))[:4], [0.5, 1.0, 0.5, 1.0]
    )


def test_a_folder_with_packed_experts_loads_as_the_unpacked_one(tmp_path: pathlib.Path) -> None:
    rng = np.random.default_rng(1)
    config = dataclasses.replace(
        families.PRESETS["gpt-oss-20b"],
        vocab_size=20,
        d_model=64,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        d_ff=32,
        experts=architecture.Experts(3, 2, router_bias=True, fused=True),
    )
    plain, packed = {}, {}
    for name, (weight, _) in families.tensors(config).items():
        shape = weight.stored_shape(config)
        if name.endswith(("gate_up_proj", "down_proj")):
            E, inputs, outputs = shape
            blocks = rng.integers(0, 256, (E, outputs, inputs // 32, 16), np.uint8)
            scales = rng.integers(120, 128, (E, outputs, inputs // 32), np.uint8)
            packed |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
            plain[name] = mxfp4.dequantise(blocks, scales).swapaxes(1, 2)
        else:
            plain[name] = packed[name] = rng.standard_normal(shape, np.float32)
    keys = families.to_hf(config)
    method = {"quantization_config": {"quant_method": "mxfp4"}}
    loaded = []
    for folder, tensors, more in (("plain", plain, {}), ("packed", packed, method)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "config.json").write_text(json.dumps(keys | more))
        tensors = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
        safetensors_numpy.save_file(tensors, tmp_path / folder / "model.safetensors")
        loaded.append(hf.load(tmp_path / folder, "float32"))
    assert loaded[0][0] == loaded[1][0] == config
    jax.tree.map(np.testing.assert_array_equal, loaded[0][1], loaded[1][1])
    name = "model.layers.0.mlp.experts.down_proj_scales"
    packed[name] = packed[name][:, :5]
    safetensors_numpy.save_file(packed, tmp_path / "packed" / "model.safetensors")
    with pytest.raises(errors.UserError, match=r"down_proj_scales: U8 \(3, 5, 1\), config.json"):
        hf.load(tmp_path / "packed", "float32")
