# SPDX-License-Identifier: Apache-2.0
"""What a single token stands for, as text: tokenizers decode sequences, and a token alone may be part of a character."""

import functools
from typing import Any


class Pieces:
    """The texts of a tokenizer's tokens one by one, and which of them are control tokens."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        added = tokenizer.added_tokens_decoder
        special = {index for index, token in added.items() if token.special}
        # With text before it: SentencePiece's tokenizers drop the space that the first token begins with.
        self._anchor = self._ids("a")
        self.control = frozenset(special | set(tokenizer.all_special_ids))
        self.text = functools.lru_cache(maxsize=None)(self._text)

    def _ids(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def _decode(self, ids: list[int]) -> str:
        # A tokenizer's clean-up would take away the spaces that it has before punctuation.
        return self._tokenizer.decode(
            ids, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )

    def _text(self, token: int) -> str:
        """The token's text; bytes that are no whole character as <E2 9C>."""
        name = self._tokenizer.convert_ids_to_tokens(token)
        if name is None or token in self.control:
            return f"<{token}>" if name is None else str(name)
        before = self._decode(self._anchor)
        text = self._decode([*self._anchor, token]).removeprefix(before)
        if "\N{REPLACEMENT CHARACTER}" not in text or "\N{REPLACEMENT CHARACTER}" in name:
            return text or f"<{token}>"
        return _as_bytes(name) or text


def _as_bytes(name: str) -> str:
    """Of a byte-level or a SentencePiece byte token; "" for others."""
    if len(name) == 6 and name.startswith("<0x"):
        return f"<{name[3:5]}>"
    table = _byte_characters()
    if not all(character in table for character in name):
        return ""
    return f"<{' '.join(f'{table[character]:02X}' for character in name)}>"


@functools.cache
def _byte_characters() -> dict[str, int]:
    """GPT-2's characters for bytes: https://github.com/openai/gpt-2/blob/master/src/encoder.py."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(256 + i): byte for i, byte in enumerate(others)
    }
