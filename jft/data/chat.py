# SPDX-License-Identifier: Apache-2.0
"""Conversations to token ids, with the tokens to train on marked.

Two rules hold everything together.

The ids of a prompt are those of `prompt_tokens`, in training and in generation alike. A response is
what the conversation with the assistant's turn has beyond the prompt, up to and with the stop
token; it is found by common prefix of ids, never by searching for strings.

Text in a message never becomes a control token. Before the template runs, each control token's text
in a message is broken in two by a mark, a character that no message holds; the rendered text is cut
at the marks and the pieces are tokenised one by one, so that the only control tokens left are the
template's own. A conversation without such text has one piece, which is the ordinary tokenisation.
"""

import dataclasses
import functools
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jft import errors
from jft.data import formats

_PROBE = "Zqxjk"  # a response to look for in the rendered template


@dataclasses.dataclass(frozen=True)
class Row:
    """A conversation as tokens.

    `trained` marks the responses with their stop tokens. `untrained_turns` counts assistant turns
    that are not marked because the template writes them otherwise than the model would have
    produced them.
    """

    tokens: np.ndarray  # int32 [n], ends with the last response's stop token
    trained: np.ndarray  # bool [n]
    source: str
    untrained_turns: int = 0


@dataclasses.dataclass(frozen=True)
class _Template:
    """What a tokenizer and its template do, found by trying them."""

    control: re.Pattern[str]  # matches the text of any control token
    control_ids: frozenset[int]  # those that no plain text may give
    stop: int  # the token that ends an assistant's turn
    start: tuple[int, ...]  # the BOS token where the tokenizer puts one by itself


def encode(tokenizer: Any, example: formats.Example, *, system: str | None = None) -> Row:
    """Tokenises a conversation and marks what is trained: every assistant turn with its stop token.

    A turn that is not the last is trained where the row holds exactly the ids that the conversation
    up to that turn has. Qwen3's template, for one, writes only the last turn with a think block, so
    only that one is trained.

    Args:
        tokenizer: a transformers fast tokenizer with a chat template.
        example: ends with the assistant's turn.
        system: a system turn for conversations that have none.

    Raises:
        errors.UserError: there is no template, it fails on this conversation, or its generation
            prompt is not how it begins the assistant's turn.
    """
    messages = _with_system(example.messages, system)
    if not messages or messages[-1]["role"] != "assistant":
        raise errors.UserError(f"{example.source}: the last turn is not the assistant's")
    tokens, start = _response(tokenizer, messages, example.source)
    trained = np.zeros(len(tokens), bool)
    trained[start:] = True
    untrained = 0
    for i, message in enumerate(messages[:-1]):
        if message["role"] != "assistant":
            continue
        # A greeting before any user turn has no prompt to answer.
        if all(before["role"] != "user" for before in messages[:i]):
            untrained += 1
            continue
        part, start = _response(tokenizer, messages[: i + 1], example.source)
        if tokens[: len(part)] == part:
            trained[start : len(part)] = True
        else:
            untrained += 1
    return Row(np.asarray(tokens, np.int32), trained, example.source, untrained)


def prompt_tokens(
    tokenizer: Any, messages: Sequence[Mapping[str, str]], *, system: str | None = None
) -> list[int]:
    """The ids after which the model answers: those before the response in a row of `encode`."""
    if not messages:
        raise errors.UserError("prompt: there are no messages")
    turns = _with_system(messages, system)
    mark = _unused_character(turns)
    text = _render_marked(tokenizer, turns, True, mark, "prompt")
    return _encode_marked(tokenizer, text, mark, "prompt")


def stop_tokens(tokenizer: Any) -> set[int]:
    """The ids at which generation ends: the trained end of turn, and the tokenizer's end token."""
    stops = {tokenizer.eos_token_id} - {None}
    if tokenizer.chat_template:
        stops.add(_analysed(tokenizer).stop)
    return stops


def check_ids(tokens: Sequence[int], vocab_size: int, tokenizer: Any, source: str) -> None:
    """Refuses an id that the model has no embedding for: a tokenizer may know more tokens than there are rows.

    Raises:
        errors.UserError: names `source` and the token.
    """
    token = int(np.max(tokens, initial=0))
    if token >= vocab_size:
        text = json.dumps(tokenizer.convert_ids_to_tokens(token), ensure_ascii=False)
        raise errors.UserError(
            f"{source}: token {token} ({text}) is not one of the model's {vocab_size} embedding rows; "
            "take its text out"
        )


def _with_system(messages: Sequence[Mapping[str, str]], system: str | None) -> list[dict[str, str]]:
    turns = [{"role": turn["role"], "content": turn["content"]} for turn in messages]
    if system and (not turns or turns[0]["role"] != "system"):
        turns.insert(0, {"role": "system", "content": system})
    return turns


def _response(tokenizer: Any, messages: list[dict[str, str]], source: str) -> tuple[list[int], int]:
    """The ids up to the stop token of the last turn, and where its response starts."""
    mark = _unused_character(messages)
    prompt_text = _render_marked(tokenizer, messages[:-1], True, mark, source)
    text = _render_marked(tokenizer, messages, False, mark, source)
    prompt = _encode_marked(tokenizer, prompt_text, mark, source)
    tokens = _encode_marked(tokenizer, text, mark, source)
    start = len(prompt)
    if tokens[:start] != prompt:
        if not text.startswith(prompt_text):
            raise errors.UserError(
                f"{source}: the chat template's generation prompt is not how it begins an "
                "assistant's turn, so no response can be told from its prompt; set "
                "data.chat_template to one where it is"
            )
        # The response's first characters merged with the prompt's last, as in "\n" + "\n- one".
        # The prompt has to have the ids that generation gives it.
        tail = text[len(prompt_text) :]
        tokens = prompt + _encode_marked(tokenizer, tail, mark, source, after=True)
    stop = _analysed(tokenizer).stop
    if stop not in tokens[start:]:
        raise errors.UserError(
            f"{source}: the chat template ends this turn without "
            f"{tokenizer.convert_ids_to_tokens(stop)!r}; check data.chat_template"
        )
    return tokens[: tokens.index(stop, start) + 1], start


def _render_marked(
    tokenizer: Any, messages: list[dict[str, str]], generation: bool, mark: str, source: str
) -> str:
    """The rendered text, where the mark breaks every control token's text of a message."""
    control = _analysed(tokenizer).control
    broken = [
        {
            **turn,
            "content": control.sub(
                lambda match: match[0][:1] + mark + match[0][1:], turn["content"]
            ),
        }
        for turn in messages
    ]
    return _render(tokenizer, broken, generation, source)


def _encode_marked(
    tokenizer: Any, text: str, mark: str, source: str, after: bool = False
) -> list[int]:
    """Ids of rendered text; with `after`, of text that follows other text."""
    facts = _analysed(tokenizer)
    first, *rest = text.split(mark)
    tokens = _encode_after(tokenizer, first) if after else _encode_plain(tokenizer, first)
    for piece in rest:
        tokens += _encode_after(tokenizer, piece)
    # Fails where a normaliser or the vocabulary itself makes a control token of other text.
    written = sum(1 for piece in (first, *rest) for _ in facts.control.finditer(piece))
    if sum(1 for token in tokens if token in facts.control_ids) > written:
        raise errors.UserError(
            f"{source}: the tokenizer makes a control token of a message's text; take the text out"
        )
    if facts.start and not after and tuple(tokens[:1]) != facts.start:
        tokens = [*facts.start, *tokens]
    return tokens


def _unused_character(messages: Sequence[Mapping[str, str]]) -> str:
    """A private-use character that no message holds."""
    held = set().union(*(turn["content"] for turn in messages))
    return next(chr(code) for code in range(0xF0000, 0xFFFFE) if chr(code) not in held)


def _render(tokenizer: Any, messages: list[dict[str, str]], generation: bool, source: str) -> str:
    import jinja2

    if not tokenizer.chat_template:
        raise errors.UserError(
            "the tokenizer has no chat template; set data.chat_template to a file or a template's "
            "text"
        )
    try:
        return tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=generation
        )
    except (jinja2.TemplateError, TypeError, ValueError) as error:
        raise errors.UserError(
            f"{source}: the chat template refuses the conversation: {' '.join(str(error).split())}"
        ) from None


def _encode_plain(tokenizer: Any, text: str) -> list[int]:
    if not text:
        return []
    # The template has written BOS and EOS itself: adding special tokens here would double them.
    settings = {"add_special_tokens": False, "split_special_tokens": False, "verbose": False}
    return list(tokenizer(text, **settings)["input_ids"])


def _encode_after(tokenizer: Any, text: str) -> list[int]:
    """Ids of text in the middle of a sequence.

    SentencePiece's tokenizers put a space before any text they are given. It is avoided by
    tokenising the text after an anchor and cutting the anchor off; the anchors are tried until one
    does not merge with the text.
    """
    plain = _encode_plain(tokenizer, text)
    if "".join(tokenizer.convert_ids_to_tokens(_encode_plain(tokenizer, "a"))) == "a":
        return plain
    for anchor in ("\n", ".", "a"):
        before = _encode_plain(tokenizer, anchor)
        tokens = _encode_plain(tokenizer, anchor + text)
        if tokens[: len(before)] == before:
            return tokens[len(before) :]
    return plain


def _analysed(tokenizer: Any) -> _Template:
    return _analyse(tokenizer, str(tokenizer.chat_template or ""))


@functools.lru_cache(maxsize=8)
def _analyse(tokenizer: Any, template: str) -> _Template:
    """Tries the template once per tokenizer and template; a template set later is a new entry."""
    # Gemma's added tokens include runs of newlines and spaces, which control nothing.
    added = {
        str(token): index
        for index, token in tokenizer.added_tokens_decoder.items()
        if str(token).strip()
    }
    every = _any_of(added)
    user, answer = {"role": "user", "content": "x"}, {"role": "assistant", "content": _PROBE}
    source = "the chat template's trial"
    asked = _render(tokenizer, [user], False, source)
    prompt = _render(tokenizer, [user], True, source)
    answered = _render(tokenizer, [user, answer], False, source)
    before, found, after = answered.rpartition(_PROBE)
    if not found:
        raise errors.UserError(
            "the chat template does not write the assistant's content; check data.chat_template"
        )
    if prompt == asked and every.search(before[len(asked) :]):
        raise errors.UserError(
            "the chat template ignores add_generation_prompt, so the model would be trained to "
            f"write {before[len(asked) :]!r} itself; set data.chat_template to one that does not"
        )
    stop = every.search(after)
    if not stop:
        raise errors.UserError(
            f"the chat template ends an assistant's turn with {after!r}, which holds no token that "
            "could stop generation; write {{ eos_token }} there (data.chat_template)"
        )
    # Non-special added tokens such as <think> are vocabulary that a response may use, unless the
    # template itself builds turns from them.
    special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    named = {text for text in tokenizer.all_special_tokens if text in added}
    control = special | named | {stop[0]} | {match[0] for match in every.finditer(asked)}
    return _Template(
        control=_any_of(control),
        control_ids=frozenset(added[text] for text in control) - {tokenizer.unk_token_id},
        stop=added[stop[0]],
        start=_leading(tokenizer),
    )


def _any_of(texts: Any) -> re.Pattern[str]:
    """Matches any of the texts, the longest first, as tokenizers do; nothing if there are none."""
    return re.compile(
        "|".join(re.escape(text) for text in sorted(texts, key=len, reverse=True)) or "(?!)"
    )


def _leading(tokenizer: Any) -> tuple[int, ...]:
    """The BOS token, where the tokenizer puts one before any text by itself."""
    bos = tokenizer.bos_token_id
    return (
        (bos,)
        if bos is not None and tokenizer("a", verbose=False)["input_ids"][:1] == [bos]
        else ()
    )
