# SPDX-License-Identifier: Apache-2.0
"""A row of a known shape to what an `Example` holds.

Errors say what is wrong with the row and what to do; its place is added by who called.
"""

from collections.abc import Callable, Mapping
from typing import Any

from jft import errors
from jft.data import examples, records, shapes, turns

Fields = dict[str, Any]  # of an Example: messages, text, tools, rejected, shared, label


def build(row: Mapping[str, Any], shape: shapes.Shape) -> Fields:
    """The fields of a row's example.

    Raises:
        turns.Empty: a text that is needed is empty.
        errors.UserError: a value can't be used.
    """
    return _BUILD[shape.kind](row, shape)


def _pair(row: Mapping[str, Any], shape: shapes.Shape) -> Fields:
    columns, told = shape.columns, shape.told
    if shape.separator:
        asked, answer = _split(row, shape)
        return _with_beside(row, shape, _ask(asked, "the prompt") + _answer(answer, "the response"))
    asked, answer = row[columns["prompt"]], row[columns["response"]]
    if "context" in columns:
        asked = _with_context(asked, row.get(columns["context"]), told)
    found = _prompt(asked, told["prompt"]) + _answer(answer, told["response"])
    return _with_beside(row, shape, found)


def _messages(row: Mapping[str, Any], shape: shapes.Shape) -> Fields:
    found = turns.parse(row[shape.columns["messages"]], shape.told["messages"])
    return _with_beside(row, shape, found)


def _text(row: Mapping[str, Any], shape: shapes.Shape) -> Fields:
    return {"messages": (), "text": _filled(row[shape.columns["text"]], shape.told["text"])}


def _unpaired(row: Mapping[str, Any], shape: shapes.Shape) -> Fields:
    column = shape.columns["label"]
    label = row[column]
    if shape.stated and not isinstance(label, bool):
        known = {"0": False, "1": True, "false": False, "true": True}
        said = str(label).strip().lower() if isinstance(label, str | int | float) else ""
        label = known.get(said.removesuffix(".0"), label)
    if not isinstance(label, bool):
        shown = repr(label) if isinstance(label, str) else records.kind(label)
        raise errors.UserError(
            f"{shape.told['label']} is {shown}; write true or false"
            + ("" if shape.stated else f", or set data.columns.label={column} for 0 and 1")
        )
    inner = _messages if "messages" in shape.columns else _pair
    return inner(row, shape) | {"label": label}


def _choices(row: Mapping[str, Any], shape: shapes.Shape) -> Fields:
    columns, told = shape.columns, shape.told
    choices, gold = row[columns["choices"]], row[columns["gold"]]
    if not isinstance(choices, list) or not choices:
        raise errors.UserError(
            f"column {columns['choices']!r} is {records.kind(choices)}; write a list of texts"
        )
    if isinstance(gold, bool) or not isinstance(gold, int) or not 0 <= gold < len(choices):
        raise errors.UserError(
            f"column {columns['gold']!r} is {records.kind(gold)}; "
            f"write the right one's index, 0 to {len(choices) - 1}"
        )
    choice, what = choices[gold], f"choice {gold} (column {columns['choices']!r})"
    if "prompt" in columns:
        found = _ask(row[columns["prompt"]], told["prompt"]) + _answer(choice, what)
    else:
        found = _ask(choice, what) + _answer(row[columns["response"]], told["response"])
    return _with_beside(row, shape, found)


def _preference(row: Mapping[str, Any], shape: shapes.Shape) -> Fields:
    columns, told = shape.columns, shape.told
    chosen, rejected = (_answer(row[columns[role]], told[role]) for role in ("chosen", "rejected"))
    role = "prompt" if "prompt" in columns else "messages"
    name = columns.get(role)
    asked = _prompt(row[name], told[role]) if name else []
    if chosen[0]["role"] != "assistant" or rejected[0]["role"] != "assistant":
        begun, chosen, rejected = _common(chosen, rejected)
        if asked and asked != begun and asked != begun[-1:]:
            raise errors.UserError(
                f"column {name!r} is not how the chosen answer's conversation begins; mend the row"
            )
        asked = begun
    if not asked:
        raise errors.UserError(
            "the answers have no prompt before them; name its column with data.columns.prompt=NAME"
        )
    if chosen == rejected:
        raise errors.UserError("the chosen and the rejected answer are the same; take the row out")
    if asked[-1]["role"] == "assistant":
        raise errors.UserError("the prompt ends with the assistant's turn; take that turn out")
    fields = _with_beside(row, shape, asked + chosen)
    turns.check([*asked, *rejected])
    shared = len(fields["messages"]) - len(chosen)
    return fields | {"rejected": tuple(rejected), "shared": shared}


Turns = list[examples.Turn]


def _common(chosen: Turns, rejected: Turns) -> tuple[Turns, Turns, Turns]:
    """Two conversations as their common beginning and what each goes on with."""
    at = 0
    while at < min(len(chosen), len(rejected)) and chosen[at] == rejected[at]:
        at += 1
    if at == len(chosen) == len(rejected):
        raise errors.UserError("the chosen and the rejected answer are the same; take the row out")
    ends = chosen[at:], rejected[at:]
    if not at or any(not end or end[0]["role"] != "assistant" for end in ends):
        raise errors.UserError(
            f"the chosen and the rejected conversation part after {at} equal messages, "
            "and not at an answer of the assistant; they need one prompt: mend the row"
        )
    return chosen[:at], *ends


def _with_beside(row: Mapping[str, Any], shape: shapes.Shape, found: Turns) -> Fields:
    """The fields of a conversation, with the columns for the system message and the tools, which may be absent."""
    columns = shape.columns
    system = row.get(columns["system"]) if "system" in columns else None
    if system is not None:
        system = turns.text(system, f"column {columns['system']!r}")
    if system:
        if found[0]["role"] == "system":
            raise errors.UserError(
                f"has a system turn and a column {columns['system']!r} too; empty one of them"
            )
        found = [{"role": "system", "content": system}, *found]
    # A prompt and an answer, the case of most rows, are in order.
    if len(found) != 2 or found[0]["role"] != "user" or found[1]["role"] != "assistant":
        turns.check(found)
    fields: Fields = {"messages": tuple(found)}
    if "tools" in columns:
        fields["tools"] = turns.tools(row.get(columns["tools"]), columns["tools"])
    return fields


def _ask(value: Any, what: str) -> Turns:
    return [{"role": "user", "content": _filled(value, what)}]


def _answer(value: Any, what: str) -> Turns:
    """An answer: a text, one message, or several."""
    if isinstance(value, dict):
        return [turns.turn(value, what)]
    if isinstance(value, list):
        return turns.parse(value, what)
    return [{"role": "assistant", "content": _filled(value, what)}]


def _prompt(value: Any, what: str) -> Turns:
    return turns.parse(value, what) if isinstance(value, list) else _ask(value, what)


def _filled(value: Any, what: str) -> str:
    text = turns.text(value, what)
    if not text.strip():
        raise turns.Empty(f"{what} is empty; fill it or take the row out")
    return text


def _with_context(asked: Any, context: Any, told: Mapping[str, str]) -> str:
    """Alpaca's instruction with its input after an empty line; either may be empty."""
    asked = turns.text(asked, told["prompt"])
    if context is None:
        return asked
    context = turns.text(context, told["context"])
    if not context.strip():
        return asked
    return f"{asked}\n\n{context}" if asked.strip() else context


def _split(row: Mapping[str, Any], shape: shapes.Shape) -> tuple[str, str]:
    separator, what = shape.separator, shape.told["text"]
    text = _filled(row[shape.columns["text"]], what)
    before, found, after = text.partition(separator)
    if not found:
        told = (
            "; a line end in it is written $'\\n' on the command line" if "\\n" in separator else ""
        )
        raise errors.UserError(
            f"{what} does not hold data.separator={separator!r}; "
            f"mend the separator or the row{told}"
        )
    return before + found, after


_BUILD: dict[str, Callable[[Mapping[str, Any], shapes.Shape], Fields]] = {
    "prompt/response": _pair,
    "alpaca": _pair,
    "messages": _messages,
    "text": _text,
    "unpaired": _unpaired,
    "multiple choice": _choices,
    "preference": _preference,
}
