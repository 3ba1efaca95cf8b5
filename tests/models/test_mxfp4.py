# SPDX-License-Identifier: Apache-2.0
"""MXFP4 against llama.cpp's own dequantiser, whose blocks lie otherwise."""

import numpy as np

from jft.models import mxfp4


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
