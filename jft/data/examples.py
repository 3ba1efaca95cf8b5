# SPDX-License-Identifier: Apache-2.0
"""What a row of the user's data says, whatever file and columns it came from."""

import dataclasses
from typing import Any

# role and content; where they are given also tool_calls, name, tool_call_id, reasoning_content and weight (0 or 1).
Turn = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Example:
    """One row as understood.

    A conversation has `messages`; a plain text has `text` and no messages. A preference pair's `messages` end with the
    chosen answer, of which `shared` turns are before it, and `rejected` holds the turns that stand in its place; an
    unpaired preference has a `label`.
    """

    messages: tuple[Turn, ...]
    source: str  # its place, for messages to the user: "data.jsonl:row 12"
    path: str = ""  # the file
    number: int = 0  # the row in it, as in `source`
    text: str = ""
    tools: tuple[
        dict[str, Any], ...
    ] = ()  # the functions on offer, as JSON schemas in OpenAI's form
    rejected: tuple[Turn, ...] = ()
    shared: int = 0
    label: bool | None = None


@dataclasses.dataclass(frozen=True)
class Fault:
    """One row that can't be used, and why; `message` begins with its place and says what to do."""

    kind: str  # "malformed", "empty" or "template"
    message: str
    path: str
    number: int


def pair(prompt: str, response: str, system: str = "") -> tuple[Turn, ...]:
    """A prompt and its response as a conversation."""
    turns: list[Turn] = [{"role": "system", "content": system}] if system else []
    turns += [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
    return tuple(turns)
