# SPDX-License-Identifier: Apache-2.0
"""What a tokenizer does, in the words that GGUF has for it.

Its parts are compared with the rules of `gguf_rules`, never its name. For byte-level BPE the words
are the name of a rule (`rule_name`), for sentencepiece's BPE scores (`scores`) and whether blanks
are put before texts (`prefix`). What has no word is refused.
"""

import dataclasses
import itertools
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from jft import errors, sandbox
from jft.models import gguf_rules, gguf_tokenizer

_PREPEND = {"type": "Prepend", "prepend": gguf_rules.BLANK}
_REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": gguf_rules.BLANK}
_TALK = (
    {"role": "user", "content": "Say it."},
    {"role": "assistant", "content": "It."},
    {"role": "user", "content": "Again"},
)


@dataclasses.dataclass(frozen=True)
class Source:
    """A tokenizer, its backend as JSON, and the notes made on it."""

    tokenizer: Any
    parts: dict[str, Any]
    model: dict[str, Any]
    added: dict[int, dict[str, Any]]
    where: str
    notes: list[str]

    def flat(self, part: str) -> list[dict[str, Any]]:
        """A part's steps, without the sequences around them."""
        return list(_flat(self.parts[part]))

    def refusal(self, what: str) -> errors.UserError:
        return errors.UserError(f"{self.where}: the tokenizer can't be written as GGUF: {what}")


def read(tokenizer: Any, where: str) -> Source:
    """Takes a tokenizer apart; refuses what neither kind of GGUF vocabulary has."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise errors.UserError(f"{where}: not a fast tokenizer (no tokenizer.json)")
    parts = json.loads(backend.to_str())
    model, added = parts["model"], {entry["id"]: entry for entry in parts["added_tokens"]}
    source = Source(tokenizer, parts, model, added, where, [])
    if model["type"] != "BPE":
        raise source.refusal(f"its model is {model['type']}; implemented is BPE")
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            raise source.refusal(f"its model has {key} {model[key]!r}")
    for entry in source.added.values():
        _check_added(source, entry)
    return source


def _check_added(source: Source, entry: Mapping[str, Any]) -> None:
    """Both readers match added tokens in the text as it stands, anywhere."""
    text, normalizer = entry["content"], source.tokenizer.backend_tokenizer.normalizer
    if entry["single_word"]:
        raise source.refusal(f"the added token {text!r} matches single words only")
    if entry["normalized"] and normalizer is not None and normalizer.normalize_str(text) != text:
        raise source.refusal(
            f"the added token {text!r} is matched after normalising, which changes it; add it "
            "with normalized=False"
        )


def rule_name(source: Source) -> str:
    """The name of the rule that cuts text as this tokenizer does."""
    from tokenizers import pre_tokenizers

    missing = set(pre_tokenizers.ByteLevel.alphabet()) - set(source.model["vocab"])
    if missing and source.model["unk_token"] is not None:
        raise source.refusal(
            f"{min(missing)!r} is no token and becomes {source.model['unk_token']!r}"
        )
    steps, normal = _cuts(source), source.flat("normalizer")
    same = {
        name: rule
        for name, rule in gguf_rules.RULES.items()
        if steps == [*[("digits",)] * rule.digits, ("split", rule.regex), ("bytes",)]
        and normal == [{"type": "NFC"}] * rule.nfc
    }
    if not same:
        parts = json.dumps([normal, source.flat("pre_tokenizer")], ensure_ascii=False)
        raise source.refusal(f"no rule has its normaliser and pre-tokenizer {parts[:300]}")
    whole = bool(source.model.get("ignore_merges"))
    for name, rule in same.items():
        if rule.whole_words == whole:
            return name
    _check_whole_words(source)
    return next(iter(same))


def _cuts(source: Source) -> list[tuple[str, ...]]:
    """The pre-tokenizer's steps, those with one meaning written alike."""
    found: list[tuple[str, ...]] = []
    for step in source.flat("pre_tokenizer"):
        # A regex whose matches are the whole text can keep the matches or drop what is between.
        whole = (step.get("behavior"), step.get("invert")) in (
            ("Isolated", False),
            ("Removed", True),
        )
        if step["type"] == "ByteLevel" and not step["add_prefix_space"]:
            found += [("split", gguf_rules.GPT2)] * step["use_regex"] + [("bytes",)]
        elif step["type"] == "Split" and whole and "Regex" in step["pattern"]:
            found.append(("split", step["pattern"]["Regex"]))
        elif step["type"] == "Digits" and step["individual_digits"]:
            found.append(("digits",))
        else:
            found.append(("other", step["type"]))
    return found


def _check_whole_words(source: Source) -> None:
    """`ignore_merges` changes nothing where each token is what its own merges give."""
    import tokenizers

    vocab, added = source.model["vocab"], {a["content"] for a in source.added.values()}
    merges = [tuple(pair) for pair in source.model["merges"]]
    model = tokenizers.models.BPE(vocab=vocab, merges=merges)
    for text, index in vocab.items():
        if text not in added and [token.id for token in model.tokenize(text)] != [index]:
            raise source.refusal(
                f"ignore_merges is {bool(source.model.get('ignore_merges'))}, and that changes "
                f"what becomes of {text!r}"
            )


def prefix(source: Source, texts: list[str]) -> tuple[bool, list[str]]:
    """Whether readers put a blank before a text and after each added token.

    Returns:
      Also the texts on which this tokenizer is then the same.
    """
    normal, cuts = source.flat("normalizer"), source.flat("pre_tokenizer")
    if _REPLACE in normal:  # no blank is left to cut at
        cuts = [cut for cut in cuts if cut.get("pattern") != {"String": " "}]
    if not cuts and normal in ([_REPLACE], [_PREPEND, _REPLACE]):
        return _PREPEND in normal, texts
    if normal or [cut["type"] for cut in cuts] != ["Metaspace"]:
        parts = json.dumps([normal, cuts], ensure_ascii=False)
        raise source.refusal(f"its normaliser and pre-tokenizer are {parts[:300]}")
    cut = cuts[0]
    if cut["replacement"] != gguf_rules.BLANK or cut["split"]:
        raise source.refusal(f"its pre-tokenizer is {json.dumps(cut, ensure_ascii=False)}")
    if cut["prepend_scheme"] == "never":
        return False, texts
    return _prefix_of_chat(source, texts)


def _prefix_of_chat(source: Source, texts: list[str]) -> tuple[bool, list[str]]:
    """A blank before the first part of a text, or before parts that don't begin with one.

    No file says that. Without a blank anywhere it's the same for texts that begin with an added
    token, and most chat templates' do; with one, for plain texts.
    """
    scheme, talk = source.flat("pre_tokenizer")[0]["prepend_scheme"], chat(source)
    first = [e["content"] for e in source.added.values() if talk.startswith(e["content"])]
    if scheme == "first" and first:
        source.notes.append(
            "a text that begins with none of the added tokens gets no blank before it, and decoded "
            "text keeps the blank before its first word"
        )
        start = max(first, key=len)
        return False, [start + text for text in texts]
    also = ", and what follows an added token," if scheme == "first" else ""
    source.notes.append(f"a text that begins with a blank{also} gets one blank more")
    return True, [text for text in texts[:-1] if not text.startswith(" ")]


def chat(source: Source) -> str:
    """What the chat template writes for a short conversation; empty where there is none."""
    if not source.tokenizer.chat_template:
        return ""
    try:
        return sandbox.render(source.tokenizer, [_TALK], (), True)[0]
    except errors.UserError as error:
        raise source.refusal(f"on user, assistant, user {error}") from error


def scores(source: Source, tokens: Sequence[str]) -> list[float]:
    """Scores that give the merges in their order, where there are such.

    By scores every two neighbours merge whose union is a token, and the union alone says how soon.
    """
    model = source.model
    if not model["byte_fallback"]:
        raise source.refusal("neither byte-level BPE nor BPE with byte fallback")
    if model.get("ignore_merges"):
        _check_whole_words(source)
    merges = [tuple(pair) for pair in model["merges"]]
    unions = [left + right for left, right in merges]
    _check_order(source, [union for union, _ in itertools.groupby(unions)])
    listed, known = set(merges), set(model["vocab"])
    alone = {entry["content"] for entry in source.added.values()} - set(unions)
    for piece in known - alone:
        for left, right in gguf_tokenizer.cuts(piece, known):
            if (left, right) not in listed:
                raise source.refusal(
                    f"{left!r} and {right!r} don't merge into {piece!r}, which scores can't say"
                )
    rank = {union: place for place, union in enumerate(dict.fromkeys(unions))}
    return [-float(rank.get(token, len(rank))) for token in tokens]


def _check_order(source: Source, unions: Sequence[str]) -> None:
    """All merges into one piece stand together; runs of one character may be mixed.

    Runs are as long as they can be from the left in either order, as `_check` then finds.
    """
    counts = Counter(unions)
    mixed = [place for place, union in enumerate(unions) if counts[union] > 1]
    for union in unions[mixed[0] : mixed[-1] + 1] if mixed else ():
        if len(set(union)) > 1:
            raise source.refusal(f"merges into {union!r} are ranked apart, which scores can't say")


def _flat(part: Mapping[str, Any] | None) -> Iterable[dict[str, Any]]:
    if part is None:
        return
    inner = part.get("normalizers", part.get("pretokenizers"))
    if inner is None:
        yield dict(part)
    for step in inner or ():
        yield from _flat(step)
