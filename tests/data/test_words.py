# SPDX-License-Identifier: Apache-2.0
"""Ids put together from words are the tokenizer's own, for every text and every tokenizer."""

import functools
import json
import pathlib
import random
from collections.abc import Iterator
from typing import Any

import hypothesis
import pytest
import real_tokenizers
import tokenizers
import transformers
from hypothesis import strategies as st
from tokenizers import models, normalizers, pre_tokenizers

from jft.data import template, tokenising, words

SPACES = (
    *(" ", "  ", "   ", "\n", "\n\n", " \n", "\n ", "\t", "\r\n", "\u00a0", "\u2028", "\u0085", "\u3000"),
    *("\u200b", "\u180e", "\ufeff", "\x1c", "\x0b", "\u2003", "\u202f", "\u205f", "\u2060"),
)  # fmt: skip
PIECES = (
    *("a", "the", "I'll", "'s", "'S", "don't", "it's", "1", "23", "4567", "3.14", "x1", ".", ",", "...", "!?"),
    *("(a)", "[b]", "{}", "->", "</", ">", "> </", "--", "\u2014", "\u201cx\u201d", "\u2019s", "/", "#", "_a_"),
    *("é", "e\u0301", "\u0301", "ſ", "'ſ", "\u212a", "ß", "Ж", "\u4e2d\u6587", "\u3042", "한", "\u1100\u1161"),
    *("\u0915\u094d\u0937", "\U0001f600", "\U0001f469\u200d\U0001f4bb", "\u2581", "\u2581\u2581", "\u0120", "½", "٣"),
    *("\x00", "\x7f", "\u00ad", "\u0378", "\U000f0000", "\U000e0001", "\ufffd", "<think>", "<unused0>", "<0x0A>"),
)  # fmt: skip
SETTINGS = hypothesis.settings(
    max_examples=100,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(hypothesis.HealthCheck),
)
FAST = [name for name in real_tokenizers.NAMES if name != "mistral"]


@functools.cache
def by_words(name: str) -> tuple[Any, words.Words]:
    tokenizer = real_tokenizers.load(name)
    control = template.analysed(tokenizer).control_ids
    found = words.of(tokenizer, next(iter(control.items())), lambda *_: True)
    assert found is not None
    return tokenizer, found


def own(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


@pytest.mark.parametrize("name", real_tokenizers.NAMES)
def test_which_tokenizers_go_by_words(name: str) -> None:
    tokenizer = real_tokenizers.load(name)
    known = tokenising.Tokeniser(tokenizer, template.analysed(tokenizer).control_ids)
    # Mistral's puts a space before any text it is given, so texts are not joined from parts at all.
    assert (known._words is not None) == (name in FAST)


@pytest.mark.parametrize("name", FAST)
def test_any_text_has_the_tokenizers_own_ids(name: str) -> None:
    tokenizer, found = by_words(name)
    control = words.re.compile("|".join(map(words.re.escape, tokenizer.all_special_tokens)))
    piece = st.one_of(
        st.sampled_from(PIECES), st.sampled_from(SPACES), st.just(" "), st.text(max_size=4)
    )
    texts = st.lists(piece, min_size=1, max_size=20).map("".join)

    @SETTINGS
    @hypothesis.given(st.lists(texts.filter(lambda text: not control.search(text)), max_size=6))
    def check(some: list[str]) -> None:
        made = found.encode(some)
        assert {text: words.as_ids(ids) for text, ids in made.items()} == {
            text: own(tokenizer, text) for text in made
        }
        for text in some:
            assert (
                text in made
                or name == "gemma3"
                and ("\u2581" in text or "> </" in text)
                or not text
            )

    check()


@pytest.mark.parametrize("name", FAST)
def test_every_character_between_spaces(name: str) -> None:
    tokenizer, found = by_words(name)
    characters = [chr(code) for code in range(0x110000) if not 0xD800 <= code < 0xE000]
    some = characters[:0x3100] + random.Random(0).sample(characters, 1000)
    texts = [text for c in some for text in (f"a {c} b", f"a{c} {c}a", f"{c} {c}", f".{c} b")]
    encoded = tokenizer.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    made = found.encode(texts)
    assert len(made) > 0.99 * len(set(texts))
    assert all(
        words.as_ids(made[text]) == each.ids
        for text, each in zip(texts, encoded, strict=True)
        if text in made
    )


@pytest.mark.parametrize(
    "name", ["smollm2", *(pytest.param(n, marks=pytest.mark.slow) for n in FAST if n != "smollm2")]
)
def test_real_texts(name: str, shared: pathlib.Path) -> None:
    tokenizer, found = by_words(name)
    count = 0
    for some in batches(shared / "data"):
        made = found.encode(some)
        count += len(made)
        encoded = tokenizer.backend_tokenizer.encode_batch_fast(some, add_special_tokens=False)
        for text, each in zip(some, encoded, strict=True):
            assert text not in made or words.as_ids(made[text]) == each.ids
    assert count > 10_000


def batches(folder: pathlib.Path) -> Iterator[list[str]]:
    """Some of the texts of every file: of JSON its strings, of others its lines."""
    chance = random.Random(1)
    for path in sorted(folder.rglob("*")):
        if not path.is_file():
            continue
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".json":
            found = list(strings(json.loads(text)))
        elif path.suffix == ".jsonl":
            found = [s for line in text.split("\n") if line for s in strings(json.loads(line))]
        else:
            found = [*text.split("\n"), text[:50_000]]
        found = [one for one in dict.fromkeys(found) if one and "<|" not in one]
        yield chance.sample(found, min(len(found), 800))


def strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from strings(item)


def fast(normaliser: Any = None, splitter: Any = None, **settings: Any) -> Any:
    """A tokenizer of single bytes."""
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: i for i, symbol in enumerate(symbols)}
    model = models.BPE(vocabulary, [], **settings)
    backend = tokenizers.Tokenizer(model)
    if normaliser:
        backend.normalizer = normaliser
    backend.pre_tokenizer = splitter or byte_level()
    made = transformers.PreTrainedTokenizerFast(tokenizer_object=backend)
    made.add_special_tokens({"eos_token": "<|end|>"})
    return made


def byte_level(**settings: Any) -> Any:
    return pre_tokenizers.ByteLevel(**({"add_prefix_space": False} | settings))


def sequence(expression: str, behaviour: str = "isolated", invert: bool = False) -> Any:
    split = pre_tokenizers.Split(tokenizers.Regex(expression), behaviour, invert)
    return pre_tokenizers.Sequence([split, byte_level(use_regex=False)])


GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


@pytest.mark.parametrize(
    "made",
    [
        fast(),
        fast(normalizers.NFC()),
        fast(splitter=sequence(GPT2)),
        fast(splitter=pre_tokenizers.Sequence([pre_tokenizers.Digits(True), byte_level()])),
    ],
)
def test_kinds_that_go_by_words(made: Any) -> None:
    assert words._uncut(made) == ""


@pytest.mark.parametrize(
    "made",
    [
        fast(normalizers.NFKC()),  # makes a space of what is none
        fast(normalizers.Lowercase()),
        fast(dropout=0.1),
        fast(end_of_word_suffix="</w>"),
        fast(splitter=byte_level(use_regex=False)),  # splits nothing, so merges may cross spaces
        fast(splitter=byte_level(add_prefix_space=True)),
        fast(splitter=sequence(GPT2, "removed")),
        fast(splitter=sequence(GPT2, invert=True)),
        fast(splitter=sequence(r"\p{N}{1,3}")),
        fast(splitter=sequence(rf"\w+ \w+|{GPT2}")),  # takes a space into a word
        fast(splitter=sequence(rf"(?<= )\p{{L}}+|{GPT2}")),  # looks behind
        fast(splitter=pre_tokenizers.Sequence([byte_level(), pre_tokenizers.Digits(True)])),
    ],
)
def test_kinds_that_do_not(made: Any) -> None:
    assert words._uncut(made) is None


def test_an_added_token_with_a_space_is_not_cut() -> None:
    made = fast()
    made.add_tokens(["new york"])
    assert words._uncut(made) is None


def test_added_tokens_inside_words_are_found() -> None:
    made = fast()
    made.add_tokens(["<think>", "\n\n"])
    found = words.of(made, ("<|end|>", made.eos_token_id), lambda *_: True)
    assert found is not None
    text = "a <think>b c\n\nd <think> e\n\n f"
    ids = words.as_ids(found.encode([text])[text])
    assert ids == own(made, text)
    assert {made.convert_tokens_to_ids("<think>"), made.convert_tokens_to_ids("\n\n")} <= set(ids)


def test_what_is_kept_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, _ = by_words("smollm2")
    found = words.of(tokenizer, ("<|im_end|>", tokenizer.eos_token_id), lambda *_: True)
    assert found is not None
    monkeypatch.setattr(words, "_MOST", 50)
    chance = random.Random(3)
    largest = 0
    for _ in range(40):
        some = ["".join(chance.choices(PIECES + SPACES + (" ",) * 30, k=60)) for _ in range(3)]
        some = [text for text in some if "<" not in text]
        assert {k: words.as_ids(v) for k, v in found.encode(some).items()} == {
            text: own(tokenizer, text) for text in some
        }
        largest = max(largest, len(found._known))
    assert largest < 300
    found.encode(["x" * 1000])
    assert not any(len(word) > 2 * words._LONG for word in found._known)


def test_a_text_with_a_fault_is_left_to_the_caller() -> None:
    tokenizer, _ = by_words("smollm2")

    def sound(text: str, ids: Any) -> bool:
        return "bad" not in text

    found = words.of(tokenizer, ("<|im_end|>", tokenizer.eos_token_id), sound)
    assert found is not None
    texts = ["good words here", "a bad word", "good", "too bad"]
    for _ in range(2):
        assert [*found.encode(texts)] == ["good words here", "good"]
