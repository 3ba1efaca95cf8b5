# SPDX-License-Identifier: Apache-2.0
"""Target of `fuzz`: the JSON of a model's folder: configuration, tokenizer, what a quantised base says of itself."""

import copy
import functools
import json
import pathlib
import random
import tempfile
from typing import Any

import fuzz_mutations
import fuzz_tiny
import jax

from jft.models import export, families, hf, packed_folder, quantizing

TEXT = "hello the user asks for red 123\n\n  x"
QUANTIZED = quantizing.Settings("int8")
WORDS = (
    "auto_map", "tokenizer_class", "rope_scaling", "rope_parameters", "rope_type", "llama3", "yarn", "factor", "layer_types",
    "sliding_window", "num_hidden_layers", "num_local_experts", "quantization_config", "Replace", "Sequence", "Split", "type",
    "normalizer", "pre_tokenizer", "post_processor", "padding", "truncation", "vocab", "merges", "added_tokens", "special",
    "leaves", "tensors", "seal", "int4", "nf4", "codes", "file", "shape", "sha256", "chat_template", "model_max_length",
)  # fmt: skip
NORMALIZER = {"type": "Replace", "pattern": {"String": "e"}, "content": "ee"}


@functools.cache
def seeds() -> tuple[dict[str, bytes], ...]:
    """Folders of a model and of a quantised one, as they should be."""
    config, params, words = fuzz_tiny.model()
    with tempfile.TemporaryDirectory() as scratch:
        whole, packed = (pathlib.Path(scratch) / name for name in ("whole", "packed"))
        export.save(whole, config, params, words)
        packed.mkdir()
        _, quantized, print_ = hf.load(whole, "float32", quantize=QUANTIZED)
        origin = packed_folder.Origin("tiny", None, print_, QUANTIZED)
        packed_folder.write(packed, _flat(quantized), origin, 1 << 30)
        for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
            (packed / name).write_bytes((whole / name).read_bytes())
        return tuple(
            {p.name: p.read_bytes() for p in f.iterdir() if p.is_file()} for f in (whole, packed)
        )


def _flat(params: Any) -> dict[str, Any]:
    from jft import tree

    return jax.device_get(tree.flatten(params))


@functools.cache
def configs() -> tuple[dict[str, Any], ...]:
    """config.json of every family."""
    return tuple(
        families.to_hf(next(iter(own.presets.values()))) for own in families.FAMILIES.values()
    )


class Folder:
    def seeds(self) -> tuple[dict[str, bytes], ...]:
        return seeds()

    def make(self, source: random.Random) -> dict[str, bytes]:
        files = dict(source.choice(seeds()))
        names = [name for name in files if name.endswith(".json")]
        for name in source.sample(names, source.choice((1, 1, 2))):
            value = json.loads(files[name])
            if name == "config.json" and source.random() < 0.6:
                value = copy.deepcopy(source.choice(configs()))
            if name == "tokenizer.json" and source.random() < 0.2:
                value["normalizer"] = {
                    "type": "Sequence",
                    "normalizers": [NORMALIZER] * source.randint(1, 40),
                }
            for _ in range(source.choice((1, 1, 2, 3))):
                value = fuzz_mutations.spoil(source, value, WORDS)
            if name == packed_folder.RECORD and isinstance(value, dict) and source.random() < 0.8:
                value = _sealed(value)
            files[name] = fuzz_mutations.text(source, value)
        return files

    def read(self, folder: pathlib.Path) -> str:
        config = hf.read_config(folder)
        families.modules(config)
        words = hf.tokenizer(folder)
        assert len(words(TEXT).input_ids) < 10_000
        if packed_folder.is_one(folder):
            packed_folder.shapes(folder, "float32", QUANTIZED)
            packed_folder.load(folder, "float32", None, QUANTIZED)
        else:
            hf.shapes(folder, "float32", quantizing.DENSE)
            hf.load(folder, "float32")
        return "read"


def _sealed(record: dict[str, Any]) -> dict[str, Any]:
    """With the seal that fits: it is against damage, and anybody can make it."""
    import hashlib

    rest = {key: value for key, value in record.items() if key != "seal"}
    return rest | {"seal": hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()}
