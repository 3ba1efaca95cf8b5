# SPDX-License-Identifier: Apache-2.0
"""Rendered text to token ids, many texts at a time.

Control tokens cut a text into segments that do not influence each other. So each different segment of all the texts is
tokenised once, from words seen before where that gives the same ids; a prompt and the conversation that goes on from it
share all but their last ones. Where a tokenizer does look across a control token (it strips the space beside one, or
puts a space before whatever it is given), each text is tokenised as a whole instead.
"""

import functools
import itertools
import json
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from jft import errors
from jft.data import template, words

_TRIALS = (
    "a",
    " a",
    "a ",
    "\n a\n",
    "  ",
    "\n",
    "A b.",
    "1",
    "é",
    "\u4e2d\u6587",
    "'s x",
    "\t\r\n\t",
)

Ids = np.ndarray  # int32 [n]


class Tokeniser:
    """The tokenizer of one model, with the texts of the tokens that only templates may write.

    Args:
        tokenizer: a transformers fast tokenizer.
        control: texts and ids of those tokens.
    """

    def __init__(self, tokenizer: Any, control: Mapping[str, int]) -> None:
        self._tokenizer = tokenizer
        self._pattern = template.any_of(control)
        self._ids = dict(control)
        self._forbidden = frozenset(control.values()) - {tokenizer.unk_token_id}
        self.start = _start(tokenizer)
        self._lost = _lost_bytes(tokenizer)
        self._apart = _segments_are_apart(tokenizer, self._pattern, self._ids)
        self._words = self._by_words() if self._apart else None

    def encode(self, texts: Sequence[template.Rendered]) -> list[Ids | errors.UserError]:
        """The ids of whole texts, BOS first where the tokenizer puts one by itself; a fault in place of a text's ids."""
        return [self._begin(ids) for ids in self._encode(texts, after=False)]

    def encode_after(self, text: template.Rendered) -> Ids:
        """The ids of text that follows other text."""
        found = self._encode([text], after=True)[0]
        if isinstance(found, errors.UserError):
            raise found
        return found

    def _begin(self, ids: Ids | errors.UserError) -> Ids | errors.UserError:
        if isinstance(ids, errors.UserError) or not self.start or tuple(ids[:1]) == self.start:
            return ids
        return np.concatenate([np.array(self.start, np.int32), ids])

    def _encode(
        self, texts: Sequence[template.Rendered], after: bool
    ) -> list[Ids | errors.UserError]:
        if not self._apart:
            return [self._whole(text, after) for text in texts]
        parts = [self._parts(text) for text in texts]
        known = self._segments(dict.fromkeys(itertools.chain.from_iterable(parts)))
        return [_joined([known[part] for part in some]) for some in parts]

    def _parts(self, text: template.Rendered) -> list[str]:
        """Segments and control tokens in turn. A mark ends a segment: what is beside it is not the template's."""
        pieces = text.text.split(text.mark)
        if len(pieces) == 1:
            return [part for part in self._split(text.text) if part]
        # A piece holds control tokens of the template alone, since those of messages are broken by the marks.
        return [part for piece in pieces for part in self._split(piece) if part]

    @functools.cached_property
    def _splitter(self) -> re.Pattern[str]:
        return re.compile(f"({self._pattern.pattern})")

    def _split(self, text: str) -> list[str]:
        return self._splitter.split(text)

    def _segments(self, parts: Collection[str]) -> dict[str, bytes | errors.UserError]:
        """Ids of each part, as bytes, or what is wrong with it."""
        known: dict[str, bytes | errors.UserError] = {
            part: words.as_bytes([self._ids[part]]) for part in parts if part in self._ids
        }
        if self._words:
            known |= self._words.encode(part for part in parts if part not in known)
        rest = [part for part in parts if part not in known]
        backend = self._tokenizer.backend_tokenizer
        with errors.from_library("the tokenizer fails"):
            encoded = backend.encode_batch_fast(rest, add_special_tokens=False)
        for part, found in zip(rest, encoded, strict=True):
            known[part] = self._fault(part, found.ids) or words.as_bytes(found.ids)
        return known

    def _by_words(self) -> words.Words | None:
        def sound(text: str, ids: Sequence[int]) -> bool:
            return self._fault(text, ids) is None

        return words.of(self._tokenizer, next(iter(self._ids.items())), sound)

    def _fault(self, text: str, ids: Collection[int]) -> errors.UserError | None:
        """What is wrong with a message's text, of which all is tokens but none a control token."""
        if not self._forbidden.isdisjoint(ids):
            # Where a normaliser or the vocabulary itself makes a control token of other text.
            return errors.UserError(
                "the tokenizer makes a control token of a message's text; take the text out"
            )
        lost = self._lost and self._lost.search(text.encode())
        if lost:
            character = text[len(text.encode()[: lost.start()].decode(errors="ignore"))]
            return errors.UserError(
                f"the tokenizer has no token for {character!r} (U+{ord(character):04X}) and would leave it out; take it out"
            )
        return None

    def _whole(self, text: template.Rendered, after: bool) -> Ids | errors.UserError:
        first, *rest = text.text.split(text.mark)
        tokens = self._later(first) if after else plain(self._tokenizer, first)
        for piece in rest:
            tokens += self._later(piece)
        written = sum(1 for piece in (first, *rest) for _ in self._pattern.finditer(piece))
        mine = sum(1 for token in tokens if token in self._forbidden) > written
        said = "".join((first, *rest))
        return self._fault(said, self._forbidden if mine else ()) or np.array(tokens, np.int32)

    def _later(self, text: str) -> list[int]:
        """Ids of text in the middle of a sequence.

        SentencePiece's tokenizers put a space before any text they are given. It is avoided by tokenising the text
        after an anchor and cutting the anchor off; the anchors are tried until one does not merge with the text.
        """
        found = plain(self._tokenizer, text)
        if not _puts_space(self._tokenizer):
            return found
        for anchor in ("\n", ".", "a"):
            before = plain(self._tokenizer, anchor)
            tokens = plain(self._tokenizer, anchor + text)
            if tokens[: len(before)] == before:
                return tokens[len(before) :]
        return found


def _joined(parts: Sequence[bytes | errors.UserError]) -> Ids | errors.UserError:
    """The ids of a text from those of its parts, or the first fault of one."""
    try:
        return np.frombuffer(b"".join(parts), np.int32)  # type: ignore[arg-type]
    except TypeError:
        return next(part for part in parts if isinstance(part, errors.UserError))


def plain(tokenizer: Any, text: str) -> list[int]:
    """Ids of a text that a template wrote: it has its BOS and EOS, which adding special tokens would double."""
    if not text:
        return []
    settings = {"add_special_tokens": False, "split_special_tokens": False, "verbose": False}
    with errors.from_library("the tokenizer fails"):
        return list(tokenizer(text, **settings)["input_ids"])


def _lost_bytes(tokenizer: Any) -> re.Pattern[bytes] | None:
    """Bytes of UTF-8 that a byte-level vocabulary lacks: it leaves them out of a text, and says nothing."""
    from tokenizers import models, pre_tokenizers

    backend = tokenizer.backend_tokenizer
    known = isinstance(backend.model, models.BPE) and "ByteLevel" in repr(backend.pre_tokenizer)
    if not known or backend.model.unk_token:
        return None
    symbols = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    planes = (0x10000, 0x40000, 0x80000, 0xC0000, 0x100000)
    lost = set()
    # A text for each byte that UTF-8 has.
    for code in (*range(0x100), *range(0x100, 0x800, 0x40), *range(0x800, 0x10000, 0x800), *planes):
        if 0xD800 <= code < 0xE000:
            continue
        (spelt, _), *_ = symbols.pre_tokenize_str(chr(code))
        pairs = zip(spelt, chr(code).encode(), strict=True)
        lost |= {byte for symbol, byte in pairs if backend.token_to_id(symbol) is None}
    return re.compile(b"[" + b"".join(re.escape(bytes([b])) for b in lost) + b"]") if lost else None


def _start(tokenizer: Any) -> tuple[int, ...]:
    """The BOS token, where the tokenizer puts one before any text by itself."""
    bos = tokenizer.bos_token_id
    begun = bos is not None and tokenizer("a", verbose=False)["input_ids"][:1] == [bos]
    return (bos,) if begun else ()


def _puts_space(tokenizer: Any) -> bool:
    return "".join(tokenizer.convert_ids_to_tokens(plain(tokenizer, "a"))) != "a"


def _segments_are_apart(tokenizer: Any, pattern: re.Pattern[str], ids: Mapping[str, int]) -> bool:
    """Whether a text's ids are those of its segments one after the other: by what is declared, and by trying."""
    added = tokenizer.added_tokens_decoder.values()
    if any(token.lstrip or token.rstrip or token.single_word for token in added):
        return False
    if any(token.normalized for token in added if pattern.fullmatch(str(token))):
        return False  # another spelling may give it
    if not ids or _puts_space(tokenizer):
        return False
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    control = next(iter(ids))
    for before, after in itertools.product(_TRIALS, repeat=2):
        apart = [*plain(tokenizer, before), ids[control], *plain(tokenizer, after)]
        if plain(tokenizer, before + control + after) != apart:
            return False
    return True


def check_ids(ids: Sequence[int], vocab_size: int, tokenizer: Any, source: str) -> None:
    """Refuses an id that the model has no embedding for: a tokenizer may know more tokens than there are rows.

    Raises:
        errors.UserError: names `source` and the token.
    """
    token = int(np.max(ids, initial=0))
    if token >= vocab_size:
        text = json.dumps(tokenizer.convert_ids_to_tokens(token), ensure_ascii=False)
        raise errors.UserError(
            f"{source}: token {token} ({text}) is not one of the model's {vocab_size} embedding rows; "
            "take its text out"
        )
