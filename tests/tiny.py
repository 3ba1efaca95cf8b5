# SPDX-License-Identifier: Apache-2.0
"""A model small enough to train in a test: a random decoder and a ChatML tokenizer, as a folder."""

import pathlib
from typing import Any

import jax

from jft.models import architecture, decoder, export

CHATML = """{% for m in messages %}<|im_start|>{{ m.role }}
{{ m.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
SPECIAL = ["<bos>", "<eos>", "<|im_start|>", "<|im_end|>"]
TEXT = "the user asks the assistant for red green blue one two three hello"


def tokenizer() -> Any:
    """A byte-level BPE of 300 tokens and the four special ones."""
    import tokenizers
    import transformers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    backend.train_from_iterator([TEXT] * 20, trainer)
    backend.add_special_tokens(SPECIAL)
    found = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<bos>", eos_token="<eos>"
    )
    found.chat_template = CHATML
    return found


def save(folder: pathlib.Path) -> None:
    """Writes the model's folder."""
    words = tokenizer()
    config = architecture.Config(
        vocab_size=len(words),
        d_model=32,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        d_ff=48,
        max_length=256,
        tie_embeddings=True,
    )
    params = jax.jit(lambda: decoder.init(config, key=jax.random.key(1)))()
    export.save(folder, config, params, words)
