# SPDX-License-Identifier: Apache-2.0
"""Answers to a file of prompts, several at a time; and plain text, which has no template."""

import dataclasses
import json
import os
import pathlib
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import tqdm

from jft import errors, generate
from jft.data import encoding, examples, readers

RESPONSE = "response"
ROLES = ("system", "user", "assistant")


@dataclasses.dataclass(frozen=True)
class Row:
    """One row of the file: all its fields, and what is asked in it."""

    fields: dict[str, Any]
    messages: list[dict[str, str]]  # of --raw: one turn, whose content is the text
    place: str


@dataclasses.dataclass(frozen=True)
class Answers:
    """The rows with their answers, in the file's order; `cut` counts those that max_new_tokens ended."""

    rows: list[dict[str, Any]]
    cut: int


def read(path: str, out: str | None, *, raw: bool) -> list[Row]:
    """The rows of a file; all that can be wrong with them is told before a model is loaded.

    Raises:
      UserError: a row has no prompt, or has an answer already, or `out` is the same file.
    """
    if out and pathlib.Path(out).exists():
        for file in readers.files(path):
            if pathlib.Path(file).exists() and pathlib.Path(out).samefile(file):
                raise errors.UserError(f"--out={out}: is the file of prompts; name another")
    found = []
    for record in readers.stream(path):
        if isinstance(record, examples.Fault):
            raise errors.UserError(record.message)
        fields, place = record.value, f"{record.path}:row {record.number}"
        if not isinstance(fields, dict):
            raise errors.UserError(f"{place}: holds {readers.kind(fields)}, not an object")
        if RESPONSE in fields:
            raise errors.UserError(
                f"{place}: has a field {RESPONSE!r} already; rename it, as to 'reference'"
            )
        _check_writable(fields, place)
        messages = _plain(fields, place) if raw else _messages(fields, place)
        found.append(Row(fields, messages, place))
    return found


def _check_writable(fields: dict[str, Any], place: str) -> None:
    """Fields come out again beside the answer, as JSON."""
    for name, value in fields.items():
        try:
            json.dumps(value)
        except (TypeError, RecursionError):
            raise errors.UserError(
                f"{place}: field {name!r} is {readers.kind(value)}, which JSON can't hold; leave it out"
            ) from None


def _plain(fields: dict[str, Any], place: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": _text(fields.get("prompt"), "prompt", place)}]


def _messages(fields: dict[str, Any], place: str) -> list[dict[str, str]]:
    if ("prompt" in fields) == ("messages" in fields):
        both = "both" if "prompt" in fields else "neither"
        raise errors.UserError(f"{place}: has {both} of 'prompt' and 'messages'; it needs one")
    turns = fields.get("messages")
    if turns is None:
        turns = _plain(fields, place)
    if not isinstance(turns, list) or not turns:
        raise errors.UserError(f"{place}: messages is {readers.kind(turns)}, not a list of turns")
    found = [_turn(turn, f"{place}: message {i}") for i, turn in enumerate(turns, 1)]
    roles = [turn["role"] for turn in found]
    if roles[-1] != "user" or "system" in roles[1:]:
        raise errors.UserError(f"{place}: roles are {roles}; the last is the user's, system first")
    if fields.get("system") is not None:
        if roles[0] == "system":
            raise errors.UserError(f"{place}: has a system turn and a field 'system' too")
        system = _text(fields["system"], "system", place, empty=True)
        found = ([{"role": "system", "content": system}] if system else []) + found
    return found


def _turn(turn: Any, place: str) -> dict[str, str]:
    if not isinstance(turn, dict) or turn.get("role") not in ROLES:
        raise errors.UserError(f"{place} is no {{'role': {'|'.join(ROLES)}, 'content': ...}}")
    return {"role": turn["role"], "content": _text(turn.get("content"), "content", place)}


def _text(value: Any, what: str, place: str, *, empty: bool = False) -> str:
    if not isinstance(value, str) or not (empty or value.strip()):
        told = "is empty" if isinstance(value, str) else f"is {readers.kind(value)}, not text"
        raise errors.UserError(f"{place}: {what} {told}")
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise errors.UserError(f"{place}: {what} holds half of a surrogate pair")
    return value


def answer(
    generator: generate.Generator,
    rows: Sequence[Row],
    sampling: generate.Sampling,
    *,
    system: str | None,
    batch_size: int,
    raw: bool,
) -> Answers:
    """Answers all rows, long prompts first, so that what does not fit in memory fails at once.

    With a temperature, each batch has random numbers of its own: answers depend on the batch size.
    """
    prompts = [_tokens(generator, row, sampling, system, raw) for row in rows]
    order = sorted(range(len(rows)), key=lambda i: -len(prompts[i]))
    texts, cut = [""] * len(rows), 0
    with tqdm.tqdm(total=len(rows), unit="prompt", file=sys.stderr, mininterval=1) as bar:
        for number, at in enumerate(range(0, len(order), batch_size)):
            some = order[at : at + batch_size]
            asked = [prompts[i] for i in some]
            if at:  # a short last batch is filled up: one shape, one compiled program
                asked += [asked[-1]] * (batch_size - len(asked))
            drawn = dataclasses.replace(sampling, seed=sampling.seed + number)
            for i, tokens in zip(some, generator.batch(asked, drawn), strict=False):
                cut += tokens[-1] not in generator.stop
                texts[i] = _shown(generator, prompts[i], tokens, raw)
            bar.update(len(some))
    found = [row.fields | {RESPONSE: text} for row, text in zip(rows, texts, strict=True)]
    return Answers(found, cut)


def _tokens(
    generator: generate.Generator,
    row: Row,
    sampling: generate.Sampling,
    system: str | None,
    raw: bool,
) -> list[int]:
    tokenizer, limit = generator.model.tokenizer, generator.model.config.max_length
    if raw:
        tokens = plain_tokens(tokenizer, row.messages[0]["content"])
    else:
        try:
            tokens = encoding.prompt_tokens(tokenizer, row.messages, system=system)
        except errors.UserError as error:
            raise errors.UserError(f"{row.place}: {error}") from error
    if len(tokens) + sampling.max_new_tokens > limit:
        raise errors.UserError(
            f"{row.place}: {len(tokens)} tokens and --max_new_tokens={sampling.max_new_tokens} exceed the"
            f" model's {limit} positions"
        )
    return tokens


def write(path: str, lines: Iterable[str]) -> None:
    """Writes the file whole or not at all."""
    place = pathlib.Path(path)
    part = place.with_name(f".{place.name}.part")
    try:
        part.write_text("".join(lines), encoding="utf-8")
        os.replace(part, place)
    except OSError as error:
        raise errors.UserError(f"--out={path}: {error.strerror or error}") from error


def plain_tokens(tokenizer: Any, text: str) -> list[int]:
    """The ids of text without a template, after the token that the tokenizer begins texts with, if any."""
    ids = list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    # Not all that it would add: some end a text with the end token, after which there is nothing to continue.
    begun = tokenizer(text, verbose=False)["input_ids"][:1] == [tokenizer.bos_token_id]
    return [tokenizer.bos_token_id, *ids] if begun and ids[:1] != [tokenizer.bos_token_id] else ids


def continued(
    generator: generate.Generator, prompt: Sequence[int], sampling: generate.Sampling
) -> Iterator[str]:
    """The continuation of plain text in pieces, as it reads after its beginning."""
    tokens: list[int] = []
    shown = ""
    for token in generator.stream(prompt, sampling):
        tokens.append(token)
        text = _after(generator, prompt, tokens)
        if not text.endswith("\ufffd"):
            yield text[len(shown) :]
            shown = text
    if (text := _after(generator, prompt, tokens)) != shown:
        yield text[len(shown) :]


def _shown(
    generator: generate.Generator, prompt: Sequence[int], tokens: Sequence[int], raw: bool
) -> str:
    if not raw:
        return generator.text(tokens)
    return _after(generator, prompt, tokens[:-1] if tokens[-1] in generator.stop else tokens)


def _after(generator: generate.Generator, prompt: Sequence[int], tokens: Sequence[int]) -> str:
    """The text of tokens behind a prompt: SentencePiece's would lose the space of a first word that stands alone."""
    decode = generator.model.tokenizer.decode
    settings = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
    before = decode(list(prompt), **settings)
    return decode([*prompt, *tokens], **settings)[len(before) :]
