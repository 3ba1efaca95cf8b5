# SPDX-License-Identifier: Apache-2.0
"""Chat templates, which come with a stranger's model, rendered within limits on time, memory and output.

A template is a program. Jinja's sandbox keeps it away from files and Python's internals, not from `'a' * 10**9`, from
ten loops inside each other or from a list that holds itself twice, sixty times over. Here every operation that makes
something larger than what it was given is asked before it runs how large that will be (`operations`, `filters`), what
is made is counted, and loops, calls and comparisons look at the clock (`budget`, `guard`). Texts are those that
transformers' `apply_chat_template` gives.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from jft import errors
from jft.sandbox import budget

Messages = Sequence[Mapping[str, Any]]

LONGEST = 1 << 17  # characters of a template: Python compiles that many in two seconds
_ADVICE = "set data.chat_template to another one"
# Names under which reasoning is stored; templates read the first, gpt-oss's the second.
_REASONING = ("reasoning_content", "thinking", "reasoning")


def render(
    tokenizer: Any, conversations: Sequence[Messages], tools: Messages, generation: bool
) -> list[str]:
    """The texts that the tokenizer's chat template makes of conversations.

    Raises:
      errors.UserError: there is no template, it is broken, it refuses a conversation, or it goes beyond a limit.
    """
    if not tokenizer.chat_template:
        raise errors.UserError(
            "the tokenizer has no chat template; set data.chat_template to a file, a template's text, or plain"
        )
    offered = [dict(tool) for tool in tools] or None
    compiled = _compiled(tokenizer, offered)
    given = {"tools": offered, "documents": None, "add_generation_prompt": generation}
    given |= tokenizer.special_tokens_map
    try:
        return [_text(compiled, turns, given) for turns in conversations]
    except budget.Exceeded as error:
        raise errors.UserError(f"the chat template {error}; {_ADVICE}") from None
    # A template can raise whatever Python's operators and functions can: ZeroDivisionError, RecursionError, ...
    except Exception as error:
        raise errors.UserError(
            f"the chat template refuses the conversation: {_one_line(error)}"
        ) from None


def _compiled(tokenizer: Any, tools: Any) -> Any:
    from jft.sandbox import environment  # needs jinja2

    try:
        source = tokenizer.get_chat_template(None, tools)
        if not isinstance(source, str):
            raise budget.Exceeded(f"is no text but {type(source).__name__}")
        if len(source) > LONGEST:
            raise budget.Exceeded(f"has {len(source):,} characters, more than {LONGEST:,}")
        return environment.compiled(source)
    except budget.Exceeded as error:
        raise errors.UserError(f"the chat template {error}; {_ADVICE}") from None
    except Exception as error:  # of Jinja's parser, or of Python's at its limits
        raise errors.UserError(
            f"the chat template can't be read: {_one_line(error)}; {_ADVICE}"
        ) from None


def _text(compiled: Any, turns: Messages, given: Mapping[str, Any]) -> str:
    messages = [_message(turn) for turn in turns]
    pieces, length = [], 0
    with budget.limits(budget.size_of(messages)) as limits:
        for piece in compiled.generate(messages=messages, **given):
            length += len(piece)
            limits.allow(length)
            limits.tick()
            pieces.append(piece)
    return "".join(pieces)


def _message(turn: Mapping[str, Any]) -> dict[str, Any]:
    """A turn as transformers hands it to templates: nothing that is None, and reasoning under all its names."""
    held = {key: value for key, value in turn.items() if value is not None}
    reasoning = next((held[key] for key in _REASONING if key in held), None)
    if reasoning is None:
        return held
    return {"thinking": reasoning, **held, "reasoning_content": reasoning}


def _one_line(error: Exception) -> str:
    said = str(error)
    if isinstance(error, RecursionError):
        said = "it calls itself too deeply"
    elif isinstance(error, MemoryError):  # also of Python's parser, at its own limit
        said = "there is not enough memory for it"
    text = " ".join(said.split()) or type(error).__name__
    return text if len(text) <= 300 else f"{text[:300]} ..."
