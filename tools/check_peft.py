# SPDX-License-Identifier: Apache-2.0
"""Runs an adapter folder with real PEFT, so that its logits can be compared with this library's.

    pip install torch transformers peft gguf
    python tools/check_peft.py --adapter runs/NAME/best --model FOLDER_OR_GGUF \\
        --tokens tokens.npz --out logits.npz

`--tokens` holds `tokens` (or `input_ids`), int [B, T], and optionally `attention_mask` and
`positions` (or `position_ids`). `--out` gets `logits` [B, T, V] and `base_logits`, the same
without the adapter. PEFT drops keys it does not know with a warning at most; here every tensor of
the file must have arrived in the model unchanged, or the script fails. With `--float64` the model is computed in
double precision (Llama only): float32 alone makes two right implementations differ by 1e-4 in a 30-layer model.
"""

from __future__ import annotations

import argparse
import pathlib
import sys
from typing import Any

import make_goldens
import numpy as np
import peft
import safetensors.torch
import torch
import transformers

NAMES = {"tokens": "input_ids", "positions": "position_ids"}


def load_base(path: pathlib.Path) -> Any:
    """Loads a Hugging Face folder, or a GGUF file dequantised, in float32."""
    if path.suffix == ".gguf":
        folder, options = path.parent, {"gguf_file": path.name}
    else:
        folder, options = path, {}
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, **options
    ).eval()


def check_loaded(adapted: Any, adapter: pathlib.Path) -> int:
    """Exits unless the file's tensors are exactly the model's adapter; returns their number."""
    stored = safetensors.torch.load_file(adapter / "adapter_model.safetensors")
    loaded = peft.get_peft_model_state_dict(adapted, save_embedding_layers=False)
    if stored.keys() != loaded.keys():
        odd = sorted(stored.keys() ^ loaded.keys())
        sys.exit(f"{adapter}: {len(odd)} tensors only in the file or only in PEFT, first {odd[0]}")
    changed = [k for k, t in stored.items() if not torch.equal(t.float(), loaded[k].float())]
    if changed:
        sys.exit(
            f"{adapter}: PEFT holds other values in {len(changed)} tensors, first {changed[0]}"
        )
    return len(stored)


def read_batch(path: pathlib.Path) -> dict[str, torch.Tensor]:
    with np.load(path) as arrays:
        batch = {
            NAMES.get(n, n): torch.from_numpy(arrays[n].astype(np.int64)) for n in arrays.files
        }
    known = ("input_ids", "attention_mask", "position_ids")
    if "input_ids" not in batch:
        sys.exit(f"{path}: no `tokens` or `input_ids`, only {sorted(batch)}")
    return {name: batch[name] for name in known if name in batch}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("adapter", "model", "tokens", "out"):
        parser.add_argument(f"--{name}", type=pathlib.Path, required=True)
    parser.add_argument("--float64", action="store_true")
    args = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    batch = read_batch(args.tokens)
    adapted = peft.PeftModel.from_pretrained(load_base(args.model), args.adapter)
    count = check_loaded(adapted, args.adapter)
    if args.float64:
        make_goldens.to_double(adapted.base_model.model)
    with torch.no_grad():
        logits = adapted(**batch, use_cache=False).logits.numpy()
        with adapted.disable_adapter():
            base_logits = adapted(**batch, use_cache=False).logits.numpy()
    np.savez(args.out, logits=logits, base_logits=base_logits)
    effect = np.abs(logits - base_logits).max()
    print(f"{count} adapter tensors; largest change of a logit {effect:.4g}; wrote {args.out}")


if __name__ == "__main__":
    main()
