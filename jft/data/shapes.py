# SPDX-License-Identifier: Apache-2.0
"""Which column is what: recognised from the columns' names, or stated by the user; never guessed.

Where two columns could both be meant, it is an error that lists them with the settings that decide.
"""

import dataclasses
import difflib
import functools
from collections.abc import Mapping, Sequence
from typing import Any

from jft import errors

PROMPTS = ("prompt", "instruction", "question", "input", "inputs", "query", "problem")
RESPONSES = (
    "response",
    "completion",
    "output",
    "outputs",
    "answer",
    "target",
    "targets",
    "continuation",
    "solution",
    "reply",
)
MESSAGES = ("messages", "conversations", "conversation")
TOOLS = ("tools", "functions")
ROLES = (
    "prompt",
    "response",
    "messages",
    "system",
    "text",
    "chosen",
    "rejected",
    "label",
    "tools",
)
# Each of these says by itself what a row is, so no two go together.
_EITHER = (
    ("messages", "prompt", "response"),
    ("text", "prompt", "response", "messages", "chosen", "rejected", "label"),
    ("response", "chosen", "rejected"),
    ("label", "chosen", "rejected"),
)


@dataclasses.dataclass(frozen=True)
class Shape:
    """What the columns of a row are.

    `columns` has, by role, the names of those that are read: "prompt", "context" (which follows the prompt),
    "response", "messages", "system", "text", "chosen", "rejected", "label", "tools", "choices" and "gold" (the right
    one's index).
    """

    kind: str  # prompt/response, alpaca, messages, text, preference, unpaired or multiple choice
    columns: Mapping[str, str]
    separator: str = ""  # that splits the text into a prompt and a response
    stated: bool = False  # the user named the label's column, so that 0 and 1 are labels too

    @property
    def required(self) -> dict[str, str]:
        """The columns that every row has; others may be absent."""
        absent = ("context", "system", "tools")
        return {role: name for role, name in self.columns.items() if role not in absent}

    @functools.cached_property
    def told(self) -> dict[str, str]:
        """By role, what messages to the user call its value."""
        names = {"chosen": "the chosen answer", "rejected": "the rejected answer"}
        return {
            role: f"{names.get(role, f'the {role}')} (column {name!r})"
            for role, name in self.columns.items()
        }

    def describe(self) -> str:
        """In words, as told to the user: "prompt/response: prompt = 'question', response = 'answer'"."""
        named = [f"{role} = {name!r}" for role, name in self.columns.items()]
        split = f", split after {self.separator!r}" if self.separator else ""
        return f"{self.kind}: {', '.join(named)}{split}"


def check_columns(columns: Mapping[str, str], separator: str) -> dict[str, str]:
    """The columns that the user named, without those left empty.

    Raises:
        errors.UserError: a role is unknown, or two of them exclude each other.
    """
    for role in columns:
        if role not in ROLES:
            raise errors.UserError(f"data.columns.{role}: unknown key{_near(role, ROLES)}")
    given = {role: str(name) for role, name in columns.items() if name not in ("", None)}
    for first, *others in _EITHER:
        wrong = [role for role in others if first in given and role in given]
        if wrong:
            raise errors.UserError(
                f"data.columns: {first} and {wrong[0]} are both set; a row is one or the other: "
                f"leave data.columns.{wrong[0]} empty"
            )
    wrong = [role for role in given if separator and role not in ("text", "system", "tools")]
    if wrong:
        raise errors.UserError(
            f"data.separator splits a text, and data.columns.{wrong[0]} is set too; "
            "leave one of them empty"
        )
    return given


def recognise(row: Mapping[str, Any], given: Mapping[str, str], separator: str = "") -> Shape:
    """The shape of a row.

    Args:
        row: its columns; of the values, only their types are looked at, and only where names leave something open.
        given: columns by role, as `check_columns` returns them.
        separator: that splits a text into prompt and response.

    Raises:
        errors.UserError: what is open, and which settings decide; without the row's place.
    """
    names = list(row)
    given = {role: _find(role, name, names) for role, name in given.items()}
    found = _Columns(row, names, given)
    if separator:
        text = found.one("text", ("text",))
        return Shape("prompt/response", {"text": text} | found.beside(), separator)
    if "text" in given:
        return Shape("text", {"text": given["text"]})
    return _preference(found) or _conversation(found)


@dataclasses.dataclass(frozen=True)
class _Columns:
    """The columns of a row and those that the user has named."""

    row: Mapping[str, Any]
    names: list[str]
    given: Mapping[str, str]

    def called(self, role: str, wanted: Sequence[str]) -> list[str]:
        """The column that the user named, or all that have one of the names."""
        if role in self.given:
            return [self.given[role]]
        return [name for name in self.names if name.strip().lower() in wanted]

    def one(self, role: str, wanted: Sequence[str]) -> str:
        """The one column for a role; none or several are errors."""
        return self.only(role, self.called(role, wanted))

    def only(self, role: str, candidates: Sequence[str]) -> str:
        """The candidate, of which there has to be one."""
        if len(candidates) == 1:
            return candidates[0]
        if candidates:
            flags = " or ".join(f"data.columns.{role}={name}" for name in candidates)
            raise errors.UserError(f"{_list(candidates)} could each be the {role}; set {flags}")
        advice = f"name it with data.columns.{role}=NAME"
        if self.names == [str(i) for i in range(len(self.names))]:
            advice = f"name it by its place, as data.columns.{role}=0"
        raise errors.UserError(f"no {role} column among {_list(self.names)}; {advice}")

    def beside(self) -> dict[str, str]:
        """The optional columns of every conversation: the system message and the tools."""
        found = {}
        for role, wanted in (("system", ("system",)), ("tools", TOOLS)):
            if candidates := self.called(role, wanted):
                found[role] = self.only(role, candidates)
        return found


def _preference(found: _Columns) -> Shape | None:
    """A pair of answers, unless the user has named what makes the row something else."""
    given = found.given
    chosen, rejected = (found.called(role, (role,)) for role in ("chosen", "rejected"))
    asked = "chosen" in given or "rejected" in given
    if not asked and ("response" in given or "messages" in given or not (chosen and rejected)):
        return None
    responses = [] if asked else found.called("response", RESPONSES)
    if responses:
        raise errors.UserError(
            f"both {chosen[0]!r}, {rejected[0]!r} and {responses[0]!r} could be meant; set "
            f"data.columns.chosen={chosen[0]} or data.columns.response={responses[0]}"
        )
    columns = {"chosen": found.only("chosen", chosen), "rejected": found.only("rejected", rejected)}
    _check_apart(columns)
    prompts, lists = found.called("prompt", PROMPTS), found.called("messages", MESSAGES)
    if "prompt" in given or "messages" in given:  # what the user has named goes first
        prompts, lists = (prompts, []) if "prompt" in given else ([], lists)
    if prompts and lists:
        raise errors.UserError(
            f"{prompts[0]!r} and {lists[0]!r} could each be the prompt; set "
            f"data.columns.prompt={prompts[0]}, or data.columns.messages={lists[0]} and "
            f"data.columns.chosen={chosen[0]}"
        )
    if lists:
        columns = {"messages": found.only("messages", lists)} | columns
    elif prompts:
        columns = {"prompt": found.only("prompt", prompts)} | columns
    elif isinstance(found.row[columns["chosen"]], str):
        found.only("prompt", [])
    return Shape("preference", columns | found.beside())


def _conversation(found: _Columns) -> Shape:
    """A list of messages, a prompt and a response, several choices, or a text."""
    given = found.given
    settled = "prompt" in given or "response" in given
    lists = [] if settled else found.called("messages", MESSAGES)
    prompts = [] if "messages" in given else found.called("prompt", PROMPTS)
    responses = [] if "messages" in given else found.called("response", RESPONSES)
    if lists:
        if prompts and responses:
            raise errors.UserError(
                f"both {lists[0]!r} and {prompts[0]!r}, {responses[0]!r} could be meant; set "
                f"data.columns.messages={lists[0]} or data.columns.prompt={prompts[0]}"
            )
        shape = Shape("messages", {"messages": found.only("messages", lists)} | found.beside())
        return _labelled(found, shape)
    if not settled:
        shape = _choices(found, prompts) or _text(found, prompts, responses)
        if shape:
            return shape
    return _labelled(found, _pair(found, prompts, responses))


def _pair(found: _Columns, prompts: list[str], responses: list[str]) -> Shape:
    stated = "prompt" in found.given
    contexts = [name for name in found.names if _word(name) == "context" and name not in responses]
    if not prompts and contexts:  # as in {"context": ..., "continuation": ...}
        prompts, contexts = contexts, []
    words = sorted(_word(name) for name in prompts)
    context: list[str] = []
    if words in (["instruction"], ["input", "instruction"]):
        # Naming the instruction doesn't take away the input that belongs to it.
        inputs = [n for n in found.names if _word(n) == "input" and n not in responses]
        context = inputs + contexts
        prompts = [name for name in prompts if _word(name) == "instruction"]
        if len(context) > 1:
            raise errors.UserError(
                f"{_list(context)} could each belong to the instruction; rename one of them"
            )
    elif contexts and not stated and len(prompts) == 1:
        raise errors.UserError(
            f"{contexts[0]!r} could belong to the prompt {prompts[0]!r}; "
            f"data.columns.prompt={prompts[0]} leaves it out, and named 'instruction' "
            f"{prompts[0]!r} is followed by it"
        )
    columns = {"prompt": found.only("prompt", prompts)}
    columns |= {"context": context[0]} if context else {}
    columns |= {"response": found.only("response", responses)}
    _check_apart(columns)
    return Shape("alpaca" if context else "prompt/response", columns | found.beside())


def _choices(found: _Columns, prompts: list[str]) -> Shape | None:
    """A question with its possible answers, or possible contexts of one continuation."""
    by_word = {_word(name): name for name in found.names}
    gold = by_word.get("gold")
    if gold is None:
        return None
    if "choices" in by_word and len(prompts) == 1:
        columns = {"prompt": prompts[0], "choices": by_word["choices"], "gold": gold}
    elif "context_options" in by_word and "continuation" in by_word:
        columns = {"choices": by_word["context_options"], "response": by_word["continuation"]}
        columns |= {"gold": gold}
    else:
        return None
    return Shape("multiple choice", columns | found.beside())


def _text(found: _Columns, prompts: list[str], responses: list[str]) -> Shape | None:
    """A text alone. Beside a prompt and a response it is one more column, and beside other texts it may be a prompt."""
    texts = [name for name in found.names if _word(name) == "text"]
    if not texts or (prompts and responses):
        return None
    text = found.only("text", texts)
    others = [
        name
        for name in found.names
        if name != text and (isinstance(found.row[name], str) or _word(name) == "label")
    ]
    if not others:
        return Shape("text", {"text": text})
    pairs = " or ".join(f"data.columns.response={name}" for name in others[:6])
    raise errors.UserError(
        f"{text!r} stands beside {_list(others)}; set data.columns.text={text} for plain text, or "
        f"data.columns.prompt={text} with {pairs}"
    )


def _labelled(found: _Columns, shape: Shape) -> Shape:
    """The same with a label, if a column is one: named by the user, or called so and true or false."""
    stated = "label" in found.given
    labels = found.called("label", ("label",))
    if stated or (len(labels) == 1 and isinstance(found.row[labels[0]], bool)):
        columns = {**shape.columns, "label": found.only("label", labels)}
        _check_apart(columns)
        return Shape("unpaired", columns, stated=stated)
    return shape


def _check_apart(columns: Mapping[str, str]) -> None:
    roles: dict[str, str] = {}
    for role, name in columns.items():
        if name in roles:
            raise errors.UserError(
                f"{roles[name]} and {role} are both column {name!r}; "
                f"set data.columns.{role} to another"
            )
        roles[name] = role


def _find(role: str, name: str, names: Sequence[str]) -> str:
    """A column by its name, or by its place where none has that name."""
    if name in names:
        return name
    if name.isascii() and name.isdecimal() and len(name) < 9 and int(name) < len(names):
        return names[int(name)]
    raise errors.UserError(f"data.columns.{role}={name} is no column{_near(name, names)}")


def _word(name: str) -> str:
    return name.strip().lower()


def _near(name: str, names: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, names, n=2)
    return f"; did you mean {' or '.join(near)}?" if near else f"; there are {_list(names)}"


def _list(names: Sequence[str]) -> str:
    shown = ", ".join(repr(name) if len(name) < 60 else f"{name[:59]!r}…" for name in names[:12])
    return shown + (f" and {len(names) - 12} more" if len(names) > 12 else "") or "none"
