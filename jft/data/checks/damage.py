# SPDX-License-Identifier: Apache-2.0
"""Texts that were damaged on their way, or that a model has written in a loop."""

import collections
import re
import zlib

import numpy as np

from jft.data import findings
from jft.data.checks import found, parts

ENCODING = found.Words(
    "encoding",
    "warning",
    "with text of a damaged encoding",
    "repair what can be repaired with --fix (mojibake); for the rest, read the source again with its right encoding",
    fix="repair",
)
INVISIBLE = found.Words(
    "encoding",
    "note",
    "with characters that can't be seen",
    "strip them where they carry no meaning: the model sees them as tokens",
)
REPETITION = found.Words(
    "repetition",
    "warning",
    "with text that repeats itself without end",
    "take the rows out (--fix does), or cut the loop: a model learns it quickly",
    fix="remove",
)
REJECTED = found.Words(
    "repetition",
    "note",
    "with a rejected answer that repeats itself without end",
    "keep them if such loops are what the model shall unlearn; an answer this bad teaches little else",
)

# C0 controls that no text needs: all but tab, newline, form feed and carriage return.
_CONTROLS = bytes({*range(32), 127} - {9, 10, 12, 13})
_C1 = re.compile("[\x80-\x84\x86-\x9f]")  # U+0085 is a line's end
_INVISIBLE = re.compile("[\u200b\u2060\ufeff\u202a-\u202e\u2066-\u2069\U000e0001-\U000e007f]")
# A character read as another encoding's becomes two or more; one curly quote alone is no damage.
_SUSPECT = re.compile("[^\x00-\x7f]{2}|[ÂÃâÐÑ] ")

WINDOW = 5000  # characters looked at together: a loop in a long document is not thinned out
SHORTEST = 200  # characters: below it, repeating is style
RATIO = 0.4  # of compressed to plain bytes; prose of some hundred characters is at 0.5
LONGEST_UNIT = 250  # characters of the repeated piece
LOOP = 0.4  # of a window that is repetition
_END = re.compile(r"[\n.!?。！？]+")
_BULLET = re.compile(r"^[\s\d.)*\-#]+")


class Damage:
    def __init__(self) -> None:
        self._encoding, self._invisible = found.Found(), found.Found()
        self._loops, self._rejected = found.Found(), found.Found()

    def add(self, row: int, text: str, part: str) -> None:
        data = text.encode("utf-8", "surrogatepass")
        if len(data.translate(None, _CONTROLS)) < len(data):
            self._encoding.add(row, "control character", part)
        if not text.isascii():
            self._add_wide(row, text, part)
        if len(data) >= SHORTEST and is_loop(text):
            (self._rejected if part == parts.REJECTED else self._loops).add(row, "loop", part)

    def _add_wide(self, row: int, text: str, part: str) -> None:
        if "\ufffd" in text:
            self._encoding.add(row, "U+FFFD", part)
        if repair(text) != text:
            self._encoding.add(row, "mojibake", part)
        elif _C1.search(text):
            self._encoding.add(row, "control character", part)
        if _INVISIBLE.search(text):
            self._invisible.add(row, "zero width, byte order mark or direction", part)

    def told(self, places: found.Places) -> list[findings.Finding]:
        told = ((ENCODING, self._encoding), (INVISIBLE, self._invisible))
        told = (*told, (REPETITION, self._loops), (REJECTED, self._rejected))
        return [finding for words, rows in told for finding in found.tell(words, rows, places)]


def repair(text: str) -> str:
    """The text without mojibake (UTF-8 that was read as another encoding)."""
    import ftfy
    import ftfy.badness

    if not _SUSPECT.search(text) or not ftfy.badness.is_bad(text):
        return text
    return ftfy.fix_encoding(text)


def is_loop(text: str) -> bool:
    """Whether much of a text repeats one piece.

    zlib says quickly which texts could; those are looked at closely, for a piece that follows
    itself five times or more, or a sentence that stands everywhere.
    """
    for start in range(0, len(text), WINDOW):
        window = text[start : start + WINDOW]
        data = window.encode("utf-8", "surrogatepass")
        if len(data) < SHORTEST or len(zlib.compress(data, 1)) > RATIO * len(data):
            continue
        enough = LOOP * len(window)
        if _looped(window) >= enough or _same_sentence(window) >= enough:
            return True
    return False


def _looped(text: str) -> int:
    """Characters that lie in a run of one piece, said at least five times over 50 characters or more."""
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
    covered = np.zeros(len(codes), bool)
    for unit in range(1, min(LONGEST_UNIT, len(codes) // 5) + 1):
        equal = codes[unit:] == codes[:-unit]
        if np.count_nonzero(equal) < max(4 * unit, 50, LOOP / 2 * len(codes)):
            continue
        edges = np.flatnonzero(np.diff(equal, prepend=False, append=False)).reshape(-1, 2)
        for first, last in edges[edges[:, 1] - edges[:, 0] >= max(4 * unit, 50)]:
            covered[first : last + unit] = True
    return int(covered.sum())


def _same_sentence(text: str) -> int:
    """Characters of the sentence or line that stands most often, if it stands five times or more."""
    sentences = (_BULLET.sub("", sentence).strip() for sentence in _END.split(text))
    counts = collections.Counter(sentence for sentence in sentences if len(sentence) >= 15)
    return max((n * len(sentence) for sentence, n in counts.items() if n >= 5), default=0)
