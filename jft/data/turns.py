# SPDX-License-Identifier: Apache-2.0
"""A row's messages, whoever's spelling, as turns in one form: OpenAI's.

OpenAI writes {"role", "content"}, ShareGPT {"from", "value"}; tool calls stand beside the content there and in a turn
of their own here. Only what is certainly wrong is refused; whether a template can write a conversation is found by
asking the template.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from jft import errors, json_text
from jft.data import examples, json_rows, records

ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "function_response": "tool",
}
_DEEPEST = 32  # levels of a call's arguments and of a function's description
# Keys of a turn that change what it says and that nothing reads.
_UNREAD = ("thinking", "reasoning", "refusal", "audio", "image", "images", "video", "videos")


class Empty(errors.UserError):
    """A value that is there and holds nothing."""


def conversation(value: Any, what: str) -> list[examples.Turn]:
    """A whole conversation, which ends with the assistant's turn.

    Raises:
        errors.UserError: says which message is wrong and why, without the row's place.
    """
    turns = parse(value, what)
    check(turns)
    return turns


def parse(value: Any, what: str) -> list[examples.Turn]:
    """The turns of a list of messages, whatever their order."""
    if value is None:
        raise Empty(f"{what} is null; fill it or take the row out")
    if not isinstance(value, list):
        raise errors.UserError(
            f"{what} is {records.kind(value)}, not a list of messages; "
            "write [{'role': ..., 'content': ...}, ...], as JSON lines can"
        )
    if not value:
        raise Empty(f"{what} is an empty list; fill it or take the row out")
    return [turn(message, f"message {number}") for number, message in enumerate(value, start=1)]


def turn(message: Any, what: str) -> examples.Turn:
    """One message as a turn; `what` names it in errors."""
    if not isinstance(message, dict):
        raise errors.UserError(
            f"{what} is {records.kind(message)}; write {{'role': ..., 'content': ...}}"
        )
    key, held = ("from", "value") if "role" not in message and "from" in message else _OPENAI
    said = message.get(key)
    role = ROLES.get(said.lower()) if isinstance(said, str) else None
    if role is None:
        told = repr(said) if isinstance(said, str) else records.kind(said)
        raise errors.UserError(
            f"{what} has {f'{key} {told}' if key in message else f'no {key!r}'}; it is system, user, "
            "assistant or tool (ShareGPT: human, gpt, function_call, observation): mend it"
        )
    for name in _UNREAD:
        if message.get(name):
            raise errors.UserError(
                f"{what} has {name!r}, which nothing reads; take it out"
                + (" or name it 'reasoning_content'" if name in _UNREAD[:2] else "")
            )
    if said == "function_call":
        calls = tool_calls(_parsed(message.get(held), f"{what} (a function_call)"), what)
        return {"role": role, "content": "", "tool_calls": calls}
    return _turn(message, role, message.get(held), what)


_OPENAI = ("role", "content")


def _turn(message: Mapping[str, Any], role: str, content: Any, what: str) -> examples.Turn:
    found: examples.Turn = {"role": role, "content": ""}
    calls = message.get("tool_calls") or message.get("function_call")
    if calls:
        if role != "assistant":
            raise errors.UserError(
                f"{what} is the {role}'s and has tool calls; they are the assistant's: take them out"
            )
        found["tool_calls"] = tool_calls(calls, what)
    if content is not None or not calls:
        found["content"] = _content(content, f"{what}'s content")
    if role in ("user", "assistant") and not calls and not found["content"].strip():
        raise Empty(f"{what} (the {role}'s) is empty; fill it or take the row out")
    for key in ("name", "tool_call_id", "reasoning_content"):
        if message.get(key):
            found[key] = text(message[key], f"{what}'s {key}")
    weight = message.get("weight")
    if weight is not None:
        if isinstance(weight, bool) or weight not in (0, 1):
            shown = weight if isinstance(weight, bool | str) else records.kind(weight)
            raise errors.UserError(f"{what}'s weight is {shown}; write 0 or 1")
        found["weight"] = int(weight)
    return found


def _content(value: Any, what: str) -> str:
    """Text, or OpenAI's list of parts, of which only text can be read."""
    if not isinstance(value, list):
        return text(value, what)
    for part in value:
        if not isinstance(part, dict) or part.get("type") != "text":
            told = f"of type {part.get('type')!r}" if isinstance(part, dict) else records.kind(part)
            raise errors.UserError(
                f"{what} has a part that is {told}; only text is read: take the row out"
            )
    return "".join(text(part.get("text"), f"a part of {what}") for part in value)


def text(value: Any, what: str) -> str:
    """A value that is text which any tokenizer takes."""
    if value is None:
        raise Empty(f"{what} is null; fill it or take the row out")
    if not isinstance(value, str):
        raise errors.UserError(f"{what} is {records.kind(value)}, not text; write it as text")
    if "\0" in value:
        raise errors.UserError(
            f"{what} holds a NUL character at {value.index(chr(0))}; take it out"
        )
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise errors.UserError(
                f"{what} holds half of a surrogate pair at character {error.start}; take it out"
            ) from None
    return value


def tool_calls(value: Any, what: str) -> list[dict[str, Any]]:
    """Calls in OpenAI's form: a list of them, or one alone, as in its older `function_call`."""
    value = [value] if isinstance(value, dict) else value
    if not isinstance(value, list) or not value:
        raise errors.UserError(
            f"{what}'s tool calls are {records.kind(value)}; write [{{'name': ..., 'arguments': ...}}]"
        )
    return [_call(call, f"tool call {i} of {what}") for i, call in enumerate(value, start=1)]


def _call(call: Any, what: str) -> dict[str, Any]:
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise errors.UserError(f"{what} has no name; write {{'name': ..., 'arguments': ...}}")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            parsed = json_rows.decode(arguments) if arguments.strip() else {}
        except (ValueError, RecursionError):
            parsed = None  # what a model wrote need not be JSON: it stays as it is
        arguments = parsed if isinstance(parsed, dict) else text(arguments, f"{what}'s arguments")
    elif not isinstance(arguments, dict | None):
        raise errors.UserError(f"{what}'s arguments are {records.kind(arguments)}; write an object")
    if json_text.too_deep(arguments, _DEEPEST):
        raise errors.UserError(f"{what}'s arguments nest more than {_DEEPEST} levels; flatten them")
    name = text(function["name"], f"{what}'s name")
    found = {"type": "function", "function": {"name": name, "arguments": arguments or {}}}
    if call.get("id"):
        found["id"] = text(call["id"], f"{what}'s id")
    return found


def tools(value: Any, column: str) -> tuple[dict[str, Any], ...]:
    """The functions on offer, in OpenAI's form, from a list of them or its JSON text."""
    what = f"column {column!r}"
    if isinstance(value, str):
        value = _parsed(value, what) if value.strip() else None
    if value is None:
        return ()
    if not isinstance(value, list):
        raise errors.UserError(f"{what} is {records.kind(value)}; write a list of functions")
    return tuple(_tool(tool, f"function {i} of {what}") for i, tool in enumerate(value, start=1))


def _tool(tool: Any, what: str) -> dict[str, Any]:
    if json_text.too_deep(tool, _DEEPEST):
        raise errors.UserError(f"{what} nests more than {_DEEPEST} levels; flatten it")
    wrapped = isinstance(tool, dict) and isinstance(tool.get("function"), dict)
    function = tool["function"] if wrapped else tool
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise errors.UserError(
            f"{what} has no name; write {{'name': ..., 'description': ..., 'parameters': ...}}"
        )
    return tool if wrapped else {"type": "function", "function": tool}


def _parsed(value: Any, what: str) -> Any:
    """A JSON text's value; what is no text is taken to be parsed already."""
    if not isinstance(value, str):
        return value
    try:
        return json_rows.decode(value)
    except (ValueError, RecursionError) as error:
        raise errors.UserError(f"{what} holds {json_rows.explain(error)}") from None


def check(turns: Sequence[examples.Turn]) -> None:
    """Refuses orders of turns that no template can hold.

    Raises:
        errors.UserError: says which message is wrong and what to do.
    """
    check_order(turns)
    roles = [turn["role"] for turn in turns]
    if "assistant" not in roles:
        raise errors.UserError("has no assistant turn, so nothing to train; take the row out")
    if roles[0] == "assistant" and "user" not in roles:
        raise errors.UserError("has no user turn; write what is answered, or take the row out")
    if roles[-1] != "assistant":
        raise errors.UserError(
            f"the last turn is the {roles[-1]}'s, not the assistant's; "
            "take out the turns after the last answer"
        )


def check_order(turns: Sequence[examples.Turn]) -> None:
    """The part of `check` that holds for a prompt too."""
    calls: set[str] = set()
    for number, turn in enumerate(turns, start=1):
        if turn["role"] == "system" and number > 1:
            raise errors.UserError(
                f"message {number} is a system turn after the first message; put it first"
            )
        if turn["role"] == "tool":
            _check_result(turn, turns[number - 2]["role"] if number > 1 else "", number, calls)
        calls |= {call["id"] for call in turn.get("tool_calls", ()) if "id" in call}


def _check_result(turn: examples.Turn, before: str, number: int, calls: set[str]) -> None:
    if before not in ("assistant", "tool"):
        after = f"follows the {before}'s turn" if before else "is the first"
        raise errors.UserError(
            f"message {number} is a tool's result and {after}, with no call before it; "
            "put it after the call"
        )
    if calls and turn.get("tool_call_id", "") and turn["tool_call_id"] not in calls:
        raise errors.UserError(
            f"message {number} answers the tool call {turn['tool_call_id']!r}, which no turn made; "
            "mend tool_call_id"
        )
