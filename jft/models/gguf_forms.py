# SPDX-License-Identifier: Apache-2.0
"""The types of a GGUF file's keys about its tokenizer: the file says them itself, and a damaged or hostile one others."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from jft import errors, json_text
from jft.models import gguf_rules


def check(metadata: Mapping[str, Any], where: str) -> None:
    """Each key that is read must have the type that it has in every file."""
    for key, (is_one, form) in _FORMS.items():
        if key in metadata and not is_one(metadata[key]):
            raise errors.UserError(
                f"{where}: {key} is {json_text.shown(metadata[key])}, not {form}"
            )


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_flag(value: Any) -> bool:
    return isinstance(value, bool)


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_text, value))


def _is_numbers(kinds: str) -> Callable[[Any], bool]:
    return lambda value: (
        isinstance(value, np.ndarray | list) and np.asarray(value).dtype.kind in kinds
    )


# What a key must be, and how that is said.
_FORMS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "general.architecture": (_is_text, "a text"),
    "tokenizer.chat_template": (_is_text, "a text"),
    "tokenizer.ggml.model": (_is_text, "a text"),
    "tokenizer.ggml.pre": (_is_text, "a text"),
    "tokenizer.ggml.tokens": (_is_texts, "a list of texts"),
    "tokenizer.ggml.merges": (_is_texts, "a list of texts"),
    "tokenizer.ggml.token_type": (_is_numbers("iu"), "a list of whole numbers"),
    "tokenizer.ggml.scores": (_is_numbers("iuf"), "a list of numbers"),
    **{f"tokenizer.ggml.{key}_token_id": (_is_whole, "a whole number") for key in gguf_rules.ROLES.values()},
    **{f"tokenizer.ggml.add_{role}_token": (_is_flag, "true or false") for role in ("bos", "eos")},
    gguf_rules.PREFIX: (_is_flag, "true or false"),
}  # fmt: skip
