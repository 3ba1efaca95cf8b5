# SPDX-License-Identifier: Apache-2.0
"""Rows of a file to conversations that end with the assistant's turn.

Three shapes are recognised from the column names: a prompt and a response, an alpaca row
(instruction, input, output), and a list of messages. Nothing is guessed: two columns that could
both be meant are an error.
"""

import dataclasses
import difflib
from collections.abc import Mapping, Sequence
from typing import Any

from jft import errors
from jft.data import readers

PROMPTS = ("prompt", "instruction", "question", "input", "query")
RESPONSES = ("response", "completion", "output", "answer", "target")
MESSAGES = ("messages", "conversations")
ROLES = ("system", "user", "assistant")
# The role names of ShareGPT's {"from": ..., "value": ...} turns.
_SHAREGPT = {"system": "system", "human": "user", "gpt": "assistant"}
# Keys of a turn that change what it means: reading past them would train on something else than the
# file says.
_UNREAD = ("tool_calls", "function_call", "weight", "reasoning_content", "thinking")


@dataclasses.dataclass(frozen=True)
class Example:
    """One conversation; `source` is its place, for messages to the user."""

    messages: tuple[dict[str, str], ...]
    source: str


@dataclasses.dataclass(frozen=True)
class Shape:
    """Which column is what; an empty name means none. `context` is alpaca's input column."""

    kind: str  # "prompt/response", "alpaca" or "messages"
    prompt: str = ""
    response: str = ""
    context: str = ""
    messages: str = ""
    system: str = ""

    @property
    def required(self) -> tuple[str, ...]:
        return (self.messages,) if self.messages else (self.prompt, self.response)

    @property
    def used(self) -> tuple[str, ...]:
        return tuple(name for name in (*self.required, self.context, self.system) if name)


@dataclasses.dataclass(frozen=True)
class Table:
    """A file as read: its examples, how its rows were understood, and the columns nothing read."""

    examples: tuple[Example, ...]
    shape: Shape
    extra: tuple[str, ...]


def read(path: str, columns: Mapping[str, str] | None = None) -> list[Example]:
    """The examples of a file; see `read_table`."""
    return list(read_table(path, columns).examples)


def read_table(path: str, columns: Mapping[str, str] | None = None) -> Table:
    """Reads a JSONL, JSON, CSV, TSV or Parquet file.

    Args:
        path: the file; its extension says what it is.
        columns: names for "prompt", "response", "messages", "system" where the file uses others;
            empty ones are ignored.

    Raises:
        errors.UserError: the file or a row is not usable; the message names the row.
    """
    mapping = _check_mapping(columns or {})
    shapes: dict[tuple[str, ...], Shape] = {}
    examples = []
    for number, row in readers.read_rows(path):
        place = f"{path}:row {number}"
        if not isinstance(row, dict):
            raise errors.UserError(
                f"{place}: holds {readers.kind(row)}, not an object with columns"
            )
        names = tuple(row)
        if names not in shapes:
            first = next(iter(shapes.values()), None)
            shapes[names] = _recognise_like(first, names, mapping, place)
        examples.append(Example(_conversation(row, shapes[names], place), place))
    used = {name for shape in shapes.values() for name in shape.used}
    extra = dict.fromkeys(name for names in shapes for name in names if name not in used)
    return Table(tuple(examples), _widest(list(shapes.values())), tuple(extra))


def pair(prompt: str, response: str, system: str = "") -> tuple[dict[str, str], ...]:
    """A prompt and its response as a conversation."""
    turns = [{"role": "system", "content": system}] if system else []
    turns += [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
    return tuple(turns)


def recognise(names: Sequence[str], columns: Mapping[str, str], place: str) -> Shape:
    """The shape of a row with these columns; `columns` settles what the names leave open."""
    for role, name in columns.items():
        if name not in names:
            raise errors.UserError(
                f"{place}: data.columns.{role}={name} is no column{_near(name, names)}"
            )
    system = columns.get("system") or next(iter(_called(names, ("system",))), "")
    lists = [columns["messages"]] if "messages" in columns else _called(names, MESSAGES)
    prompts = [columns["prompt"]] if "prompt" in columns else _called(names, PROMPTS)
    responses = [columns["response"]] if "response" in columns else _called(names, RESPONSES)
    settled = "prompt" in columns or "response" in columns
    if "messages" in columns or (lists and not settled and not (prompts and responses)):
        return Shape("messages", messages=_only(lists, "messages", names, place), system=system)
    if lists and not settled:
        raise errors.UserError(
            f"{place}: both {lists[0]!r} and {prompts[0]!r}, {responses[0]!r} could be meant; set "
            f"data.columns.messages={lists[0]} or data.columns.prompt={prompts[0]}"
        )
    context = ""
    kinds = [name.strip().lower() for name in prompts]
    if kinds == ["instruction"] and "prompt" in columns:
        # Naming the instruction must not lose the input that belongs to it.
        context = next((name for name in _called(names, ("input",)) if name not in responses), "")
    elif sorted(kinds) == ["input", "instruction"]:
        context = prompts.pop(kinds.index("input"))
    prompt = _only(prompts, "prompt", names, place)
    response = _only(responses, "response", names, place)
    if prompt == response:
        raise errors.UserError(f"{place}: prompt and response are both column {prompt!r}")
    return Shape(
        "alpaca" if context else "prompt/response", prompt, response, context, system=system
    )


def _check_mapping(columns: Mapping[str, str]) -> dict[str, str]:
    known = ("prompt", "response", "messages", "system")
    for role in columns:
        if role not in known:
            raise errors.UserError(f"data.columns.{role}: unknown key{_near(role, known)}")
    mapping = {role: name for role, name in columns.items() if name}
    if "messages" in mapping and ("prompt" in mapping or "response" in mapping):
        raise errors.UserError(
            "data.columns: set either messages, or prompt and response, not both"
        )
    return mapping


def _recognise_like(
    first: Shape | None, names: tuple[str, ...], columns: Mapping[str, str], place: str
) -> Shape:
    """A row's shape, which must be the first row's; alpaca's input and the system may be absent."""
    if first is None:
        return recognise(names, columns, place)
    missing = [name for name in first.required if name not in names]
    if missing:
        raise errors.UserError(
            f"{place}: has no {missing[0]!r}, which the first row has ({first.kind}); its columns "
            f"are {_list(names)}; one file holds one shape"
        )
    shape = recognise(names, columns, place)
    if shape.required != first.required:
        raise errors.UserError(
            f"{place}: has columns {_list(shape.required)} where the first row has "
            f"{_list(first.required)}; one file holds one shape"
        )
    return shape


def _widest(shapes: list[Shape]) -> Shape:
    """The shape that names the most columns, since optional ones may be absent from some rows."""
    return max(shapes, key=lambda shape: len(shape.used))


def _called(names: Sequence[str], wanted: Sequence[str]) -> list[str]:
    return [name for name in names if name.strip().lower() in wanted]


def _only(candidates: list[str], role: str, names: Sequence[str], place: str) -> str:
    if len(candidates) == 1:
        return candidates[0]
    if not candidates:
        raise errors.UserError(
            f"{place}: no {role} column among {_list(names)}; name it with data.columns.{role}=NAME"
        )
    raise errors.UserError(
        f"{place}: {_list(candidates)} could each be the {role}; "
        f"settle it with data.columns.{role}={candidates[0]}"
    )


def _near(name: str, names: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, names, n=2)
    return f"; did you mean {' or '.join(near)}?" if near else f"; there are {_list(names)}"


def _list(names: Sequence[str]) -> str:
    shown = ", ".join(repr(name) for name in names[:12])
    return shown + (f" and {len(names) - 12} more" if len(names) > 12 else "")


def _conversation(row: Mapping[str, Any], shape: Shape, place: str) -> tuple[dict[str, str], ...]:
    system = row.get(shape.system) if shape.system else None
    system = _text(system, f"column {shape.system!r}", place) if system is not None else ""
    if shape.messages:
        turns = _turns(row[shape.messages], shape.messages, place)
        if system and turns[0]["role"] == "system":
            raise errors.UserError(f"{place}: has a system turn and a column {shape.system!r} too")
        return ({"role": "system", "content": system}, *turns) if system else turns
    prompt = _text(row[shape.prompt], f"prompt (column {shape.prompt!r})", place)
    context = row.get(shape.context) if shape.context else None
    context = _text(context, f"column {shape.context!r}", place) if context is not None else ""
    if context.strip():
        prompt = f"{prompt}\n\n{context}" if prompt.strip() else context
    response = _text(row[shape.response], f"response (column {shape.response!r})", place)
    _check_filled(prompt, f"prompt (column {shape.prompt!r})", place)
    _check_filled(response, f"response (column {shape.response!r})", place)
    return pair(prompt, response, system)


def _turns(value: Any, column: str, place: str) -> tuple[dict[str, str], ...]:
    if not isinstance(value, list) or not value:
        raise errors.UserError(
            f"{place}: column {column!r} holds {readers.kind(value)}, not messages"
        )
    turns = tuple(_turn(turn, f"{place}: message {i}") for i, turn in enumerate(value, start=1))
    roles = [turn["role"] for turn in turns]
    if "system" in roles[1:]:
        raise errors.UserError(f"{place}: a system turn stands after the first message")
    if "user" not in roles:
        raise errors.UserError(f"{place}: has no user turn (roles: {_list(roles)})")
    if roles[-1] != "assistant":
        raise errors.UserError(f"{place}: the last turn is the {roles[-1]}'s, not the assistant's")
    return turns


def _turn(turn: Any, place: str) -> dict[str, str]:
    if not isinstance(turn, dict):
        raise errors.UserError(
            f"{place} is {readers.kind(turn)}, not {{'role': ..., 'content': ...}}"
        )
    unread = [name for name in _UNREAD if turn.get(name) is not None]
    if unread:
        raise errors.UserError(
            f"{place} has {unread[0]!r}, which is not supported; take the row out"
        )
    role, content = turn.get("role"), turn.get("content")
    if "role" not in turn and "from" in turn:
        role, content = _SHAREGPT.get(str(turn["from"]), turn["from"]), turn.get("value")
    if role not in ROLES:
        raise errors.UserError(f"{place} has role {role!r}; known are {', '.join(ROLES)}")
    content = _text(content, "content", place)
    if role != "system":
        _check_filled(content, f"{role}'s content", place)
    return {"role": role, "content": content}


def _text(value: Any, what: str, place: str) -> str:
    if not isinstance(value, str):
        raise errors.UserError(f"{place}: the {what} is {readers.kind(value)}, not text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise errors.UserError(
            f"{place}: the {what} holds half of a surrogate pair at character {error.start}"
        ) from None
    return value


def _check_filled(text: str, what: str, place: str) -> None:
    if not text.strip():
        raise errors.UserError(f"{place}: the {what} is empty; fill it or take the row out")
