# SPDX-License-Identifier: Apache-2.0
"""The ids of a text from those of its words, each of which the tokenizer has seen once.

Most of a tokenizer's time goes into splitting text by a regular expression and into words that it has split and merged
many times before. A text can be cut before a space that stands between two characters that are no whitespace, without a
change to any id, where one of these holds of its byte-pair tokenizer:

- It splits by a regular expression of which no alternative matches a character and a space behind it, looks behind, or
  depends on what is behind such a space; and one alternative takes any whitespace, so that a match begins at the space.
  So it is with GPT-2's expression and its kin, part by part those in `_ALTERNATIVES`.
- It splits nothing, and no entry of the vocabulary holds a space behind another character, so no merge can cross one.

What stands between two such spaces is a word here, with its punctuation. The tokenizer itself encodes it when it is met
first. What is whitespace is all that this has to know of Unicode.
"""

import contextlib
import itertools
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from jft import errors

# Alternatives of the expressions of GPT-2, GPT-4, GPT-4o, Llama 3, Qwen, Mistral's Tekken and DeepSeek.
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_SUFFIXES = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_ALTERNATIVES = (
    *("'s", "'t", "'re", "'ve", "'m", "'ll", "'d", _SUFFIXES, r"'(?i:[sdmt]|ll|ve|re)"),
    *(r"\p{L}+", r" ?\p{L}+", r"[^\r\n\p{L}\p{N}]?\p{L}+", r"[^\r\n\p{L}\p{N}]?+\p{L}+"),
    *(r"[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+", r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"),
    *(rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{end}" for end in ("", f"{_SUFFIXES}?")),
    *(rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{end}" for end in ("", f"{_SUFFIXES}?")),
    *(r"\p{N}", r"\p{N}+", r"\p{N}{1,3}", r" ?\p{N}+", r"[一-龥぀-ゟ゠-ヿ]+"),
    *(r" ?[^\s\p{L}\p{N}]+", r" ?[^\s\p{L}\p{N}]+[\r\n]*", r" ?[^\s\p{L}\p{N}]++[\r\n]*"),
    *(r" ?[^\s\p{L}\p{N}]+[\r\n/]*", r" ?[\p{P}\p{S}]+[\r\n]*"),
    *(r"\s*[\r\n]", r"\s*[\r\n]+", r"\s+(?!\S)", r"\s+"),
)
_ANY = "(?:" + "|".join(map(re.escape, sorted(_ALTERNATIVES, key=len, reverse=True))) + ")"
_KNOWN = re.compile(rf"{_ANY}(?:\|{_ANY})*")
_COMPLETE = re.compile(r"(?:.*\|)?\\s\+(?:\|.*)?", re.DOTALL)  # has the alternative \s+
# Python's whitespace, and what some version of Unicode or some library has taken for it.
_BLANK = r"\s\u180e\u200b\u2060\ufeff"
_CUT = re.compile(f" (?![{_BLANK}]|\\Z)(?<![{_BLANK}] )(?<!\\A )")
_SOLID = re.compile(f"[^{_BLANK}]")
_LONG = 60  # characters; longer words hardly come again, as in scripts without spaces
_MOST = 200_000  # words kept: some 50 MB
_TOGETHER = 256  # new words in one text for the tokenizer

_TRIALS = (
    *("a b", "Ab cD  e", " a", "a ", "  a  b  ", "\n", " \n", "a\n b", "a \nb", "a\tb \t c", "x\u00a0 y"),
    *("I'll do it's o'clock 'S 'll don 't", "1 23 456 7890 3.14 a1 1a", "(a) [b] {c} -- ... !? a/b \"c\""),
    *("é è ñandú \u4e2d\u6587 \u4e2d \u3042 \u0416 \u0915\u094d\u0937", "a\u0301 \u0301b c \u0301", "\U0001f600 \U0001f600a"),
    *("a\u2028 b \u0085 c\u200b d\u180e e\ufeff f", "if x:\n        y = f(z)\n\n    return  1\r\n", "> </ a> </b>"),
    *("\x00 \x1f a\x7f \x1c b", "A.\n\nB ,c ; d.\n \n\n e", "https://x.org/a?b=c&d#e f_g __h__ $1,000.00 50%"),
)  # fmt: skip


class Words:
    """Texts to ids by their words.

    Args:
        backend: the tokenizer.
        control: the text and the id of a token that cuts texts into parts that do not influence each other.
        refused: of texts that can't be cut.
        sound: whether a text and its ids are free of faults.
    """

    def __init__(
        self,
        backend: Any,
        control: tuple[str, int],
        refused: re.Pattern[str] | None,
        sound: Callable[[str, Sequence[int]], bool],
    ) -> None:
        self._backend, self._refused, self._sound = backend, refused, sound
        self._separator, self._separator_id = control
        self._known: dict[str, bytes] = {}

    def encode(self, texts: Iterable[str]) -> dict[str, bytes]:
        """The ids of each text, as bytes, but of those that can't be cut or have a fault; all are free of the control token."""
        if len(self._known) > _MOST:
            self._known = {}
        known = self._known
        found: dict[str, bytes] = {}
        pending: list[tuple[str, list[str]]] = []
        new: dict[str, None] = {}
        for text in texts:
            if self._refused and self._refused.search(text):
                continue
            uneven = "  " in text or "\n " in text or " \n" in text
            words = _marked(_CUT.split(text) if uneven else text.split(" "))
            try:
                found[text] = b"".join(map(known.__getitem__, words))
                continue
            except KeyError:
                fresh = _without(new, _without(known, words))
            if not all(map(_whole, fresh)):
                words = _marked(_CUT.split(text))
            new.update(dict.fromkeys(_without(known, words)))
            pending.append((text, words))
        learned = self._learn([*new])
        known.update((word, ids) for word, ids in learned.items() if len(word) <= _LONG)
        for text, words in pending:
            with contextlib.suppress(KeyError):  # a word with a fault
                found[text] = _put_together(words, known, learned)
        return found

    def _learn(self, words: Sequence[str]) -> dict[str, bytes]:
        """The ids of words, but of those with a fault."""
        texts = [_text(word) for word in words]
        groups = [texts[at : at + _TOGETHER] for at in range(0, len(texts), _TOGETHER)]
        together = self._encode([self._separator.join(group) for group in groups])
        found: list[bytes] = []
        for group, ids in zip(groups, together, strict=True):
            parts = _split(ids, self._separator_id)
            # Another number of parts: the separator was made of a word, or a word took part of it.
            found += parts if len(parts) == len(group) else map(as_bytes, self._encode(group))
        made = zip(words, texts, found, strict=True)
        if self._sound("".join(texts), as_ids(b"".join(found))):
            return {word: ids for word, _, ids in made}
        return {word: ids for word, text, ids in made if self._sound(text, as_ids(ids))}

    def _encode(self, texts: Sequence[str]) -> list[list[int]]:
        with errors.from_library("the tokenizer fails"):
            encoded = self._backend.encode_batch_fast(texts, add_special_tokens=False)
        return [each.ids for each in encoded]


def as_bytes(ids: Sequence[int]) -> bytes:
    """Ids as they are kept and joined: tuples of them take more room, and keep Python's garbage collection busy."""
    return np.array(ids, np.int32).tobytes()


def as_ids(held: bytes) -> list[int]:
    return np.frombuffer(held, np.int32).tolist()


def _put_together(
    words: Sequence[str], known: Mapping[str, bytes], learned: Mapping[str, bytes]
) -> bytes:
    try:
        return b"".join(map(known.__getitem__, words))
    except KeyError:  # a long word is not kept
        return b"".join(known[word] if word in known else learned[word] for word in words)


def _without(held: Mapping[str, Any], words: Iterable[str]) -> Iterable[str]:
    return itertools.filterfalse(held.__contains__, words)


def of(
    tokenizer: Any, control: tuple[str, int], sound: Callable[[str, Sequence[int]], bool]
) -> Words | None:
    """The words of a tokenizer; None where a text's ids may not be those of its words, by what it declares and by trying.

    Its control tokens have to cut a text into parts that do not influence each other.
    """
    refused = _uncut(tokenizer)
    if refused is None:
        return None
    backend = tokenizer.backend_tokenizer
    found = Words(backend, control, re.compile(refused) if refused else None, sound)
    texts = [*_TRIALS, *(a + " " + b for a, b in itertools.product(_TRIALS, repeat=2))]
    encoded = backend.encode_batch_fast(texts, add_special_tokens=False)
    ids = {text: as_bytes(each.ids) for text, each in zip(texts, encoded, strict=True)}
    return found if found.encode(texts).items() <= ids.items() else None


def _uncut(tokenizer: Any) -> str | None:
    """An expression for texts that can't be cut, empty if all can; None if none can."""
    from tokenizers import models

    backend = tokenizer.backend_tokenizer
    model = backend.model
    if not isinstance(model, models.BPE) or model.dropout:
        return None
    if model.continuing_subword_prefix or model.end_of_word_suffix:
        return None
    added = backend.get_added_tokens_decoder().values()
    if any(" " in token.content for token in added):
        return None
    normaliser, splitters = _stages(backend.normalizer), _stages(backend.pre_tokenizer)
    if normaliser in ([], [{"type": "NFC"}]) and _splits_at_spaces(splitters):
        return ""
    mark = _replaces_spaces(normaliser)
    if not mark or any(token.normalized for token in added):
        return None
    if [stage for stage in splitters if stage.get("pattern") != {"String": " "}]:
        return None  # at spaces nothing is split: there are none left
    return _crossing(backend.get_vocab(with_added_tokens=False), mark)


def _stages(component: Any) -> list[dict[str, Any]]:
    """What a normaliser or pre-tokeniser consists of."""
    if component is None:
        return []
    held = json.loads(component.__getstate__())
    return held.get("pretokenizers") or held.get("normalizers") or [held]


def _splits_at_spaces(stages: Sequence[dict[str, Any]]) -> bool:
    return (
        all(_cuts_nothing_else(stage, last=stage is stages[-1]) for stage in stages)
        and any(_COMPLETE.fullmatch(_expression(stage)) for stage in stages)
    )  # fmt: skip


def _cuts_nothing_else(stage: dict[str, Any], last: bool) -> bool:
    """Whether a stage's splits on one side of a cut depend on that side alone."""
    if stage["type"] == "Split":
        isolates = stage["behavior"] == "Isolated" and not stage["invert"]
        return isolates and _KNOWN.fullmatch(_expression(stage)) is not None
    if stage["type"] == "ByteLevel":  # writes spaces otherwise, for any stage behind it
        return last and not stage["add_prefix_space"]
    return stage["type"] == "Digits"


def _expression(stage: dict[str, Any]) -> str:
    if stage["type"] == "ByteLevel" and stage["use_regex"]:
        return r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    return stage.get("pattern", {}).get("Regex", "")


def _replaces_spaces(normaliser: Sequence[dict[str, Any]]) -> str:
    """The character that a normaliser puts in place of spaces, if it does nothing else."""
    if [stage["type"] for stage in normaliser] != ["Replace"]:
        return ""
    (stage,) = normaliser
    return stage["content"] if stage["pattern"] == {"String": " "} else ""


def _crossing(vocabulary: Iterable[str], mark: str) -> str | None:
    """An expression for texts that a merge across a cut may occur in, or that hold the mark for spaces themselves."""
    if mark not in vocabulary:
        return None
    inside = re.compile(f"[^{re.escape(mark)}]{re.escape(mark)}")
    crossing = [token for token in vocabulary if inside.search(token)]
    texts = [mark, *(token.replace(mark, " ") for token in sorted(crossing))]
    return "|".join(map(re.escape, texts)) if len(texts) < 100 else None


def _marked(words: list[str]) -> list[str]:
    """The words of a text as keys: a word that nothing is before, or with whitespace behind it, is another.

    A space before a word tells that it begins its text; a space behind it, that it ends its text, in whitespace.
    """
    words[0] = f" {words[0]}"
    if not _SOLID.match(words[-1][-1:]):
        words[-1] += " "
    return words


def _whole(word: str) -> bool:
    """Whether a key is of a text between two cuts, and not between spaces beside other whitespace."""
    if word in ("", " "):
        return False
    first, last = word[0], word[-1]
    return (first == " " or bool(_SOLID.match(first))) and (last == " " or bool(_SOLID.match(last)))


def _text(word: str) -> str:
    word = word[:-1] if word.endswith(" ") else word
    return word[1:] if word.startswith(" ") else f" {word}"


def _split(ids: list[int], separator: int) -> list[bytes]:
    held = as_bytes(ids)
    ends = np.flatnonzero(np.frombuffer(held, np.int32) == separator).tolist()
    starts = [0, *(4 * end + 4 for end in ends)]
    return [held[a : 4 * b] for a, b in zip(starts, [*ends, len(ids)], strict=True)]
