# SPDX-License-Identifier: Apache-2.0
"""Writes a model as a Hugging Face folder: config.json, model.safetensors, tokenizer."""

import json
import pathlib
from typing import Any

import numpy as np

from jft import tree
from jft.models import architecture, families


def save(
    folder: str | pathlib.Path, config: architecture.Config, params: Any, tokenizer: Any
) -> None:
    """Writes the folder; tensors keep the parameters' dtype.

    Args:
      folder: is made; files of the same names are replaced.
      config: of the decoder.
      params: nested dict, layers stacked.
      tokenizer: of transformers; its template goes along.
    """
    from safetensors import numpy as safetensors_numpy

    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    leaves = {path: np.asarray(leaf) for path, leaf in tree.flatten(params).items()}
    tensors = {}
    for name, (weight, index) in families.tensors(config).items():
        array = leaves[weight.path][index]
        tensors[name] = np.ascontiguousarray(weight.to_file(array, config))
    settings = families.to_hf(config) | {"dtype": str(leaves["embed/embedding"].dtype)}
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        settings[key] = getattr(tokenizer, key)
    safetensors_numpy.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(settings, indent=2) + "\n")
    tokenizer.save_pretrained(folder)
