# SPDX-License-Identifier: Apache-2.0
"""Builds a tokenizer from GGUF metadata.

Byte-level BPE (`tokenizer.ggml.model` "gpt2") follows a rule of `gguf_rules`; sentencepiece's BPE
("llama") is rebuilt from the scores of its pieces.
"""

import itertools
from collections.abc import Collection, Mapping, Sequence, Set
from typing import Any

import numpy as np

from jft import errors
from jft.models import gguf_forms, gguf_rules

_LONGEST = 512  # characters of a piece of sentencepiece's
_PHI3_PLAIN = frozenset({"<unk>", "<s>", "<|endoftext|>"})


def build(metadata: Mapping[str, Any], where: str) -> Any:
    """A transformers PreTrainedTokenizerFast from a file's metadata.

    Args:
      metadata: as `gguf_file.read` gives it.
      where: the file's name, for messages.

    Raises:
      errors.UserError: no tokenizer, or one whose rules are not known here.
    """
    import transformers

    gguf_forms.check(metadata, where)
    tokens, model = metadata.get("tokenizer.ggml.tokens"), metadata.get("tokenizer.ggml.model")
    if not tokens:
        raise errors.UserError(f"{where}: has no tokenizer (tokenizer.ggml.tokens)")
    if len(set(tokens)) < len(tokens):
        raise errors.UserError(f"{where}: tokenizer.ggml.tokens has the same token twice")
    kinds = np.asarray(
        metadata.get("tokenizer.ggml.token_type", np.full(len(tokens), gguf_rules.NORMAL))
    )
    if len(kinds) != len(tokens):
        raise errors.UserError(f"{where}: {len(kinds)} token types for {len(tokens)} tokens")
    if model not in ("gpt2", "llama"):
        raise errors.UserError(
            f"{where}: tokenizer.ggml.model is {model!r}; implemented are 'gpt2' and 'llama'"
        )
    names = {
        f"{role}_token": tokens[_special(metadata, key, len(tokens), where)]
        for role, key in gguf_rules.ROLES.items()
        if f"tokenizer.ggml.{key}_token_id" in metadata
    }
    make = _byte_level if model == "gpt2" else _sentencepiece
    architecture = metadata.get("general.architecture")
    try:
        backend, add_bos = make(metadata, tokens, kinds, names, where)
    except errors.UserError:
        raise
    except Exception as error:  # the tokenizers library raises nothing narrower
        raise errors.UserError(f"{where}: the tokenizer's tables are damaged: {error}") from error
    strips = model == "llama" and architecture == "phi3"  # not in the file, only in the model
    _add_tokens(backend, tokens, kinds, _PHI3_PLAIN if strips else None)
    _add_template(backend, metadata, names, add_bos, where)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        chat_template=metadata.get("tokenizer.chat_template"),
        clean_up_tokenization_spaces=False,
        model_max_length=_max_length(metadata, architecture, where),
        **names,
    )


def _max_length(metadata: Mapping[str, Any], architecture: Any, where: str) -> int:
    key = f"{architecture}.context_length"
    length = metadata.get(key, 1 << 30)
    if isinstance(length, bool) or not isinstance(length, int) or length < 1:
        raise errors.UserError(f"{where}: {key} is not a positive integer")
    return length


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
    import tokenizers

    pre = metadata.get("tokenizer.ggml.pre")
    if pre not in gguf_rules.RULES:
        raise errors.UserError(
            f"{where}: tokenizer.ggml.pre is {pre!r}, whose rule is not known here; known are "
            f"{', '.join(gguf_rules.RULES)} (use the model's own folder with tokenizer.json)"
        )
    rule = gguf_rules.RULES[pre]
    merges = [tuple(merge.split(" ")) for merge in metadata.get("tokenizer.ggml.merges", ())]
    backend = tokenizers.Tokenizer(
        tokenizers.models.BPE(
            vocab={token: index for index, token in enumerate(tokens)},
            merges=merges,
            ignore_merges=rule.whole_words,
        )
    )
    rule.apply(backend)
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
    vocab = _with_characters(tokens, kinds)
    for byte in range(256):
        if _byte(byte) not in vocab and not (byte < 128 and chr(byte) in vocab):
            raise errors.UserError(f"{where}: the vocabulary lacks {_byte(byte)}: not implemented")
    scores = metadata.get("tokenizer.ggml.scores", ())
    if len(scores) != len(tokens):
        raise errors.UserError(f"{where}: {len(scores)} token scores for {len(tokens)} tokens")
    backend = Tokenizer(
        models.BPE(
            vocab=vocab,
            merges=_merges(vocab, kinds, scores, where),
            unk_token=names.get("unk_token"),
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    blank = [normalizers.Prepend(gguf_rules.BLANK)] if metadata.get(gguf_rules.PREFIX, True) else []
    backend.normalizer = normalizers.Sequence([*blank, normalizers.Replace(" ", gguf_rules.BLANK)])
    strip = [decoders.Strip(" ", 1, 0)] if blank else []
    backend.decoder = decoders.Sequence(
        [decoders.Replace(gguf_rules.BLANK, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return backend, True


def _byte(value: int) -> str:
    return f"<0x{value:02X}>"


def _with_characters(tokens: list[str], kinds: np.ndarray) -> dict[str, int]:
    """The vocabulary, where a byte that longer pieces begin or end with is its character.

    Such is Gemma's tab: `<0x09>` in the file, and pieces of several tabs. In sentencepiece the
    characters of a text merge before any becomes bytes.
    """
    vocab = {token: index for index, token in enumerate(tokens)}
    pieces = (token for token, kind in zip(tokens, kinds, strict=True) if kind == gguf_rules.NORMAL)
    for character in {c for piece in pieces if len(piece) > 1 for c in piece if c.isascii()}:
        byte = _byte(ord(character))
        if character not in vocab and byte in vocab:
            vocab[character] = vocab.pop(byte)
    return vocab


def _merges(
    vocab: Mapping[str, int], kinds: np.ndarray, scores: Any, where: str
) -> list[tuple[str, str]]:
    """Merges in sentencepiece's order: at each step the adjacent pair whose union scores best.

    The file lists scores, not merges. A piece's merges are all its cuts into two other pieces, the
    shorter left part first (in sentencepiece the leftmost in the text: another result only where
    two cuts overlap, as in runs of one character longer than the longest piece). That is the same
    procedure while pieces that tie can't compete and each character of a piece is itself one,
    which is checked.
    """
    normal = kinds == gguf_rules.NORMAL
    known = {token for token, index in vocab.items() if normal[index] or len(token) == 1}
    if long := [
        piece for piece in known if len(piece) > _LONGEST
    ]:  # their cuts take quadratic time
        raise errors.UserError(
            f"{where}: a piece has {len(long[0])} characters, more than {_LONGEST}"
        )
    pairs = {piece: cuts(piece, known) for piece in known if len(piece) > 1}
    for piece in pairs:
        if any(character not in known for character in piece):
            raise errors.UserError(f"{where}: {piece!r} has a character that is no piece itself")
    score = {piece: float(scores[vocab[piece]]) for piece in pairs if pairs[piece]}
    made = sorted(score, key=lambda piece: (-score[piece], vocab[piece]))
    merges: list[tuple[str, str]] = []
    for _, tied in itertools.groupby(made, key=score.__getitem__):
        group = list(tied)
        _check_tie(group, where)
        listed = [pair for piece in group for pair in pairs[piece]]
        # A run grows from its left end, so the longest left part comes first.
        merges += sorted(listed, key=lambda pair: -len(pair[0])) if len(group) > 1 else listed
    return merges


def cuts(piece: str, known: Set[str]) -> list[tuple[str, str]]:
    """Every way to make a piece of two others."""
    pairs = ((piece[:at], piece[at:]) for at in range(1, len(piece)))
    return [(left, right) for left, right in pairs if left in known and right in known]


def _check_tie(group: Sequence[str], where: str) -> None:
    """Pieces of one score must not meet in a text: runs of one character, or nothing in common."""
    owner: dict[str, str] = {}
    for piece in group:
        for character in set(piece):
            other = owner.setdefault(character, piece)
            if other != piece and len(set(piece) | set(other)) > 1:
                raise errors.UserError(
                    f"{where}: the pieces {other!r} and {piece!r} have one score: the order of "
                    "merges is not defined"
                )


def _add_tokens(
    backend: Any, tokens: list[str], kinds: np.ndarray, plain: Collection[str] | None
) -> None:
    """Control and user-defined tokens are matched in the text before anything else.

    Args:
      plain: where given, every token but these swallows the blanks that follow it.
    """
    from tokenizers import AddedToken

    special = np.isin(kinds, (gguf_rules.CONTROL, gguf_rules.UNKNOWN))
    for chosen, make in (
        (special, backend.add_special_tokens),
        (kinds == gguf_rules.USER_DEFINED, backend.add_tokens),
    ):
        make(
            [
                AddedToken(
                    tokens[index],
                    normalized=False,
                    special=bool(special[index]),
                    rstrip=plain is not None and tokens[index] not in plain,
                )
                for index in np.flatnonzero(chosen)
            ]
        )


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
