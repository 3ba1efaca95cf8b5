# SPDX-License-Identifier: Apache-2.0
"""Text of the user's data made safe and visible: no character of it moves the cursor, colours or hides anything."""

import functools
import unicodedata
from collections.abc import Sequence

# Control and format characters (which turn the direction of writing, or are invisible), separators, halves of pairs.
_UNSEEN = ("Cc", "Cf", "Zl", "Zp", "Cs")
# Joins people and skin tones into one emoji, and shows a symbol in colours: seen in what they make.
_PART_OF_EMOJI = "\u200d\ufe0f"
NEWLINE, TAB, SPACE = "⏎", "→", "·"


def escape(text: str) -> str:
    """The text with newlines as ⏎, tabs as → and whatever can't be seen as its code: <1B>, <U+202E>."""
    return "".join(map(_escape, text))


@functools.lru_cache(maxsize=4096)
def _escape(character: str) -> str:
    if character == "\n":
        return NEWLINE
    if character == "\t":
        return TAB
    if character in _PART_OF_EMOJI or unicodedata.category(character) not in _UNSEEN:
        return character
    code = ord(character)
    return f"<{code:02X}>" if code < 0x100 else f"<U+{code:04X}>"


def excerpt(text: str, width: int) -> str:
    """The beginning of a text on one line of at most `width` columns, runs of white space as one space."""
    from rich import cells

    line = escape(" ".join(text[: 8 * width].split()))
    short = line if len(text) <= 8 * width else f"{line}…"
    if cells.cell_len(short) <= width:
        return short
    return cells.set_cell_size(short, width - 1).rstrip() + "…"


def conversation(turns: Sequence[str], width: int) -> str:
    """The beginnings of the first turn and of the last on one line of at most `width` columns."""
    from rich import cells

    first, *more = turns
    if not more or width < 16:
        return excerpt(first, width)
    last = excerpt(more[-1], max(width // 2 - 3, width - 3 - len(excerpt(first, width))))
    return f"{excerpt(first, width - 3 - cells.cell_len(last))} → {last}"


def count(number: int | float) -> str:
    """A number with commas, or in millions where it would be long."""
    if number >= 10_000_000:
        return f"{number / 1e6:,.1f} M"
    return f"{number:,.0f}"


def plural(number: int, noun: str) -> str:
    """1 row, 1,000 rows."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
