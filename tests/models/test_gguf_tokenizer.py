# SPDX-License-Identifier: Apache-2.0
"""Tokenizers into GGUF and back: the same ids, or a refusal that says why not.

The tokenizers are made here, small, with the parts of the models' own tokenizer.json.
"""

import dataclasses
import itertools
import json
import pathlib
from typing import Any

import pytest

from jft import errors
from jft.models import gguf, gguf_rules, gguf_tokenizer, gguf_vocabulary

package = pytest.importorskip("gguf")
transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

# As the models' tokenizer.json have them.
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
NEMO = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
GPT4O = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

TEXTS = (
    "",
    " ",
    "a",
    " a  b   c    d" + " " * 40,
    "I'm DON'T we'Ve they'll x's 'tis",
    "1984 12345678 3.14 ٣٤٥ ½",
    "one\n\n\ntwo\r\n \n\tthree\n",
    "CamelCaseWORDS HTTPServer snake_case",
    "http://a.org/b // c/\n --> !!!\n",
    "café cafe\u0301 e\u0301\u0302 漢字かな 한글 😀👍🏽 \u00a0\u3000",
    "def f(x):\n    return {'a': [1, 2]}  # end\n",
    "<s> </s> <tool>x</tool> <pad>[PAD5]<0x0A>",
)
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m['role'] + '\n' + m['content'] + eos_token }}"
    "{% endfor %}"
)


@dataclasses.dataclass(frozen=True)
class Rule:
    """A pre-tokenizer by its name in GGUF."""

    name: str
    regex: str | None = None
    digits: bool = False
    nfc: bool = False
    whole: bool = False


RULES = (
    Rule("gpt-2"),
    Rule("smollm", digits=True),
    Rule("llama-bpe", LLAMA3, whole=True),
    Rule("dbrx", LLAMA3),
    Rule("qwen2", QWEN2, nfc=True),
    Rule("tekken", NEMO, whole=True),
    Rule("gpt-4o", GPT4O),
)
ALIASES = {
    "starcoder": "smollm",
    "refact": "smollm",
    "llama3": "llama-bpe",
    "llama-v3": "llama-bpe",
    "smaug-bpe": "llama-bpe",
}


def token(text: str, **more: Any) -> Any:
    return tokenizers.AddedToken(text, **{"normalized": False, "special": True} | more)


def fast(backend: Any, **more: Any) -> Any:
    roles = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": TEMPLATE}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **roles | more)


def byte_level(rule: Rule, behavior: str = "isolated") -> Any:
    """A byte-level BPE cut by a rule.

    Its merges are learned without any cut, so that every cut shows.
    """
    from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, trainers

    cuts: list[Any] = [pre_tokenizers.Digits(individual_digits=True)] if rule.digits else []
    if rule.regex:
        cut = Regex(rule.regex)
        cuts.append(pre_tokenizers.Split(cut, behavior, invert=behavior == "removed"))
    cuts.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not rule.regex))
    backend = tokenizers.Tokenizer(models.BPE(ignore_merges=rule.whole))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(list(TEXTS) * 2, trainer)
    backend.pre_tokenizer = pre_tokenizers.Sequence(cuts)
    backend.decoder = decoders.ByteLevel()
    if rule.nfc:
        backend.normalizer = normalizers.NFC()
    if rule.whole:
        backend = with_token_out_of_reach(backend)
    backend.add_special_tokens([token("<s>"), token("</s>")])
    backend.add_tokens([token("<tool>", special=False)])
    return backend


def with_token_out_of_reach(backend: Any) -> Any:
    """Adds a token that no merges make, as Llama 3 has some."""
    parts = json.loads(backend.to_str())
    vocab = parts["model"]["vocab"]
    assert "Ġsnake" not in vocab
    vocab["Ġsnake"] = len(vocab)
    return tokenizers.Tokenizer.from_str(json.dumps(parts))


PIECES = [
    "▁" * 2,
    "▁" * 4,
    "▁" * 3,
    "th",
    "▁t",
    "▁th",
    "he",
    "▁the",
    "in",
    "an",
    "and",
    "▁and",
    "er",
] + ["er▁", "on", "one", "\n" * 2, "▁a", "aa", "aaa", "ab", "'s", "é", "漢字", "on▁the"]


def sentencepiece(
    pieces: list[str] = PIECES, normal: str = "always", edit: Any = lambda parts: None
) -> Any:
    """A BPE with byte fallback as converters make it: a merge for every cut, by the pieces' order."""
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    letters = sorted({*"".join(PIECES), *"abcdefghijklmnopqrstuvwxyz'.,<>/!\t"})
    longer = [piece for piece in pieces if len(piece) > 1]
    vocab = {text: index for index, text in enumerate([*names, *longer, *letters])}
    merges = [
        [piece[:at], piece[at:]]
        for piece in longer
        for at in range(1, len(piece))
        if piece[:at] in vocab and piece[at:] in vocab
    ]
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    prepend = {"type": "Prepend", "prepend": "▁"}
    normalizers = {"always": [prepend, replace], "replace": [replace]}.get(normal)
    meta = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": normal, "split": False}
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}]
    decoders: list[Any] = [{"type": "Replace", "pattern": {"String": "▁"}, "content": " "}]
    decoders += [{"type": "ByteFallback"}, {"type": "Fuse"}]
    decoders += strip if normal in ("always", "first", "metaspace-always") else []
    parts = {
        "version": "1.0",
        "added_tokens": [],
        "normalizer": {"type": "Sequence", "normalizers": normalizers} if normalizers else None,
        "pre_tokenizer": None if normalizers else meta,
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": {
            "type": "BPE",
            "unk_token": "<unk>",
            "fuse_unk": True,
            "byte_fallback": True,
            "vocab": vocab,
            "merges": merges,
        },
    }
    edit(parts)
    backend = tokenizers.Tokenizer.from_str(json.dumps(parts))
    backend.add_special_tokens([token("<unk>"), token("<s>"), token("</s>")])
    return backend


def through_a_file(
    tokenizer: Any, folder: pathlib.Path, rows: int | None = None, architecture: str = "llama"
) -> tuple[Any, dict[str, Any], list[str]]:
    """Written and read back."""
    values, notes = gguf_vocabulary.metadata(
        tokenizer, "here", vocab_size=rows or len(tokenizer), architecture=architecture
    )
    writer = package.GGUFWriter(str(folder / "m.gguf"), architecture)
    gguf_vocabulary.write(writer, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return gguf.tokenizer(folder / "m.gguf"), values, notes


def assert_same(found: Any, wanted: Any, texts: Any = TEXTS) -> None:
    for text in texts:
        ids = wanted(text).input_ids
        assert found(text).input_ids == ids, text
        assert found.decode(ids) == wanted.decode(ids, clean_up_tokenization_spaces=False), text


def refusal(tokenizer: Any, rows: int | None = None, architecture: str = "llama") -> str:
    with pytest.raises(errors.UserError) as caught:
        gguf_vocabulary.metadata(
            tokenizer, "here", vocab_size=rows or len(tokenizer), architecture=architecture
        )
    message = str(caught.value)
    assert message.startswith("here: ") and "\n" not in message
    return message


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_byte_level_tokenizers_come_back(tmp_path: pathlib.Path, rule: Rule) -> None:
    wanted = fast(byte_level(rule))
    found, values, notes = through_a_file(wanted, tmp_path)
    assert (values["tokenizer.ggml.pre"], notes) == (rule.name, [])
    assert_same(found, wanted)
    assert found.chat_template == TEMPLATE
    assert (found.bos_token, found.eos_token, found.pad_token) == ("<s>", "</s>", None)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_every_other_rule_would_give_other_ids(rule: Rule) -> None:
    wanted = fast(byte_level(rule))
    values, _ = gguf_vocabulary.metadata(
        wanted, "here", vocab_size=len(wanted), architecture="llama"
    )
    own = gguf_rules.RULES[rule.name]
    for name, other in gguf_rules.RULES.items():
        read = gguf_tokenizer.build({**values, "tokenizer.ggml.pre": name}, "here")
        same = all(read(text).input_ids == wanted(text).input_ids for text in TEXTS)
        # Without a token out of reach of the merges, taking whole words is the same.
        equal = dataclasses.replace(own, add_bos=False) == dataclasses.replace(other, add_bos=False)
        alike = not rule.whole and dataclasses.replace(own, whole_words=True) == (
            dataclasses.replace(other, whole_words=True, add_bos=False)
        )
        assert same == (equal or alike), name


@pytest.mark.parametrize(("name", "same_as"), ALIASES.items())
def test_names_of_one_rule_are_read_alike(name: str, same_as: str) -> None:
    wanted = fast(byte_level(next(rule for rule in RULES if rule.name == same_as)))
    values, _ = gguf_vocabulary.metadata(
        wanted, "here", vocab_size=len(wanted), architecture="llama"
    )
    assert_same(gguf_tokenizer.build({**values, "tokenizer.ggml.pre": name}, "here"), wanted)


def test_a_cut_may_be_written_in_other_words(tmp_path: pathlib.Path) -> None:
    for rule, behavior in ((RULES[3], "removed"), (Rule("gpt-2", gguf_rules.GPT2), "isolated")):
        wanted = fast(byte_level(rule, behavior))
        found, values, _ = through_a_file(wanted, tmp_path)
        assert values["tokenizer.ggml.pre"] == rule.name
        assert_same(found, wanted)


def test_whole_words_matter_only_where_a_token_is_out_of_reach() -> None:
    reached = dataclasses.replace(RULES[6], whole=False)
    backend = byte_level(reached)
    backend.model.ignore_merges = True
    values, _ = gguf_vocabulary.metadata(
        fast(backend), "here", vocab_size=backend.get_vocab_size(), architecture="llama"
    )
    assert values["tokenizer.ggml.pre"] == "gpt-4o"
    message = refusal(fast(byte_level(dataclasses.replace(reached, whole=True))))
    assert "ignore_merges is True, and that changes what becomes of 'Ġsnake'" in message


@pytest.mark.parametrize("normal", ["always", "replace", "never"])
def test_sentencepiece_comes_back(tmp_path: pathlib.Path, normal: str) -> None:
    wanted = fast(sentencepiece(normal=normal), unk_token="<unk>")
    found, values, notes = through_a_file(wanted, tmp_path)
    assert values["tokenizer.ggml.add_space_prefix"] == (normal == "always") and not notes
    assert_same(found, wanted)
    assert found.tokenize("on the") != found.tokenize(" on the") or normal == "always"


def test_a_blank_before_the_first_part_only(tmp_path: pathlib.Path) -> None:
    wanted = fast(sentencepiece(normal="first"), unk_token="<unk>")
    found, values, notes = through_a_file(wanted, tmp_path)
    assert values["tokenizer.ggml.add_space_prefix"] is False
    assert "begins with none of the added tokens gets no blank" in notes[0]
    for text in TEXTS:
        chat = f"<s>{text}</s> {text}</s>{text}"
        assert found(chat).input_ids == wanted(chat).input_ids, text
    assert found("the").input_ids != wanted("the").input_ids
    plain, values, notes = through_a_file(
        fast(sentencepiece(normal="first"), chat_template=None), tmp_path
    )
    assert values["tokenizer.ggml.add_space_prefix"] is True and len(notes) == 1
    for text in TEXTS[4:-1]:
        assert plain(text).input_ids == wanted(text).input_ids, text


def merged_from_the_left(text: str, score: dict[str, float]) -> list[str]:
    parts = list(text.replace(" ", "▁"))
    while True:
        unions = [a + b for a, b in itertools.pairwise(parts)]
        known = [(-score[union], at) for at, union in enumerate(unions) if union in score]
        if not known:
            return parts
        at = min(known)[1]
        parts[at : at + 2] = [unions[at]]


def test_pieces_of_one_score_merge_from_the_left() -> None:
    """As sentencepiece has it: the best pair, of several the leftmost."""
    runs = [character * n for character in "▁\ta" for n in (2, 3, 4, 7, 8)]
    made = fast(sentencepiece([*runs, *PIECES[3:12]], "replace"), unk_token="<unk>")
    values, _ = gguf_vocabulary.metadata(made, "here", vocab_size=len(made), architecture="llama")
    tokens, scores = values["tokenizer.ggml.tokens"], values["tokenizer.ggml.scores"]
    tied = [0.0 if token in runs else score for token, score in zip(tokens, scores, strict=True)]
    tokens[tokens.index("\t")] = "[PAD]"  # as in Gemma's file, a tab is its byte
    read = gguf_tokenizer.build({**values, "tokenizer.ggml.scores": tied}, "here")
    assert read.convert_tokens_to_ids("\t") == tokens.index("<0x09>")
    score = {piece: value for piece, value in zip(tokens, tied, strict=True) if len(piece) > 1}
    for n, m in itertools.product(range(1, 30, 3), (0, 5, 19)):
        sample = " " * n + "the" + "\t" * m + "a" * n
        assert read.tokenize(sample) == merged_from_the_left(sample, score), sample
    competing = [
        0.0 if token in ("th", "he") else s for token, s in zip(tokens, scores, strict=True)
    ]
    with pytest.raises(errors.UserError, match="'th' and 'he' have one score"):
        gguf_tokenizer.build({**values, "tokenizer.ggml.scores": competing}, "here")


def test_rows_and_tokens_need_not_be_as_many(tmp_path: pathlib.Path) -> None:
    backend = byte_level(RULES[0])
    wanted = fast(backend)
    rows = len(wanted)
    found, values, _ = through_a_file(wanted, tmp_path, rows + 3)
    assert values["tokenizer.ggml.tokens"][rows:] == [f"[PAD{rows + i}]" for i in range(3)]
    assert list(values["tokenizer.ggml.token_type"][-4:]) == [gguf_rules.USER_DEFINED, 5, 5, 5]
    assert_same(found, wanted)
    backend.add_special_tokens([token("<image>")])
    more = fast(backend)
    found, values, notes = through_a_file(more, tmp_path, rows)
    assert notes == [
        f"here: '<image>' is left out (1 such): its id is {rows}, and the embedding has {rows} rows"
    ]
    assert_same(found, wanted, [*TEXTS, "an <image>."])
    assert f"'<image>' has id {rows}" in refusal(fast(backend, chat_template="<image>"), rows)
    assert f"pad_token has id {rows} of {rows}" in refusal(fast(backend, pad_token="<image>"), rows)
    assert "and the embedding has 300 rows" in refusal(wanted, 300)


def test_kinds_are_those_of_the_tokens() -> None:
    backend = sentencepiece()
    backend.add_tokens([token("<tool>", special=False), token("▁▁", special=False)])
    values, notes = gguf_vocabulary.metadata(
        fast(backend), "here", vocab_size=backend.get_vocab_size(), architecture="llama"
    )
    kinds = dict(
        zip(values["tokenizer.ggml.tokens"], values["tokenizer.ggml.token_type"], strict=True)
    )
    names = ("<unk>", "</s>", "<0x0A>", "<tool>", "▁▁", "▁the")
    assert [kinds[name] for name in names] == [2, 3, 6, 4, 1, 1]
    assert notes == ["here: '▁▁' itself in a text, unlike blanks, may become other tokens"]


def test_what_stands_around_a_text_is_found_by_trying(tmp_path: pathlib.Path) -> None:
    from tokenizers import processors

    backend = byte_level(RULES[0])
    special = [(name, backend.token_to_id(name)) for name in ("<s>", "</s>")]
    for single, bos, eos in (("<s> $A", True, False), ("$A </s>", False, True)):
        backend.post_processor = processors.TemplateProcessing(single, special_tokens=special)
        found, values, _ = through_a_file(fast(backend), tmp_path)
        assert values["tokenizer.ggml.add_bos_token"] is bos
        assert values["tokenizer.ggml.add_eos_token"] is eos
        assert_same(found, fast(backend))
    backend.post_processor = processors.TemplateProcessing("</s> $A", special_tokens=special)
    assert "which is not bos_token, " in refusal(fast(backend))


def test_phi3_swallows_blanks_after_control_tokens(tmp_path: pathlib.Path) -> None:
    backend = sentencepiece()
    backend.add_special_tokens([token("<|endoftext|>"), token("<|user|>", rstrip=True)])
    parts = json.loads(backend.to_str())
    parts["added_tokens"][2] |= {"rstrip": True}  # </s>
    wanted = fast(tokenizers.Tokenizer.from_str(json.dumps(parts)), unk_token="<unk>")
    found, _, notes = through_a_file(wanted, tmp_path, architecture="phi3")
    assert "general.name has 'phi-3' in it" in notes[0]
    texts = [f"a{name} \n b" for name in ("<s>", "</s>", "<|user|>", "<|endoftext|>", "<unk>")]
    assert_same(found, wanted, [*TEXTS, *texts])
    assert found("<|user|>\nthe").input_ids == found("<|user|>the").input_ids
    assert "blanks beside '</s>' are kept" in refusal(
        fast(wanted.backend_tokenizer, chat_template=TEMPLATE.replace("eos_token", "'</s>\n'"))
    )


def test_blanks_swallowed_elsewhere_are_told(tmp_path: pathlib.Path) -> None:
    backend = byte_level(RULES[6])
    backend.add_special_tokens([token("<|user|>", lstrip=True, rstrip=True)])
    tight = fast(backend, chat_template="{% for m in messages %}<|user|>x{% endfor %}")
    found, _, notes = through_a_file(tight, tmp_path)
    assert len(notes) == 1 and "blanks beside '<|user|>' are kept" in notes[0]
    assert found("a<|user|>b").input_ids == tight("a<|user|>b").input_ids
    assert found("a <|user|> b").input_ids != tight("a <|user|> b").input_ids
    loose = fast(backend, chat_template="{% for m in messages %}<|user|>\nx{% endfor %}")
    assert "as read back; blanks beside '<|user|>' are kept" in refusal(loose)


def test_the_longest_text_is_the_architectures(tmp_path: pathlib.Path) -> None:
    values, _ = gguf_vocabulary.metadata(
        fast(byte_level(RULES[0])), "here", vocab_size=700, architecture="qwen3"
    )
    values |= {"llama.context_length": 5, "qwen3.context_length": 77}
    read = gguf_tokenizer.build({**values, "general.architecture": "qwen3"}, "here")
    assert read.model_max_length == 77
    with pytest.raises(errors.UserError, match=r"qwen3\.context_length is not a positive"):
        gguf_tokenizer.build(
            {**values, "general.architecture": "qwen3", "qwen3.context_length": 0}, "here"
        )


def _nfkc(parts: dict[str, Any]) -> None:
    parts["normalizer"]["normalizers"].append({"type": "NFKC"})


def _split(parts: dict[str, Any]) -> None:
    parts["pre_tokenizer"]["split"] = True


def _lacking(parts: dict[str, Any]) -> None:
    parts["model"]["merges"].remove(["▁t", "he"])


def _apart(parts: dict[str, Any]) -> None:
    parts["model"]["merges"].append(parts["model"]["merges"].pop(parts_at(parts, "▁the")))


def parts_at(parts: dict[str, Any], piece: str) -> int:
    return next(i for i, pair in enumerate(parts["model"]["merges"]) if "".join(pair) == piece)


def _no_fallback(parts: dict[str, Any]) -> None:
    parts["model"]["byte_fallback"] = False


def _dropout(parts: dict[str, Any]) -> None:
    parts["model"]["dropout"] = 0.1


@pytest.mark.parametrize(
    ("normal", "edit", "said"),
    [
        ("always", _nfkc, "its normaliser and pre-tokenizer are"),
        ("never", _split, "its pre-tokenizer is"),
        ("always", _lacking, "'▁t' and 'he' don't merge into '▁the'"),
        ("always", _apart, "are ranked apart"),
        ("always", _no_fallback, "neither byte-level BPE nor BPE with byte fallback"),
        ("always", _dropout, "dropout 0.1"),
    ],
)
def test_what_scores_cant_say_is_refused(normal: str, edit: Any, said: str) -> None:
    assert said in refusal(fast(sentencepiece(normal=normal, edit=edit)))


def test_parts_that_no_rule_has_are_refused() -> None:
    other = Rule("other", LLAMA3.replace("{1,3}", "{1,2}"))
    assert "no rule has its normaliser and pre-tokenizer" in refusal(fast(byte_level(other)))
    assert "no rule has" in refusal(fast(byte_level(Rule("other", QWEN2))))  # without NFC
    assert "no rule has" in refusal(fast(byte_level(Rule("other", LLAMA3), "merged_with_next")))
    unigram = tokenizers.Tokenizer(tokenizers.models.Unigram([("a", 0.0)]))
    assert "its model is Unigram" in refusal(fast(unigram))


def test_added_tokens_that_only_match_sometimes_are_refused() -> None:
    backend = byte_level(RULES[0])
    backend.add_tokens([token("word", single_word=True)])
    assert "'word' matches single words only" in refusal(fast(backend))
    backend = sentencepiece()
    backend.add_tokens([token("late", normalized=True)])
    assert "'late' is matched after normalising" in refusal(fast(backend))


def test_no_end_is_refused() -> None:
    assert "it has no eos_token" in refusal(fast(byte_level(RULES[0]), eos_token=None))
