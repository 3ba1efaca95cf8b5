# SPDX-License-Identifier: Apache-2.0
"""The small model that targets of `fuzz` spoil: that of the tests."""

import functools
import importlib.util
import pathlib
from typing import Any

import jax
import numpy as np

from jft.models import architecture, decoder

_TESTS = pathlib.Path(__file__).parents[1] / "tests"


@functools.cache
def model() -> tuple[architecture.Config, decoder.Params, Any]:
    """Its configuration, parameters and tokenizer."""
    spec = importlib.util.spec_from_file_location("tiny", _TESTS / "tiny.py")
    assert spec and spec.loader
    tiny = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tiny)
    words = tiny.tokenizer()
    config = architecture.Config(
        vocab_size=len(words), d_model=64, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=64, d_ff=64,
        max_length=64, tie_embeddings=True,
    )  # fmt: skip
    return config, filled(decoder.shapes(config)), words


def filled(shapes: Any) -> Any:
    """Random arrays of these shapes, for which nothing is compiled."""
    numbers = np.random.default_rng(0)
    return jax.tree.map(lambda x: numbers.standard_normal(x.shape).astype(x.dtype), shapes)
