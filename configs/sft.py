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
    "smollm3-3b": "HuggingFaceTB/SmolLM3-3B",
    "mistral-7b-v0.3": "mistralai/Mistral-7B-Instruct-v0.3",
    "mixtral-8x7b": "mistralai/Mixtral-8x7B-Instruct-v0.1",
    "qwen2.5-0.5b": "Qwen/Qwen2.5-0.5B-Instruct",
    "qwen2.5-7b": "Qwen/Qwen2.5-7B-Instruct",
    "qwen3-0.6b": "Qwen/Qwen3-0.6B",
    "qwen3-4b": "Qwen/Qwen3-4B",
    "qwen3-8b": "Qwen/Qwen3-8B",
    "qwen3-30b-a3b": "Qwen/Qwen3-30B-A3B",
    "gemma2-2b": "google/gemma-2-2b-it",
    "gemma3-270m": "google/gemma-3-270m-it",
    "gemma3-1b": "google/gemma-3-1b-it",
    "phi4": "microsoft/phi-4",
    "olmo2-7b": "allenai/OLMo-2-1124-7B-Instruct",
    "granite3.3-8b": "ibm-granite/granite-3.3-8b-instruct",
}


def get_config(preset: str = "smollm2-135m") -> config_dict.ConfigDict:
    if preset not in PRESETS:
        raise errors.UserError(f"configs/sft.py:{preset}: a preset is one of {', '.join(PRESETS)}")
    c = config.base()
    c.model.path = PRESETS[preset]
    c.model.dtype = "float32" if preset == "smollm2-135m" else "bfloat16"
    c.run_dir = f"runs/{preset}"
    return c
