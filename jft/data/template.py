# SPDX-License-Identifier: Apache-2.0
"""A tokenizer and its chat template: what they do is found by trying them, and conversations are rendered with them.

Text in a message never becomes a control token. Before the template runs, each control token's text in a message is
broken in two by a mark, a character that no message holds; the rendered text is cut at the marks and the pieces are
tokenised one by one, so that the only control tokens left are the template's own.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from jft import errors, sandbox
from jft.data import examples

PROBE = "Zqxjk"  # what to look for in a trial's text
MARK = "\U000f0000"  # of a private-use plane; another one where a message holds it

Messages = Sequence[Mapping[str, Any]]
Tools = Sequence[Mapping[str, Any]]

# Continues a text in training as it stands, for models without a template: prompt, response, end token.
PLAIN = (
    "{{ bos_token or '' }}{% for m in messages %}{{ m.content }}"
    "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
)

_CALL = {"type": "function", "function": {"name": f"{PROBE}c", "arguments": {"a": 1}}}
_TOOL = {
    "type": "function",
    "function": {
        "name": f"{PROBE}t",
        "description": "x",
        "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}},
    },
}
_USER = {"role": "user", "content": "x"}
_CALLING = {"role": "assistant", "content": "", "tool_calls": [_CALL]}
_RESULT = {"role": "tool", "name": f"{PROBE}c", "content": f"{PROBE}r"}


@dataclasses.dataclass(frozen=True)
class Rendered:
    """A conversation's text; where `mark` stands, a control token's text of a message is broken."""

    text: str
    mark: str


@dataclasses.dataclass(frozen=True, eq=False)
class Template:
    """One tokenizer with one template."""

    tokenizer: Any
    control: re.Pattern[str]  # any control token's text
    answers: re.Pattern[str]  # those that an answer's text may not spell
    control_ids: Mapping[str, int]
    stop: int  # the token that ends an assistant's turn
    writes: frozenset[str]  # of "tools", "calls", "results": what the template does not leave out

    def check_tools(self, messages: Messages, tools: Tools) -> None:
        """Refuses what the template would leave out in silence, as templates without tools do.

        Raises:
            errors.UserError: says what.
        """
        held = {
            "tools": bool(tools),
            "calls": any(turn.get("tool_calls") for turn in messages),
            "results": any(turn["role"] == "tool" for turn in messages),
        }
        names = {"tools": "the tools on offer", "calls": "tool calls", "results": "tool results"}
        for what, there in held.items():
            if there and what not in self.writes:
                raise errors.UserError(
                    f"the chat template does not write {names[what]}; set data.chat_template to one that does"
                )

    def render(
        self,
        conversations: Sequence[Messages],
        tools: Tools,
        generation: bool,
        marks: Sequence[str],
    ) -> list[Rendered]:
        """The texts of conversations that share their tools; each with its mark (`unused_character` of all it holds).

        Raises:
            errors.UserError: the template refuses one of them; which one is not told.
        """
        if tools:
            (mark,) = set(marks)  # theirs too
            tools = _map_texts(tools, _breaker(self.control, mark))
        broken = [
            self._broken(turns, mark) for turns, mark in zip(conversations, marks, strict=True)
        ]
        texts = sandbox.render(self.tokenizer, broken, tools, generation)
        return [Rendered(text, mark) for text, mark in zip(texts, marks, strict=True)]

    def _broken(self, turns: Messages, mark: str) -> list[Mapping[str, Any]]:
        own = _breaker(self.control, mark)
        answers = _breaker(self.answers, mark)
        return [_map_texts(turn, answers if turn["role"] == "assistant" else own) for turn in turns]


def broken(text: str, control: re.Pattern[str]) -> Rendered:
    """A plain text, without a template: nothing in it is a control token."""
    mark = unused_character(text)
    return Rendered(_breaker(control, mark)(text), mark)


def analysed(tokenizer: Any) -> Template:
    """What the tokenizer and its present template do.

    Raises:
        errors.UserError: there is no template, or it can't be used in training.
    """
    return _analyse(tokenizer, str(tokenizer.chat_template or ""))


@functools.lru_cache(maxsize=8)
def _analyse(tokenizer: Any, template: str) -> Template:
    """Tries the template once per tokenizer and template; a template set later is a new entry."""
    added = added_tokens(tokenizer)
    every = any_of(added)
    answer = {"role": "assistant", "content": PROBE}
    asked = sandbox.render(tokenizer, [[_USER]], (), False)[0]
    prompt = sandbox.render(tokenizer, [[_USER]], (), True)[0]
    answered = sandbox.render(tokenizer, [[_USER, answer]], (), False)[0]
    before, found, after = answered.rpartition(PROBE)
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
    trials = _try_tools(tokenizer)
    # Other added tokens, such as <think>, are vocabulary that an answer may use. Where the template writes them itself,
    # they mean something in a prompt, and there only the template may write them.
    answers = special_tokens(tokenizer) | {stop[0]} | _found(every, [asked])
    control = answers | _found(every, [prompt, answered, *trials.values()])
    return Template(
        tokenizer,
        control=any_of(control),
        answers=any_of(answers),
        control_ids={text: added[text] for text in control},
        stop=added[stop[0]],
        writes=frozenset(trials),
    )


def _try_tools(tokenizer: Any) -> dict[str, str]:
    """The trial's text for each of "tools", "calls" and "results" that the template writes."""
    conversations: dict[str, tuple[Messages, Tools, tuple[str, ...]]] = {
        "tools": ([_USER], [_TOOL], (f"{PROBE}t",)),
        "calls": ([_USER, _CALLING], (), (f"{PROBE}c",)),
        "results": ([_USER, _CALLING, _RESULT], (), (f"{PROBE}r",)),
    }
    written = {}
    for what, (turns, tools, wanted) in conversations.items():
        try:
            text = sandbox.render(tokenizer, [turns], tools, False)[0]
        except errors.UserError:
            continue
        if all(name in text for name in wanted):
            written[what] = text
    return written


def added_tokens(tokenizer: Any) -> dict[str, int]:
    """Tokens beside the vocabulary. Gemma's runs of newlines and spaces control nothing and are left out."""
    added = tokenizer.added_tokens_decoder.items()
    return {str(token): index for index, token in added if str(token).strip()}


def special_tokens(tokenizer: Any) -> set[str]:
    """The texts of tokens that no message may spell, whatever the template."""
    added = added_tokens(tokenizer)
    special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    return special | {text for text in tokenizer.all_special_tokens if text in added}


def any_of(texts: Iterable[str]) -> re.Pattern[str]:
    """Matches any of the texts, the longest first, as tokenizers do; nothing if there are none."""
    return re.compile(
        "|".join(re.escape(text) for text in sorted(texts, key=len, reverse=True)) or "(?!)"
    )


def _breaker(control: re.Pattern[str], mark: str) -> Callable[[str], str]:
    return functools.partial(control.sub, lambda found: found[0][:1] + mark + found[0][1:])


def _found(pattern: re.Pattern[str], texts: Iterable[str]) -> set[str]:
    return {match[0] for text in texts for match in pattern.finditer(text)}


def unused_character(*values: Any) -> str:
    """A private-use character that no text in the values holds."""
    texts = list(_texts(values))
    if not any(MARK in text for text in texts):
        return MARK
    held = set().union(*texts)
    return next(chr(code) for code in range(0xF0000, 0xFFFFE) if chr(code) not in held)


def _texts(value: Any) -> Iterable[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield key
            yield from _texts(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _texts(item)


def _map_texts(value: Any, change: Callable[[str], str]) -> Any:
    """The value with every text in it changed, keys as well; a role is no text of the user's."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {
            change(key): item if key == "role" else _map_texts(item, change)
            for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        return [_map_texts(item, change) for item in value]
    return value


def with_system(messages: Messages, system: str | None) -> list[examples.Turn]:
    """The turns as a template takes them, after a system message where they have none."""
    turns = [{k: v for k, v in turn.items() if k != "weight"} for turn in messages]
    if system and (not turns or turns[0]["role"] != "system"):
        turns.insert(0, {"role": "system", "content": system})
    return turns
