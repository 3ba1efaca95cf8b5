# SPDX-License-Identifier: Apache-2.0
"""Builds a tokenizer from GGUF metadata.

A GGUF names its pre-tokenizer (`tokenizer.ggml.pre`) and leaves the rule to the reader. The rules
here are those of the models' own tokenizer.json; a name without one is refused, because a near miss
gives other ids for numbers or blanks than in pretraining, and nothing else would show it.
"""

import dataclasses
import itertools
from collections.abc import Mapping
from typing import Any

import numpy as np

from jft import errors

_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4  # ggml's token types
_BLANK = "\N{LOWER ONE EIGHTH BLOCK}"  # sentencepiece's space

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


@dataclasses.dataclass(frozen=True)
class _Rule:
    """How byte-level BPE cuts text before merging.

    Attributes:
      regex: the pieces; None for GPT-2's own.
      digits: cut numbers into single digits first.
      nfc: compose characters first.
      whole_words: a piece that is a token is taken whole, whatever the merges say.
      add_bos: whether the beginning is marked where the file does not say.
    """

    regex: str | None = None
    digits: bool = False
    nfc: bool = False
    whole_words: bool = False
    add_bos: bool = False


_LLAMA3 = _Rule(rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}{{1,3}}|{_REST}", whole_words=True, add_bos=True)
_ROLES = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
_PREFIX = "tokenizer.ggml.add_space_prefix"
_DIGITS = _Rule(digits=True)
_RULES: dict[str, _Rule] = {
    "gpt-2": _Rule(),
    "smollm": _DIGITS,
    "starcoder": _DIGITS,
    "refact": _DIGITS,
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "qwen2": _Rule(rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}|{_REST}", nfc=True),
}


def build(metadata: Mapping[str, Any], where: str) -> Any:
    """A transformers PreTrainedTokenizerFast from a file's metadata.

    Args:
      metadata: as `gguf_file.read` gives it.
      where: the file's name, for messages.

    Raises:
      errors.UserError: no tokenizer, or one whose rules are not known here.
    """
    import tokenizers
    import transformers

    tokens, model = metadata.get("tokenizer.ggml.tokens"), metadata.get("tokenizer.ggml.model")
    if not tokens:
        raise errors.UserError(f"{where}: has no tokenizer (tokenizer.ggml.tokens)")
    if len(set(tokens)) < len(tokens):
        raise errors.UserError(f"{where}: tokenizer.ggml.tokens has the same token twice")
    kinds = np.asarray(metadata.get("tokenizer.ggml.token_type", np.full(len(tokens), _NORMAL)))
    if len(kinds) != len(tokens):
        raise errors.UserError(f"{where}: {len(kinds)} token types for {len(tokens)} tokens")
    if model not in ("gpt2", "llama"):
        raise errors.UserError(
            f"{where}: tokenizer.ggml.model is {model!r}; implemented are 'gpt2' and 'llama'"
        )
    names = {
        f"{role}_token": tokens[_special(metadata, key, len(tokens), where)]
        for role, key in _ROLES.items()
        if f"tokenizer.ggml.{key}_token_id" in metadata
    }
    make = _byte_level if model == "gpt2" else _sentencepiece
    try:
        backend, add_bos = make(metadata, tokens, kinds, names, where)
    except errors.UserError:
        raise
    except Exception as error:  # the tokenizers library raises nothing narrower
        raise errors.UserError(f"{where}: the tokenizer's tables are damaged: {error}") from error
    _add_tokens(backend, tokens, kinds)
    _add_template(backend, metadata, names, add_bos, where)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer.from_str(backend.to_str()),
        chat_template=metadata.get("tokenizer.chat_template"),
        clean_up_tokenization_spaces=False,
        model_max_length=int(metadata.get("llama.context_length", 1 << 30)),
        **names,
    )


def _special(metadata: Mapping[str, Any], key: str, count: int, where: str) -> int:
    token = metadata[f"tokenizer.ggml.{key}_token_id"]
    if not 0 <= token < count:
        raise errors.UserError(f"{where}: tokenizer.ggml.{key}_token_id is {token} of {count}")
    return token


def _byte_level(
    metadata: Mapping[str, Any],
    tokens: list[str],
    kinds: np.ndarray,
    names: Mapping[str, str],
    where: str,
) -> tuple[Any, bool]:
    """GPT-2's kind: bytes written as printable characters, merges listed in the file."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    pre = metadata.get("tokenizer.ggml.pre")
    if pre not in _RULES:
        raise errors.UserError(
            f"{where}: tokenizer.ggml.pre is {pre!r}, whose rule is not known here; known are "
            f"{', '.join(_RULES)} (use the model's own folder with tokenizer.json)"
        )
    rule = _RULES[pre]
    merges = [tuple(merge.split(" ")) for merge in metadata.get("tokenizer.ggml.merges", ())]
    backend = Tokenizer(
        models.BPE(
            vocab={token: index for index, token in enumerate(tokens)},
            merges=merges,
            ignore_merges=rule.whole_words,
        )
    )
    cuts: list[Any] = []
    if rule.digits:
        cuts.append(pre_tokenizers.Digits(individual_digits=True))
    if rule.regex is not None:
        cuts.append(pre_tokenizers.Split(Regex(rule.regex), behavior="isolated"))
    cuts.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=rule.regex is None))
    backend.pre_tokenizer = pre_tokenizers.Sequence(cuts)
    backend.decoder = decoders.ByteLevel()
    if rule.nfc:
        backend.normalizer = normalizers.NFC()
    return backend, rule.add_bos


def _sentencepiece(
    metadata: Mapping[str, Any],
    tokens: list[str],
    kinds: np.ndarray,
    names: Mapping[str, str],
    where: str,
) -> tuple[Any, bool]:
    """Llama 2's kind: BPE over characters by score, unknown characters as bytes.

    As in llama.cpp, a blank is put before the text and before what follows a control token.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers

    for key in ("precompiled_charsmap", "remove_extra_whitespaces"):
        if np.any(metadata.get(f"tokenizer.ggml.{key}", False)):
            raise errors.UserError(f"{where}: tokenizer.ggml.{key} is not implemented")
    missing = [f"<0x{byte:02X}>" for byte in range(256)]
    missing = sorted(set(missing) - set(tokens))
    if missing:
        raise errors.UserError(f"{where}: the vocabulary lacks {missing[0]}: not implemented")
    backend = Tokenizer(
        models.BPE(
            vocab={token: index for index, token in enumerate(tokens)},
            merges=_merges(tokens, kinds, metadata.get("tokenizer.ggml.scores", ()), where),
            unk_token=names.get("unk_token"),
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    blank = [normalizers.Prepend(_BLANK)] if metadata.get(_PREFIX, True) else []
    backend.normalizer = normalizers.Sequence([*blank, normalizers.Replace(" ", _BLANK)])
    strip = [decoders.Strip(" ", 1, 0)] if blank else []
    backend.decoder = decoders.Sequence(
        [decoders.Replace(_BLANK, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return backend, True


def _merges(tokens: list[str], kinds: np.ndarray, scores: Any, where: str) -> list[tuple[str, str]]:
    """Merges in sentencepiece's order: at each step the adjacent pair whose union scores best.

    The file lists scores, not merges. A piece's merges are all its cuts into two other pieces, the
    shorter left part first. That is the same procedure while no two pieces tie and each character
    of a piece is itself one, which is checked.
    """
    if len(scores) != len(tokens):
        raise errors.UserError(f"{where}: {len(scores)} token scores for {len(tokens)} tokens")
    score = {
        token: float(value)
        for token, value, kind in zip(tokens, scores, kinds, strict=True)
        if kind == _NORMAL
    }
    longer = sorted((t for t in score if len(t) > 1), key=lambda token: -score[token])
    for piece, following in itertools.pairwise(longer):
        if score[piece] == score[following]:
            raise errors.UserError(
                f"{where}: the pieces {piece!r} and {following!r} have one score: the order of "
                "merges is not defined"
            )
    for piece in longer:
        if any(character not in score for character in piece):
            raise errors.UserError(f"{where}: {piece!r} has a character that is no piece itself")
    cuts = ((piece[:at], piece[at:]) for piece in longer for at in range(1, len(piece)))
    return [(left, right) for left, right in cuts if left in score and right in score]


def _add_tokens(backend: Any, tokens: list[str], kinds: np.ndarray) -> None:
    """Control and user-defined tokens are matched in the text before anything else."""
    from tokenizers import AddedToken

    for kind, special in ((_CONTROL, True), (_USER_DEFINED, False)):
        added = [tokens[index] for index in np.flatnonzero(kinds == kind)]
        make = backend.add_special_tokens if special else backend.add_tokens
        make([AddedToken(token, normalized=False, special=special) for token in added])


def _add_template(
    backend: Any, metadata: Mapping[str, Any], names: Mapping[str, str], add_bos: bool, where: str
) -> None:
    """What `add_special_tokens=True` puts around a text."""
    from tokenizers import processors

    wanted = {
        "bos": metadata.get("tokenizer.ggml.add_bos_token", add_bos),
        "eos": metadata.get("tokenizer.ggml.add_eos_token", False),
    }
    for role, asked in wanted.items():
        if asked and f"{role}_token" not in names:
            raise errors.UserError(f"{where}: adds a {role} token and has no such token's id")
    before = [names["bos_token"]] if wanted["bos"] else []
    after = [names["eos_token"]] if wanted["eos"] else []
    if before or after:
        backend.post_processor = processors.TemplateProcessing(
            single=[*before, "$A", *after],
            pair=[*before, "$A", *after, *[f"{x}:1" for x in before], "$B:1"]
            + [f"{x}:1" for x in after],
            special_tokens=[(token, backend.token_to_id(token)) for token in {*before, *after}],
        )
