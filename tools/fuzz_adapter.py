# SPDX-License-Identifier: Apache-2.0
"""Target of `fuzz`: adapters in PEFT's format, the file of `jft.lora.save`, and the jft.json beside them."""

import copy
import functools
import json
import pathlib
import random
import tempfile
from typing import Any

import fuzz_mutations
import fuzz_tiny
import fuzz_weights
import jax
import numpy as np

from jft import lora, runs
from jft.lora import peft, peft_config
from jft.models import architecture, families

OWN = "own.safetensors"
WORDS = (
    *peft_config.HONOURED, *peft_config.HARMLESS, *peft_config.ONLY, "LORA", "none", "q_proj", "all-linear", "scale",
    ".*", r".*\.(q|k)_proj", "(x*)*", "(a|a)*$", r"(\w+\.)*z", "((.*)*)*x", "(?i)q", "a)(b", r"\1", "(?P<layer>q)", "[[a]",
    "layers", "model.layers.0.self_attn.q_proj", "x{99999999999}", "(" * 300, "(?:" * 3000, "layout", "dropout", "a",
)  # fmt: skip
SIDECAR = {
    "kind": "lora", "base": "x", "revision": "", "dtype": "float32", "fingerprint": "x", "system": "",
    "chat_template": "", "template_sha256": "x", "tokenizer_sha256": "x", "step": 1, "scores": {"loss": 1.0},
    "training": {"model": {"quantize": "none", "quantize_embeddings": "none"}},
}  # fmt: skip


@functools.cache
def base() -> tuple[Any, Any]:
    """The names of modules and the parameters of the model that adapters are for."""
    config, params, _ = fuzz_tiny.model()
    return families.modules(config), params


@functools.cache
def seeds() -> tuple[dict[str, bytes], ...]:
    """Folders as they should be."""
    names, params = base()
    found = []
    for dora in (False, True):
        spec = lora.Spec(
            rank=2, targets=r"layers/.*/kernel", layouts=architecture.LAYOUTS, use_dora=dora
        )
        init = functools.partial(lora.init, spec, key=jax.random.key(1))
        adapters = fuzz_tiny.filled(jax.eval_shape(init, params))
        with tempfile.TemporaryDirectory() as scratch:
            folder = pathlib.Path(scratch)
            peft.save(folder, adapters, names, base_name="tiny")
            lora.save(folder / OWN, adapters)
            found.append({path.name: path.read_bytes() for path in folder.iterdir()})
    return tuple(found)


class Adapter:
    def seeds(self) -> tuple[dict[str, bytes], ...]:
        return seeds()

    def make(self, source: random.Random) -> dict[str, bytes]:
        files = dict(source.choice(seeds()))
        config: Any = json.loads(files[peft.CONFIG_FILE])
        if source.random() < 0.3:
            config |= {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {r"k_proj|v_proj": 4}}
        for _ in range(source.choice((0, 1, 1, 2, 3))):
            config = fuzz_mutations.spoil(source, config, WORDS)
        files[peft.CONFIG_FILE] = fuzz_mutations.text(source, config)
        for name in (peft.WEIGHTS_FILE, OWN):
            if source.random() < 0.5:
                files[name] = _spoilt(source, files[name])
        sidecar = copy.deepcopy(SIDECAR)
        if source.random() < 0.8:
            sidecar = fuzz_mutations.spoil(source, sidecar, tuple(SIDECAR))
        files[runs.SIDECAR] = fuzz_mutations.text(source, sidecar)
        return files

    def read(self, folder: pathlib.Path) -> str:
        names, params = base()
        results = [
            _result(lambda: runs.read_sidecar(folder).quantize.check()),
            _result(lambda: lora.load(folder / OWN, params)),
            _result(lambda: _finite(peft.load(folder, names, params, architecture.LAYOUTS))),
        ]
        return "read" if all(results) else "refused"


def _spoilt(source: random.Random, data: bytes) -> bytes:
    if source.random() < 0.3:
        return fuzz_mutations.spoil_bytes(source, data)
    size = int.from_bytes(data[:8], "little")
    head = json.loads(data[8 : 8 + size])
    held = head.get("__metadata__", {})
    own = next(iter(held.values()), "")
    if own.startswith("{") and source.random() < 0.7:
        held[next(iter(held))] = fuzz_mutations.text(
            source, fuzz_mutations.spoil(source, json.loads(own), WORDS)
        ).decode(errors="replace")
    else:
        head = fuzz_mutations.spoil(source, head, fuzz_weights.WORDS)
    return fuzz_weights.joined(source, head, data[8 + size :])


def _result(read: Any) -> bool:
    """Whether it could be read; one line said why not."""
    import fuzz

    from jft import errors

    try:
        read()
    except errors.UserError as error:
        fuzz.check_message(str(error))
        return False
    return True


def _finite(adapters: lora.Adapters) -> None:
    for path, factors in adapters.items():
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(factors)), path
        assert np.isfinite(factors.scale) and 0 <= factors.dropout < 1, path
