# SPDX-License-Identifier: Apache-2.0
"""Writes a tokenizer as GGUF metadata, so that `gguf_tokenizer` and llama.cpp read the same one.

A GGUF says little: the tokens with their kinds, merges or scores, and the name of a rule. Whether
that is all a tokenizer does is found by comparing its parts with the rules, never by the model's
name. What the file can't say is refused. Two things it can't say pass with a note, as long as the
text of the chat template keeps its ids: blanks that are swallowed beside control tokens, and
sentencepiece's blank where it's put before the first part of a text only. In the end the metadata
is read back, and both tokenizers must agree on texts that are hard for tokenizers.
"""

import itertools
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from jft.models import gguf_rules, gguf_source, gguf_tokenizer

_TEXTS = (
    "",
    "1984 12345678 3.14 \u0663\u0664 I'm DON'T they'll we'Ve x's",
    "a  b   c    d" + " " * 70 + "e\n\n\nf\r\n \t\tg" + "\n" * 70 + "\t" * 40,
    " def f(x):\n    return {'a': [1, 2]}\n",
    "CamelCaseWORDS snake_case http://a.org/b?c=d // x/\n --> !!!",
    "caf\u00e9 cafe\u0301 \u6f22\u5b57\u304b\u306a \ud55c\uae00 \U0001f600\U0001f44d\U0001f3fd \u01c5x \u00a0\u3000",
    "\x00 \x7f \ufffd \U0010ffff",
    "end ",
)


def metadata(
    tokenizer: Any, where: str, *, vocab_size: int, architecture: str
) -> tuple[dict[str, Any], list[str]]:
    """A tokenizer's metadata, for `write`.

    Args:
      tokenizer: a fast transformers tokenizer.
      where: its folder or file, for messages.
      vocab_size: rows of the model's embedding. Rows without a token are called `[PAD123]`; added
        tokens without a row are left out: the model can't take them, they become text like any.
      architecture: the file's general.architecture.

    Returns:
      Values by key, and a line on each thing that the file does not say.

    Raises:
      errors.UserError: the tokenizer does what the file can't say.
    """
    source = gguf_source.read(tokenizer, where)
    byte_level = any(step["type"] == "ByteLevel" for step in source.flat("pre_tokenizer"))
    tokens, kinds = _tokens(source, vocab_size, byte_level)
    texts = [*_TEXTS, _between_added(source, vocab_size)]
    values: dict[str, Any] = {"tokens": tokens, "token_type": kinds} | _roles(source, vocab_size)
    if byte_level:
        values |= {"model": "gpt2", "pre": gguf_source.rule_name(source)}
        values["merges"] = [" ".join(pair) for pair in source.model["merges"]]
    else:
        prefix, texts = gguf_source.prefix(source, texts)
        values |= {"model": "llama", "pre": "default", "add_space_prefix": prefix}
        values["scores"] = gguf_source.scores(source, tokens)
    found = {f"tokenizer.ggml.{key}": value for key, value in values.items()} | _template(source)
    _check(source, found, architecture, texts)
    return found, source.notes


def write(writer: Any, values: Mapping[str, Any]) -> None:
    """Adds metadata to a gguf.GGUFWriter, in the types that llama.cpp expects."""
    for key, value in values.items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, value)


def _tokens(
    source: gguf_source.Source, vocab_size: int, byte_level: bool
) -> tuple[list[str], list[int]]:
    names: dict[int, str] = {index: text for text, index in source.model["vocab"].items()}
    names |= {index: entry["content"] for index, entry in source.added.items()}
    _leave_out(source, {i: text for i, text in names.items() if i >= vocab_size}, vocab_size)
    tokens = [names.get(index, f"[PAD{index}]") for index in range(vocab_size)]
    twice = [text for text, count in Counter(tokens).items() if count > 1]
    if twice:
        raise source.refusal(f"two ids are called {twice[0]!r}")
    kinds = [
        _kind(source, index, tokens[index], byte_level) if index in names else gguf_rules.UNUSED
        for index in range(vocab_size)
    ]
    for index in source.added:
        if index < vocab_size and kinds[index] == gguf_rules.NORMAL:
            source.notes.append(
                f"{source.where}: {tokens[index]!r} itself in a text, unlike blanks, may become "
                "other tokens"
            )
            break
    return tokens, kinds


def _leave_out(source: gguf_source.Source, over: Mapping[int, str], vocab_size: int) -> None:
    """Tokens without a row of the embedding: they may go where no text needs them."""
    for index, text in over.items():
        if index not in source.added or text in str(source.tokenizer.chat_template):
            raise source.refusal(
                f"{text!r} has id {index}, and the embedding has {vocab_size} rows"
            )
    if over:
        index = min(over)
        source.notes.append(
            f"{source.where}: {over[index]!r} is left out ({len(over)} such): its id is {index}, and "
            f"the embedding has {vocab_size} rows"
        )


def _kind(source: gguf_source.Source, index: int, text: str, byte_level: bool) -> int:
    if not byte_level and text == source.model["unk_token"]:
        return gguf_rules.UNKNOWN
    if index in source.added:
        if source.added[index]["special"]:
            return gguf_rules.CONTROL
        # Gemma's runs of blanks are added tokens, but in a text merges make them; and readers turn
        # sentencepiece's blank into a blank in normal tokens only.
        if byte_level or gguf_rules.BLANK not in text or text not in source.model["vocab"]:
            return gguf_rules.USER_DEFINED
    elif not byte_level and len(text) == 6 and text.startswith("<0x") and text.endswith(">"):
        return gguf_rules.BYTE
    return gguf_rules.NORMAL


def _between_added(source: gguf_source.Source, vocab_size: int) -> str:
    """A text with every added token in it, without blanks."""
    contents = [entry["content"] for i, entry in source.added.items() if i < vocab_size]
    return "".join(f"b{text}c" for text in contents if gguf_rules.BLANK not in text)


def _roles(source: gguf_source.Source, vocab_size: int) -> dict[str, Any]:
    """Ids of the special tokens, and which of them stand around a text."""
    tokenizer = source.tokenizer
    ids = {role: getattr(tokenizer, f"{role}_token_id") for role in gguf_rules.ROLES}
    if ids["eos"] is None:
        raise source.refusal("it has no eos_token, and llama.cpp would stop at another token")
    for role, index in ids.items():
        if index is not None and index >= vocab_size:
            raise source.refusal(f"{role}_token has id {index} of {vocab_size}")
    whole, inner = (tokenizer("a", add_special_tokens=flag).input_ids for flag in (True, False))
    for bos, eos in itertools.product((False, True), repeat=2):
        if whole == [ids["bos"]] * bos + inner + [ids["eos"]] * eos:
            found = {"add_bos_token": bos, "add_eos_token": eos}
            keys = gguf_rules.ROLES.items()
            return found | {
                f"{key}_token_id": ids[role] for role, key in keys if ids[role] is not None
            }
    raise source.refusal(f"'a' becomes {whole}, which is not bos_token, {inner}, eos_token")


def _template(source: gguf_source.Source) -> dict[str, str]:
    template = source.tokenizer.chat_template
    if isinstance(template, dict):
        for name in sorted(set(template) - {"default"}):
            source.notes.append(f"{source.where}: the chat template {name!r} is left out")
        template = template.get("default")
    return {"tokenizer.chat_template": template} if template else {}


def _check(
    source: gguf_source.Source, values: dict[str, Any], architecture: str, texts: Iterable[str]
) -> None:
    """Reads the metadata back and compares the two tokenizers: ids, and texts made of them."""
    again = gguf_tokenizer.build({**values, "general.architecture": architecture}, source.where)
    _note_blanks(source, json.loads(again.backend_tokenizer.to_str())["added_tokens"])
    for text in [*texts, *([gguf_source.chat(source)] if source.notes else [])]:
        want, got = (each(text).input_ids for each in (source.tokenizer, again))
        if want != got:
            at = next(i for i in itertools.count() if want[i : i + 1] != got[i : i + 1])
            raise source.refusal(
                f"token {at} of {text[:60]!r} is {want[at : at + 1]}, and {got[at : at + 1]} as "
                "read back" + "".join(f"; {note}" for note in source.notes)
            )
        before, after = (_decoded(each, want) for each in (source.tokenizer, again))
        if before != after:
            raise source.refusal(f"the tokens of {text[:60]!r} are decoded as {after[:60]!r}")


def _decoded(tokenizer: Any, ids: Sequence[int]) -> str:
    # Where a blank is put before texts, decoding may take it away or not.
    return tokenizer.decode(ids, clean_up_tokenization_spaces=False).removeprefix(" ")


def _note_blanks(source: gguf_source.Source, read_back: Sequence[Mapping[str, Any]]) -> None:
    """Notes on added tokens that swallow the blanks beside them."""

    def flags(entries: Iterable[Mapping[str, Any]]) -> dict[str, tuple[bool, bool]]:
        return {entry["content"]: (entry["lstrip"], entry["rstrip"]) for entry in entries}

    wanted, got = flags(source.added.values()), flags(read_back)
    other = [text for text, sides in wanted.items() if got.get(text, sides) != sides]
    if other:
        source.notes.append(
            f"{source.where}: blanks beside {other[0]!r} are kept, where here they are swallowed, "
            f"or the reverse ({len(other)} such tokens)"
        )
    elif any(any(sides) for sides in got.values()):
        source.notes.append(
            f"{source.where}: llama.cpp swallows blanks after control tokens only where "
            "general.name has 'phi-3' in it"
        )
