# SPDX-License-Identifier: Apache-2.0
"""Supervised fine-tuning with LoRA on your own prompt -> response examples.

    jft train --config=configs/sft.py:smollm2-135m --config.data.train=examples.jsonl

A run of five steps, to see that everything works:

    jft train --config=configs/sft.py --config.data.train=configs/data/support/train.jsonl --config.run_dir=runs/tiny \
        --config.steps=5 --config.batch_size=2 --config.data.max_length=256 --config.validate.samples=4

The argument is a preset's name (`smollm2-135m`, `llama3.2-1b`, ...); any other model goes into --config.model.path.
"""

from ml_collections import config_dict

from jft import config, errors

# Where each preset's instruction-tuned checkpoint lives on the Hub; the first comes with jft.
PRESETS = {
    "smollm2-135m": "smollm2-135m-instruct",
    "smollm2-360m": "HuggingFaceTB/SmolLM2-360M-Instruct",
    "smollm2-1.7b": "HuggingFaceTB/SmolLM2-1.7B-Instruct",
    "llama3.2-1b": "meta-llama/Llama-3.2-1B-Instruct",
    "llama3.2-3b": "meta-llama/Llama-3.2-3B-Instruct",
    "llama3.1-8b": "meta-llama/Llama-3.1-8B-Instruct",
    "llama3.1-70b": "meta-llama/Llama-3.1-70B-Instruct",
}


def get_config(preset: str = "smollm2-135m") -> config_dict.ConfigDict:
    if preset not in PRESETS:
        raise errors.UserError(f"configs/sft.py:{preset}: a preset is one of {', '.join(PRESETS)}")
    c = config.base()
    c.model.path = PRESETS[preset]
    c.model.dtype = "float32" if preset == "smollm2-135m" else "bfloat16"
    c.run_dir = f"runs/{preset}"
    return c
