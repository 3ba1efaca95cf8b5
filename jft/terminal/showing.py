# SPDX-License-Identifier: Apache-2.0
"""Rows as the model sees them, token by token, with what is trained told from its context at a glance.

With colours, what is trained lies on green and its context on grey, in two shades that alternate from token to token;
control tokens are yellow. Without colours, trained tokens stand in [brackets], others between bars, control tokens in
«angles». A newline is shown in the token that holds it and then made.
"""

import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from jft.data import rows
from jft.terminal import pieces, visible

if TYPE_CHECKING:
    from rich import console as rich_console
    from rich import text as rich_text


@dataclasses.dataclass(frozen=True)
class Palette:
    """Styles of tokens; backgrounds come in two shades."""

    trained: tuple[str, str]
    context: tuple[str, str]
    control: tuple[str, str]  # text colours of control tokens, trained and not

    def style(self, token: "Token", place: int) -> str:
        text, background = (self.trained if token.trained else self.context)[place % 2].split(
            " on "
        )
        return (
            f"{self.control[0 if token.trained else 1] if token.control else text} on {background}"
        )


_FINE = Palette(
    trained=("#ffffff on #1b5e20", "#ffffff on #2e7d32"),
    context=("#c6c6c6 on #303030", "#c6c6c6 on #444444"),
    control=("bold #ffd75f", "bold #ffd75f"),
)
# Of terminals with sixteen colours, which have two greens.
_PLAIN = Palette(
    trained=("black on green", "black on bright_green"),
    context=("white on black", "white on bright_black"),
    control=("bold bright_yellow", "bold bright_yellow"),
)


@dataclasses.dataclass(frozen=True)
class Token:
    """One token of a row: what it spells, whether it is trained, whether it is a control token."""

    id: int
    text: str
    trained: bool
    control: bool


@dataclasses.dataclass(frozen=True)
class Shown:
    """A row of the data to be shown: as it was encoded, or why it was not."""

    path: str
    number: int
    rows: tuple[rows.Row, ...]
    fault: str = ""


def tokens(row: rows.Row, spelled: pieces.Pieces) -> list[Token]:
    """A row's tokens; the first is never trained, since nothing stands before it to predict it from."""
    trained = np.r_[False, row.trained[1:]]
    return [
        Token(int(i), spelled.text(int(i)), bool(mark), int(i) in spelled.control)
        for i, mark in zip(row.tokens, trained, strict=True)
    ]


def print_shown(
    console: "rich_console.Console",
    shown: Shown,
    spelled: pieces.Pieces,
    *,
    several: bool = False,
    max_length: int = 0,
) -> None:
    """A row's number, the counts of its tokens, and its tokens; or why there are none."""
    from rich import text

    name = f"{visible.escape(shown.path)}: row {shown.number}" if several else f"row {shown.number}"
    if shown.fault:
        why = shown.fault.removeprefix(f"{shown.path}:row {shown.number}: ")
        head = text.Text.assemble(
            (name, "bold"), ("  not trained on: ", "red"), visible.escape(why)
        )
        console.print(head.append("\n"))
    for i, row in enumerate(shown.rows, start=1):
        found = tokens(row, spelled)
        part = f", part {i} of {len(shown.rows)}" if len(shown.rows) > 1 else ""
        head = text.Text.assemble((f"{name}{part}", "bold"))
        trained = sum(token.trained for token in found)
        head.append(f"  {visible.plural(len(found), 'token')}, {trained:,} trained")
        if max_length and len(found) - 1 > max_length:
            head.append(f"  longer than max_length={max_length:,}", "yellow")
        console.print(head)
        for line in lines(found, console.width, palette(console)):
            console.print(line, no_wrap=True, crop=False, overflow="ignore")
        console.print()


def print_legend(console: "rich_console.Console") -> None:
    from rich import text

    if colours := palette(console):
        parts: list[Any] = [(" trained ", colours.trained[1]), " the model learns to write  "]
        parts += [(" context ", colours.context[1]), " it only reads  "]
        parts += [(" control ", colours.style(Token(0, "", False, True), 1))]
    else:
        parts = ["[trained] the model learns to write   │context│ it only reads   «control»"]
    marks = (
        f"{visible.NEWLINE} newline   {visible.SPACE} space at a token's edge   {visible.TAB} tab"
    )
    console.print(text.Text.assemble(*parts))
    console.print(text.Text(f"{marks}\n", "dim"))


def palette(console: "rich_console.Console") -> Palette | None:
    """What the output can show; None = no colours."""
    if console.no_color or not console.is_terminal or console.color_system is None:
        return None
    return _FINE if console.color_system in ("256", "truecolor") else _PLAIN


def lines(found: list[Token], width: int, colours: Palette | None) -> Iterator["rich_text.Text"]:
    """The tokens in lines of at most `width` columns, broken between tokens where it goes, and after newlines."""
    from rich import cells, text

    line = text.Text()
    for i, token in enumerate(found):
        following = found[i + 1] if i + 1 < len(found) else None
        for part, style, ends in _parts(token, i, following, colours):
            if line.plain and cells.cell_len(line.plain) + cells.cell_len(part) > width:
                yield line
                line = text.Text()
            *full, last = _folded(part, width)
            yield from (text.Text(piece, style) for piece in full)
            line.append(last, style)
            if ends:
                yield line
                line = text.Text()
    if line.plain:
        yield line


def _folded(part: str, width: int) -> list[str]:
    """A part that is wider than a line, in lines."""
    from rich import cells

    folded = [""]
    for character in part:
        if cells.cell_len(folded[-1] + character) > width:
            folded.append("")
        folded[-1] += character
    return folded


def _parts(
    token: Token, place: int, following: Token | None, colours: Palette | None
) -> Iterator[tuple[str, str, bool]]:
    """A token's lines: the text, its style, and whether a newline ends it."""
    *full, last = map(visible.escape, _with_edges(token).split("\n"))
    parts = [part + visible.NEWLINE for part in full] + ([last] if last else [])
    style = colours.style(token, place) if colours else ""
    if not colours:
        before, after = _marks(token, following)
        parts[0] = before + parts[0]
        parts[-1] += after if last else after.strip("│")
    for i, part in enumerate(parts):
        yield part, style, i < len(full)


def _marks(token: Token, following: Token | None) -> tuple[str, str]:
    """What tells a token apart without colours."""
    before, after = ("«", "»") if token.control else ("", "")
    if token.trained:
        return f"[{before}", f"{after}]"
    apart = following is not None and not (following.trained or following.control or token.control)
    return before, after + ("│" if apart else "")


def _with_edges(token: Token) -> str:
    """The token's text with the spaces at its edges as dots."""
    inner = token.text.strip(" ")
    left = len(token.text) - len(token.text.lstrip(" "))
    right = len(token.text) - left - len(inner)
    return visible.SPACE * left + inner + visible.SPACE * right
